"""KnOTS-TIES: TIES in a space that all updates share (Stoica et al. 2024, arXiv:2410.19735), from the factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorasurgery.linalg.core import NOISE, stack
from lorasurgery.linalg.elementwise import combine
from lorasurgery.linalg.thin import thin_qr
from lorasurgery.lowrank import LowRank


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
