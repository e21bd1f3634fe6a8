"""A block Krylov basis of a matrix, grown one block a pass: two GEMMs, then thin orthogonalisation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class BlockKrylov:
    """An orthonormal basis Q of span{AΩ, AAᵀAΩ, …} with Z = AᵀQ (Musco & Musco 2015, algorithm 2).

    Z serves twice: its Gram matrix gives the Ritz values of the basis, and A·Z is the next block.

    Args:
        matrix: A, (m, n) with m ≤ n.
        block: Columns a pass.
        seed: Of the Gaussian start Ω (n, block), drawn on the CPU so that all devices begin alike.
    """

    def __init__(self, matrix: Tensor, block: int, seed: int) -> None:
        self.a, self.block, self.passes = matrix, block, 0
        self._z: list[Tensor] = [_gaussian(matrix.shape[1], block, seed).to(matrix)]
        self._q: list[Tensor] = []
        self._wide: list[Tensor] = []  # Z in float64, for the Gram matrix
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Columns of the basis so far."""
        return self.block * len(self._q)

    def step(self) -> bool:
        """Add one block; True when the old basis already held all of A's range, to rounding."""
        y = self.a @ self._z[-1]  # (m, n) @ (n, b) -> (m, b)
        size = torch.linalg.vector_norm(y)
        if self._q:
            y = self._deflate(y)
        left = torch.linalg.vector_norm(y)
        # Householder, for blocks are often close to dependent; a second round after it, for "twice is enough".
        q = torch.linalg.qr(y).Q
        if self._q:
            q = torch.linalg.qr(self._deflate(q)).Q
        z = self.a.mT @ q  # (n, m) @ (m, b) -> (n, b)
        self._z = [z] if not self._q else [*self._z, z]
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
        u = torch.cat(self._q, 1) @ mix.to(self.a)  # (m, w) @ (w, r) -> (m, r)
        v = torch.cat(self._z, 1) @ (mix * shrink).to(self.a)  # (n, w) @ (w, r) -> (n, r)
        return u, s, v

    def _deflate(self, y: Tensor) -> Tensor:
        for q in self._q:
            y = y - q @ (q.mT @ y)  # (m, b) @ ((b, m) @ (m, b)) -> (m, b)
        return y

    def _grow(self, z: Tensor) -> None:
        """Extend the Gram matrix ZᵀZ by one block, in float64 so that small σ² beside σ₁² are not lost."""
        if z.device.type == "mps":  # has no float64
            z = z.cpu()
        self._wide.append(z.to(torch.float64))
        new = torch.cat([old.mT @ self._wide[-1] for old in self._wide]).cpu()
        width = self._gram.shape[0]
        gram = torch.empty(width + self.block, width + self.block, dtype=torch.float64)
        gram[:width, :width] = self._gram
        gram[:, width:] = new
        gram[width:, :] = new.mT
        self._gram = gram


@lru_cache(maxsize=4)
def _gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """The random start; a model has many matrices of one shape, and drawing it anew takes as long as a GEMM."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
