"""A block Krylov basis of a matrix, grown one block a pass: two GEMMs, then thin orthogonalisation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lorasurgery.linalg.blocks import Blocks, blocked, times, transposed_times

_FEW = 1024  # rows of thin matrices that are widened at once
_DEPENDENT = 1e-6  # a column this much shorter once the others' part is taken out: Gram matrices lose its direction


class BlockKrylov:
    """An orthonormal basis Q of span{AΩ, AAᵀAΩ, …} with Z = AᵀQ (Musco & Musco 2015, algorithm 2).

    Z serves twice: its Gram matrix gives the Ritz values of the basis, and A·Z is the next block.

    Args:
        matrix: A or Aᵀ, whichever way it lies; the basis is that of its shorter side.
        block: Columns a pass.
        seed: Of the Gaussian start Ω (n, block), drawn on the CPU so that all devices begin alike.
    """

    def __init__(self, matrix: Tensor | Blocks, block: int, seed: int) -> None:
        self.a, self.block, self.passes = blocked(matrix), block, 0
        self.tall = self.a.shape[0] > self.a.shape[1]
        self._start = _gaussian(max(self.a.shape), block, seed)
        self._z: list[Tensor] = []
        self._q: list[Tensor] = []
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Columns of the basis so far."""
        return sum(q.shape[1] for q in self._q)

    def step(self) -> bool:
        """Add one block; True when the old basis already held all of A's range, to rounding."""
        last = self._z[-1] if self._z else self._start.to(self.a.device, self.a.dtype)
        y = transposed_times(self.a, last) if self.tall else times(self.a, last)  # A @ (n, b) -> (m, b)
        size = float(torch.linalg.vector_norm(y))
        y = self._deflate(y)
        left = float(torch.linalg.vector_norm(y))
        q = self._orthonormal(y, size)
        self.passes += 1
        if not q.shape[1]:
            return True
        z = times(self.a, q) if self.tall else transposed_times(self.a, q)  # Aᵀ @ (m, b) -> (n, b)
        self._z.append(z)
        self._q.append(q)
        self._grow(z)
        return left <= self._noise * size

    def squares(self) -> list[float]:
        """The Ritz values σ̂² of the basis, falling; each is at most its σ²."""
        values, vectors = torch.linalg.eigh(self._gram)
        self._ritz = values.flip(0).clamp(min=0), vectors.flip(1)
        found: list[float] = self._ritz[0].tolist()
        return found

    def ritz(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, rank), σ̂ (rank,) in float64 and falling, V (n, rank) with U·diag(σ̂)·Vᵀ = UUᵀA.

        To be called after squares(); σ̂ = 0 gives a column of zeros in V.
        """
        squares, vectors = self._ritz
        s = squares[:rank].sqrt()
        mix = vectors[:, :rank]
        shrink = torch.where(s > 0, 1 / s, 0.0)
        return _mixed(self._q, mix), s, _mixed(self._z, mix * shrink)

    def _deflate(self, y: Tensor) -> Tensor:
        for q in self._q:
            y = y - q @ (q.mT @ y)  # (m, b) @ ((b, m) @ (m, b)) -> (m, b)
        return y

    @property
    def _noise(self) -> float:
        """What rounding leaves of a block that the basis holds already, beside the block."""
        return 8 * torch.finfo(self.a.dtype).eps

    def _orthonormal(self, y: Tensor, size: float) -> Tensor:
        """An orthonormal basis of what y adds to the blocks before, and orthogonal to them: "twice is enough".

        By Cholesky factors of Gram matrices (CholeskyQR2: Fukaya et al. 2014), all products. Of a block whose columns
        depend on each other or on those before, as late ones of a low-rank matrix do, only directions above rounding
        stay; the others would be noise within the space that is there already.

        Args:
            size: ‖y‖ before the blocks before were taken out.
        """
        q = _independent(y, self._noise * size)
        return _independent(self._deflate(q), 0.5) if q.shape[1] else q

    def _grow(self, z: Tensor) -> None:
        """Extend the Gram matrix ZᵀZ by one block, in float64 so that small σ² beside σ₁² are not lost."""
        new = _products(self._z, z).cpu()
        old, width = self._gram.shape[0], self._gram.shape[0] + z.shape[1]
        gram = torch.empty(width, width, dtype=torch.float64)
        gram[:old, :old] = self._gram
        gram[:, old:] = new
        gram[old:, :] = new.mT
        self._gram = gram


def _independent(y: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span y's, but for directions in which y is no longer than `floor`."""
    gram = _products([y], y)
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
    q: Tensor = y @ mix.to(y)
    return q


def _mixed(parts: list[Tensor], mix: Tensor) -> Tensor:
    """[parts] @ mix, part by part: (m, w) @ (w, r) -> (m, r)."""
    rows = torch.split(mix, [part.shape[1] for part in parts])
    out = parts[0] @ rows[0].to(parts[0])
    for part, some in zip(parts[1:], rows[1:], strict=True):
        out.addmm_(part, some.to(part))
    return out


def _products(left: list[Tensor], right: Tensor) -> Tensor:
    """[left]ᵀ @ right in float64, a few rows at a time so that no wider copy ever leaves the cache."""
    if right.device.type == "mps":  # has no float64
        left, right = [x.cpu() for x in left], right.cpu()
    step = _FEW if right.device.type == "cpu" else right.shape[0]
    total = right.new_zeros(sum(x.shape[1] for x in left), right.shape[1], dtype=torch.float64)
    for start in range(0, right.shape[0], step):
        rows = slice(start, start + step)
        wide = right[rows].to(torch.float64)
        many = torch.cat([wide if x is right else x[rows].to(torch.float64) for x in left], 1)
        total.addmm_(many.mT, wide)  # (w, f) @ (f, b) -> (w, b)
    return total


@lru_cache(maxsize=4)
def _gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """The random start; a model has many matrices of one shape, and drawing it anew takes as long as a GEMM."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
