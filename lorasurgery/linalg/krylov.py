"""A block Krylov basis of a matrix, grown one block a pass: two GEMMs, then thin orthogonalisation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lorasurgery.linalg.blocks import Blocks, blocked, times, transposed_times
from lorasurgery.linalg.coarse import Coarse
from lorasurgery.linalg.columns import independent, mixed, products, without


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
        y = self._product(self._next(), self.tall)  # A @ (n, b) -> (m, b)
        size = float(torch.linalg.vector_norm(y))
        y = without(y, self._q)
        left = float(torch.linalg.vector_norm(y))
        q = self._orthonormal(y, size)
        self.passes += 1
        if not q.shape[1]:
            return True
        z = self._product(q, not self.tall)  # Aᵀ @ (m, b) -> (n, b)
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
        return mixed(self._q, mix), s, mixed(self._z, mix * shrink)

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        if isinstance(self.a, Coarse):
            return self.a.transposed_times(x) if transposed else self.a.times(x)
        return transposed_times(self.a, x) if transposed else times(self.a, x)

    def _next(self) -> Tensor:
        """What A is multiplied with next: the start, then Z.

        Where products are rounded, Z's own singular directions: a column of many would drown the small in the large
        one's rounding, and what the next block adds is small.
        """
        if not self._z:
            return self._start.to(self.a.device, self.a.dtype)
        z = self._z[-1]
        if not isinstance(self.a, Coarse):
            return z
        squares, vectors = torch.linalg.eigh(self._gram[-z.shape[1] :, -z.shape[1] :])
        return mixed([z], vectors * torch.where(squares > 0, squares, 1.0).rsqrt())

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
        q = independent(y, self._noise * size)
        return independent(without(q, self._q), 0.5) if q.shape[1] else q

    def _grow(self, z: Tensor) -> None:
        """Extend the Gram matrix ZᵀZ by one block, in float64 so that small σ² beside σ₁² are not lost."""
        new = products(self._z, z).cpu()
        old, width = self._gram.shape[0], self._gram.shape[0] + z.shape[1]
        gram = torch.empty(width, width, dtype=torch.float64)
        gram[:old, :old] = self._gram
        gram[:, old:] = new
        gram[old:, :] = new.mT
        self._gram = gram


@lru_cache(maxsize=4)
def _gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """The random start; a model has many matrices of one shape, and drawing it anew takes as long as a GEMM."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(_within(seed)), dtype=torch.float32)


def _within(seed: int) -> int:
    """A seed as torch takes it: 64 bits, with or without a sign."""
    return seed if -(1 << 63) <= seed < 1 << 64 else seed % (1 << 64)
