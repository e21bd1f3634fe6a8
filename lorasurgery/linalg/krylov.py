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
        return self.block * len(self._q)

    def step(self) -> bool:
        """Add one block; True when the old basis already held all of A's range, to rounding."""
        last = self._z[-1] if self._z else self._start.to(self.a.device, self.a.dtype)
        y = transposed_times(self.a, last) if self.tall else times(self.a, last)  # A @ (n, b) -> (m, b)
        size = torch.linalg.vector_norm(y)
        y = self._deflate(y)
        left = torch.linalg.vector_norm(y)
        q = self._orthonormal(y)
        z = times(self.a, q) if self.tall else transposed_times(self.a, q)  # Aᵀ @ (m, b) -> (n, b)
        self._z.append(z)
        self._q.append(q)
        self.passes += 1
        self._grow(z)
        return bool(left <= 1e-6 * size)

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

    def _orthonormal(self, y: Tensor) -> Tensor:
        """An orthonormal basis of y's columns, and orthogonal to the blocks before: "twice is enough".

        By Cholesky factors of Gram matrices (CholeskyQR2: Fukaya et al. 2014), all products; blocks that are close
        to dependent, as late ones of a low-rank matrix are, by Householder.
        """
        q = _cholesky_q(y)
        if q is not None:
            q = _cholesky_q(self._deflate(q))
        if q is None:
            q = torch.linalg.qr(y).Q
            q = torch.linalg.qr(self._deflate(q)).Q if self._q else q
        return q

    def _grow(self, z: Tensor) -> None:
        """Extend the Gram matrix ZᵀZ by one block, in float64 so that small σ² beside σ₁² are not lost."""
        new = _products(self._z, z).cpu()
        width = self._gram.shape[0]
        gram = torch.empty(width + self.block, width + self.block, dtype=torch.float64)
        gram[:width, :width] = self._gram
        gram[:, width:] = new
        gram[width:, :] = new.mT
        self._gram = gram


def _cholesky_q(y: Tensor) -> Tensor | None:
    """y·R⁻¹ with RᵀR = yᵀy in float64; None where columns are too close to dependent for that."""
    gram = _products([y], y)
    lower, failed = torch.linalg.cholesky_ex(gram)
    kept = lower.diagonal() > _DEPENDENT * gram.diagonal().sqrt()
    if int(failed) or not bool(kept.all()):
        return None
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    q: Tensor = y @ inverse.mT.to(y)
    return q


def _mixed(parts: list[Tensor], mix: Tensor) -> Tensor:
    """[parts] @ mix, part by part: (m, w) @ (w, r) -> (m, r)."""
    block = parts[0].shape[1]
    out = parts[0] @ mix[:block].to(parts[0])
    for i, part in enumerate(parts[1:], 1):
        out.addmm_(part, mix[i * block : (i + 1) * block].to(part))
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
