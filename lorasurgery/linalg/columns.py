"""Thin matrices, a few columns wide: products and orthonormal columns, a few rows at a time on several threads."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.engine.threads import each

_FEW = 1024  # rows of a piece: it stays in cache, widened too
_DEPENDENT = 1e-6  # a column this much shorter once the others' part is taken out: Gram matrices lose its direction


def products(left: list[Tensor], right: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[left]ᵀ @ right in `dtype`, summed from the first rows down.

    >>> products([torch.ones(3, 1), torch.eye(3)[:, :1]], torch.ones(3, 1)).tolist()
    [[3.0], [1.0]]

    Args:
        left: (m, wᵢ) each, any floating dtype. right: (m, b).

    Returns:
        (Σwᵢ, b) on the device; on MPS, which has no float64, on the CPU.
    """
    if right.device.type == "mps" and dtype == torch.float64:
        left, right = [x.cpu() for x in left], right.cpu()
    pieces = _pieces(right)
    parts = [right.new_empty(0, dtype=dtype)] * len(pieces)

    def multiply(i: int) -> None:
        rows = pieces[i]
        wide = right[rows].to(dtype)
        parts[i] = torch.cat([(wide if x is right else x[rows].to(dtype)).mT @ wide for x in left])

    each(multiply, range(len(pieces)))
    total = right.new_zeros(sum(x.shape[1] for x in left), right.shape[1], dtype=dtype)
    for part in parts:
        total += part
    return total


def mixed(parts: list[Tensor], mix: Tensor) -> Tensor:
    """[parts] @ mix, part by part: (m, w) @ (w, r) -> (m, r), in the parts' dtype.

    >>> mixed([torch.ones(2, 1), torch.ones(2, 1)], torch.tensor([[1.0], [2.0]])).tolist()
    [[3.0], [3.0]]
    """
    coefficients = torch.split(mix.to(parts[0]), [part.shape[1] for part in parts])
    out = parts[0].new_empty(parts[0].shape[0], mix.shape[1])

    def multiply(rows: slice) -> None:
        torch.mm(parts[0][rows], coefficients[0], out=out[rows])
        for part, some in zip(parts[1:], coefficients[1:], strict=True):
            out[rows].addmm_(part[rows], some)

    each(multiply, _pieces(out))
    return out


def without(y: Tensor, basis: list[Tensor]) -> Tensor:
    """Y (m, b) less its part in the span of orthonormal columns, blocks (m, wᵢ): Y − QQᵀY.

    >>> without(torch.ones(2, 1), [torch.eye(2)[:, :1]]).tolist()
    [[0.0], [1.0]]
    """
    return y - mixed(basis, products(basis, y, y.dtype)) if basis else y


def independent(y: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span y's (m, b), but for directions in which y is no longer than `floor`.

    One round of CholeskyQR (Fukaya et al. 2014): columns nearly dependent come out orthonormal only at the second.

    >>> independent(torch.tensor([[2.0], [0.0]]), 0.0).tolist()
    [[1.0], [0.0]]
    """
    gram = products([y], y)
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal()
    safe = (pivots > floor) & (pivots > _DEPENDENT * gram.diagonal().sqrt())
    if not int(failed) and bool(safe.all()):
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        mix = torch.linalg.solve_triangular(lower, identity, upper=False).mT
    else:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > max(floor, _DEPENDENT * float(values[-1].clamp(min=0)) ** 0.5) ** 2
        mix = vectors[:, kept] / values[kept].sqrt()
    return mixed([y], mix)


def _pieces(matrix: Tensor) -> list[slice]:
    """Spans of rows; a GPU takes all at once."""
    step = _FEW if matrix.device.type == "cpu" else max(1, matrix.shape[0])
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
