"""The factors of a truncated SVD as they are stored: one side fitted anew, in the pass that measures the error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.linalg.blocks import Blocks, blocked, times, transposed_times
from lorasurgery.linalg.columns import mixed, products
from lorasurgery.linalg.norms import residual_norm
from lorasurgery.linalg.svd import TruncatedSVD
from lorasurgery.lowrank import LowRank

# Of less than this share of ‖ΔW‖², or with fewer entries over which float32's rounding evens out, what is left is too
# close a difference of two sums: it is measured entry by entry.
_TOLD_APART, _MANY = 0.01, 1 << 20
FIT = 0.5  # passes that fitting is worth, for `truncated_svd` to count on


@dataclass(frozen=True)
class Fitted:
    """ΔW ≈ update, in the dtype of the file.

    Args:
        update: up (m, r), down (r, n), the directions in the order of falling size.
        squares: ‖scale·upᵢ·downᵢ‖_F² of each direction.
        error: ‖ΔW − scale·up@down‖_F.
    """

    update: LowRank
    squares: list[float]
    error: float


def fitted(delta: Tensor | Blocks, found: TruncatedSVD, scale: float, dtype: torch.dtype) -> Fitted:
    """Balanced factors √σ·U and √σ·Vᵀ of ΔW ≈ scale·up@down in `dtype`, with the error measured on what is stored.

    One side is rounded first; the other is the least-squares solution for what was stored. That takes one product
    with ΔW, which is half a pass more of power iteration, makes up for the rounding of the first side, and holds all
    that the error is made of: ‖ΔW‖² − 2⟨ΔW, s·BA⟩ + ‖s·BA‖², summed in float64 (docs/maths.md).

    >>> from lorasurgery.linalg.svd import exact_svd
    >>> delta = torch.diag(torch.tensor([4.0, 3.0]))
    >>> fitted(delta, exact_svd(delta).truncate(1), 1.0, torch.float32).error
    3.0

    Args:
        delta: (m, n), float32 or float64. found: Its leading directions, at least one.
        scale: What up@down will be multiplied by, positive.
    """
    matrix = blocked(delta)
    root = (found.s / scale).sqrt().to(found.u)
    turned = matrix.shape[0] > matrix.shape[1]  # the side that the Krylov basis knows better is the longer one
    kept = ((found.u if turned else found.vt.mT) * root).to(dtype)
    wide = kept.to(matrix.dtype)
    y = transposed_times(matrix, wide) if turned else times(matrix, wide)
    other, squares, rest = _other_side(y, kept, scale)
    up, down = (kept, other.mT) if turned else (other, kept.mT)
    order = squares.argsort(descending=True, stable=True)  # neighbours may have changed places by a little
    update = LowRank(up[:, order], down[order], scale)
    square = found.total + rest
    told = square > _TOLD_APART * found.total and matrix.shape[0] * matrix.shape[1] >= _MANY
    return Fitted(update, squares[order].tolist(), math.sqrt(square) if told else residual_norm(matrix, update))


def _other_side(y: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """The side (m, r) that fits `kept` (n, r) best, given Y = A·kept; the directions' squares; ‖A − s·B·Kᵀ‖² − ‖A‖²."""
    gram = products([kept], kept)
    size = gram.diagonal().sqrt()
    shrink = torch.where(size > 0, 1 / size, 0.0)  # a column may have come out as zero in a narrow dtype
    cosines = (shrink[:, None] * gram * shrink).fill_diagonal_(1)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_solve(identity, torch.linalg.cholesky(cosines))
    mix = shrink[:, None] * inverse * shrink / scale
    other = mixed([y], mix).to(kept.dtype)  # (m, r) @ (r, r) -> (m, r)
    both = products([y, other], other)
    inner, own = both[: len(gram)], both[len(gram) :]
    rest = float(scale**2 * (own * gram).sum() - 2 * scale * inner.diagonal().sum())
    return other, (scale**2 * own.diagonal() * gram.diagonal()).cpu(), rest
