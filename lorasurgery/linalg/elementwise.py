"""Blending that works entry by entry: TIES, DARE, magnitude pruning, and TIES in a shared space (KnOTS).

Definitions and sources are in docs/maths.md. Only the result is ever dense: every block of every term is made when
it is needed, twice where a term's entries must be ranked first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorasurgery.linalg.core import NOISE, stack
from lorasurgery.linalg.methods import Elementwise
from lorasurgery.linalg.norms import row_blocks
from lorasurgery.linalg.thin import thin_qr
from lorasurgery.lowrank import LowRank, Update, within


def combine(
    terms: Sequence[Update], weights: Sequence[float], method: Elementwise, *, density: float, seed: int = 0
) -> Tensor:
    """Blend terms entry by entry; the result is dense, of full rank in general.

    >>> from lorasurgery.lowrank import LowRank
    >>> up = torch.eye(2)
    >>> a, b = LowRank(up, torch.tensor([[3.0, 1.0], [-2.0, 0.5]])), LowRank(up, torch.tensor([[1.0, 0.0], [5.0, 0.5]]))
    >>> combine([a, b], [1.0, 1.0], "ties", density=0.5).tolist()
    [[2.0, 0.0], [5.0, 0.0]]

    Args:
        terms: tᵢ, all of one shape (m, n) and on one device.
        weights: One strength wᵢ for each; a negative one turns the term's signs before they are compared.
        density: Share of each term's entries that is kept, in (0, 1].
        seed: Of the Bernoulli masks of DARE; they are drawn on the CPU, so that all devices agree.

    Returns:
        (m, n) in float32.
    """
    terms = [t.to(torch.float32) for t in terms]
    out = torch.empty(terms[0].shape, dtype=torch.float32, device=terms[0].device)
    signed = [t.times(math.copysign(1.0, w)) for t, w in zip(terms, weights, strict=True)]
    sizes = [abs(w) for w in weights]
    if method.startswith("dare"):
        trimmed = [_dropped(t, density, seed + i, out) for i, t in enumerate(signed)]
    else:
        trimmed = [_trimmed(t, _threshold(t, density, out), out) for t in signed]
    merge = _disjoint if method.endswith("ties") else _sum
    for rows, *blocks in zip(row_blocks(out), *trimmed, strict=True):
        out[rows] = merge(blocks, sizes)
    return out


def sum_of(terms: Sequence[Update]) -> Tensor:
    """Σ of updates as one matrix in float32.

    >>> from lorasurgery.lowrank import Dense
    >>> sum_of([Dense(torch.ones(1, 2)), Dense(torch.ones(1, 2), 0.5)])
    tensor([[1.5000, 1.5000]])
    """
    first, *others = (t.to(torch.float32) for t in terms)
    total = first.rows(slice(None), torch.float32)
    for term in others:
        term.add_rows(total, slice(None))
    return total


def _blocks(term: Update, like: Tensor) -> Iterator[Tensor]:
    """The rows of an update, block by block, in float32."""
    for rows in row_blocks(like):
        yield term.rows(rows, torch.float32)


def _trimmed(term: Update, threshold: float, like: Tensor) -> Iterator[Tensor]:
    for block in _blocks(term, like):
        yield torch.where(block.abs() >= threshold, block, 0.0)


def _dropped(term: Update, density: float, seed: int, like: Tensor) -> Iterator[Tensor]:
    """Keep each entry with probability `density` and divide by it, so that the mean stays (Yu et al. 2024)."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    for block in _blocks(term, like):
        mask = torch.rand(block.shape, generator=generator) < density
        yield block * mask.to(block.device) / density


def _threshold(term: Update, density: float, scratch: Tensor) -> float:
    """The magnitude of the ⌊density·m·n⌋-th largest entry; `scratch` (m, n) is overwritten."""
    keep = int(density * scratch.numel())
    if keep >= scratch.numel():
        return 0.0
    if keep == 0:
        return math.inf
    for rows, block in zip(row_blocks(scratch), _blocks(term, scratch), strict=True):
        scratch[rows] = block.abs_()
    flat, place = scratch.view(-1), scratch.numel() - keep
    if scratch.device.type != "cpu":
        return float(flat.kthvalue(place + 1).values)
    values = flat.numpy()
    values.partition(place)  # in place, where torch's kthvalue would need indices of twice the size
    return float(values[place])


def _sum(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=within(weight, total.dtype))
    return total


def _disjoint(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of wᵢtᵢ over the terms whose sign is that of Σtᵢ (Yadav et al. 2023, sections 3.2 and 3.3)."""
    elected = torch.where(_sum(blocks, [1.0] * len(blocks)) >= 0, 1.0, -1.0)
    agree = [block.sign() == elected for block in blocks]
    total = _sum([torch.where(a, b, 0.0) for a, b in zip(agree, blocks, strict=True)], weights)
    return total / _count(agree).clamp_(min=1)


def _count(masks: Sequence[Tensor]) -> Tensor:
    return _sum([m.to(torch.float32) for m in masks], [1.0] * len(masks))


def align(terms: Sequence[LowRank]) -> tuple[torch.Tensor, list[LowRank]]:
    """[ΔW₁ ΔW₂ …] = UΣ[V₁ᵀ V₂ᵀ …]: the shared UΣ (m, k) and each update's Vᵢᵀ (k, n), held in factors.

    The concatenation is [B₁ B₂ …] times a block diagonal of the Aᵢ, so its SVD is that of a core of Σrᵢ numbers a side.

    >>> w = LowRank(torch.ones(3, 1), torch.tensor([[3.0, 4.0]]))
    >>> shared, (right,) = align([w])
    >>> torch.allclose(shared @ right.dense().double(), w.dense().double())
    True

    Args:
        terms: up (m, rᵢ), down (rᵢ, n), all of one shape (m, n).
    """
    up, down, scales = stack(terms, torch.float64)
    ranks = [t.rank for t in terms]
    left = thin_qr(up * scales.to(up.device)[:, None])
    rights = [thin_qr(d) for d in torch.split(down, ranks)]
    mixed = torch.split(left.r * left.norms, ranks, dim=1)
    core = torch.cat([m @ (r.r * r.norms).mT for m, r in zip(mixed, rights, strict=True)], 1)
    x, s, z = torch.linalg.svd(core, full_matrices=False)
    kept = int((s > NOISE * s[:1]).sum())
    shared = left.times(x[:, :kept] * s[:kept]).mT
    parts = torch.split(z[:kept], [r.r.shape[0] for r in rights], dim=1)
    return shared, [
        LowRank(part.to(shared), right.times(torch.eye(right.r.shape[0], dtype=torch.float64)))
        for part, right in zip(parts, rights, strict=True)
    ]


def knots_ties(terms: Sequence[LowRank], weights: Sequence[float], *, density: float) -> LowRank:
    """UΣ · TIES(w₁V₁ᵀ, w₂V₂ᵀ, …): a blend that stays in factors, of rank Σrᵢ at most.

    >>> w = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    >>> torch.allclose(knots_ties([w, w], [1.0, 1.0], density=1.0).dense(), w.dense())
    True
    """
    shared, aligned = align(terms)
    if not shared.shape[1]:
        return LowRank(shared.to(torch.float32), torch.zeros(0, terms[0].shape[1], device=shared.device))
    return LowRank(shared.to(torch.float32), combine(aligned, weights, "ties", density=density))
