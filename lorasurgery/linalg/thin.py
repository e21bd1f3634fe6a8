"""Thin matrices, a few columns wide: products and orthonormal columns; QR by the Gram matrix where that is safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.engine.threads import parallel_for
from lorasurgery.errors import SurgeryError

NOT_FINITE = "holds values that are not finite (NaN or infinity); repair the adapter first"
TOO_LARGE = "holds values beyond 1e150, which can't be computed with"
# Cholesky pivots are the columns' distances from the span of those before them; above these, Q is orthonormal to
# about 1e-9 in float64 and 1e-5 in float32.
_SAFE_PIVOT = {torch.float64: 1e-3, torch.float32: 0.1}
_BLOCK = 256  # columns of a Gram matrix made at once: only its lower blocks need arithmetic


@dataclass(frozen=True)
class Thin:
    """A = Q·R·diag(norms), with Q given either as it is or as A·diag(1/norms)·R⁻¹, which is never formed.

    Attributes:
        rows: Aᵀ (R, m); the factors lie nearly so in memory.
        norms: of the columns of A, (R,) on the CPU.
        q: Q (m, min(m, R)), or None.
        r: R (min(m, R), R), upper triangular with unit columns, on the CPU.
    """

    rows: Tensor
    norms: Tensor
    q: Tensor | None
    r: Tensor

    def times(self, mix: Tensor) -> Tensor:
        """(Q @ mix)ᵀ for mix (min(m, R), k) on the CPU: (k, m) on the rows' device."""
        if self.q is not None:
            return mix.mT.to(self.q) @ self.q.mT
        small = torch.linalg.solve_triangular(self.r, mix, upper=True) / _divisor(self.norms)[:, None]
        found: Tensor = small.mT.to(self.rows) @ self.rows  # (k, R) @ (R, m) -> (k, m)
        return found

    def coordinates(self, others: Tensor) -> Tensor:
        """Qᵀ @ Xᵀ for X (k, m) in float64 on the rows' device: (min(m, R), k) on the CPU."""
        if self.q is not None:
            return (self.q.mT.to(others) @ others.mT).cpu()
        inner = (self.rows.to(others) @ others.mT).cpu() / _divisor(self.norms).to(torch.float64)[:, None]
        found: Tensor = torch.linalg.solve_triangular(self.r.mT.to(torch.float64), inner, upper=False)
        return found


def thin_qr(rows: Tensor) -> Thin:
    """Q, R and norms of a matrix A (m, R), given as Aᵀ in float32 or float64.

    The Gram matrix needs a third of Householder's time, and loses digits only where columns are nearly dependent; its
    Cholesky pivots tell, and then Householder does it in float64 (Golub & Van Loan, section 5.2). A column of zeros
    has norm 0 and any direction.

    Raises:
        SurgeryError: a value is NaN or infinite.

    >>> thin = thin_qr(2 * torch.eye(3, dtype=torch.float64)[:2])
    >>> torch.equal(thin.times(thin.r * thin.norms), thin.rows)
    True
    """
    gram = _gram(rows).cpu()
    norms = gram.diagonal().sqrt()
    if rows.shape[0] <= rows.shape[1] and bool(torch.isfinite(norms).all()):
        unit = gram.div_(_divisor(norms)).div_(_divisor(norms)[:, None])
        unit.diagonal().fill_(1)
        lower, failed = torch.linalg.cholesky_ex(unit)
        if not failed and bool((lower.diagonal() > _SAFE_PIVOT[rows.dtype]).all()):
            return Thin(rows, norms, None, lower.mT)
    rows = rows.to(torch.float64)
    norms = torch.linalg.vector_norm(rows, dim=1).cpu()
    if not bool(torch.isfinite(norms).all()):
        finite = bool(torch.isfinite(rows).all())
        raise SurgeryError(TOO_LARGE if finite else NOT_FINITE)
    q, r = torch.linalg.qr((rows / _divisor(norms).to(rows.device)[:, None]).mT)
    return Thin(rows, norms, q, r.cpu())


def _divisor(norms: Tensor) -> Tensor:
    return torch.where(norms == 0, 1.0, norms)


def _gram(rows: Tensor) -> Tensor:
    """AᵀA; of wide matrices only the blocks on and below the diagonal are multiplied."""
    width = rows.shape[0]
    if width <= _BLOCK:
        return rows @ rows.mT
    gram = rows.new_empty(width, width)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        gram[start:stop, :stop] = rows[start:stop] @ rows[:stop].mT
        gram[:stop, start:stop] = gram[start:stop, :stop].mT
    return gram


_FEW = 1024  # rows of a piece: it stays in cache, widened too
_DEPENDENT = 1e-6  # a column this much shorter once the others' part is taken out: Gram matrices lose its direction


def products(left: list[Tensor], right: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[left]ᵀ @ right in `dtype`, summed from the first rows down.

    >>> products([torch.ones(3, 1), torch.eye(3)[:, :1]], torch.ones(3, 1)).tolist()
    [[3.0], [1.0]]

    Args:
        left: (m, wᵢ) each, any floating dtype.
        right: (m, b).

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

    parallel_for(multiply, range(len(pieces)))
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

    parallel_for(multiply, _pieces(out))
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
