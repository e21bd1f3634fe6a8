"""A block Krylov basis of a matrix, grown one block a pass, in bfloat16 where the processor is made for that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor

from lorasurgery.engine.threads import parallel_for, scratch
from lorasurgery.linalg.blocks import Blocks, InMemory, block_rows, blocked, over_rows, times, transposed_times
from lorasurgery.linalg.thin import independent, mixed, products, without


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
    """The random start; a model has many matrices of one shape, and drawing it again takes as long as a GEMM."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(_within(seed)), dtype=torch.float32)


def _within(seed: int) -> int:
    """A seed as torch takes it: 64 bits, with or without a sign."""
    return seed if -(1 << 63) <= seed < 1 << 64 else seed % (1 << 64)


LEAST = 0.1  # ‖ΔW − USVᵀ‖/‖ΔW‖ from which on rounding adds less than 0.02% to it (docs/performance.md)
_COLUMNS = 2048  # of a tile of Mᵀ


class Coarse:
    """M (m, n) in bfloat16: products with float32 matrices, given in float32.

    >>> Coarse(InMemory(torch.eye(2))).times(torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]

    Args:
        matrix: On the CPU; where it has no rounded copy, every product rounds it again.
    """

    def __init__(self, matrix: Blocks) -> None:
        self.exact = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.coarse, self.total = True, matrix.total

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """Spans of the rounded copy, or of M itself."""
        if isinstance(self.exact, InMemory) and self.exact.rounded is not None:
            yield 0, self.exact.rounded
        else:
            yield from self.exact.spans()

    def times(self, x: Tensor) -> Tensor:
        """M @ x for x (n, k): (m, k), each sum rounded once."""
        out, narrow = x.new_empty(self.shape[0], x.shape[1]), x.to(torch.bfloat16)
        over_rows(self, lambda part, rows: out[rows].copy_(_rounded(part) @ narrow))  # (b, n) @ (n, k) -> (b, k)
        return out

    def transposed_times(self, y: Tensor) -> Tensor:
        """Mᵀ @ y for y (m, k): (n, k); sums over a block are rounded, then added in float32 from the first row down."""
        out, narrow = y.new_zeros(y.shape[1], self.shape[1]), y.mT.to(torch.bfloat16).contiguous()
        turned, step = y.new_empty(self.shape[1], y.shape[1]), block_rows(self)
        for first, span in self.spans():

            def add(left: int, first: int = first, span: Tensor = span) -> None:
                columns = slice(left, left + _COLUMNS)
                for start in range(0, span.shape[0], step):
                    part = _rounded(span[start : start + step, columns])
                    rows = slice(first + start, first + start + part.shape[0])
                    out[:, columns] += narrow[:, rows] @ part  # (k, b) @ (b, c) -> (k, c)
                turned[columns] = out[:, columns].mT

            parallel_for(add, range(0, self.shape[1], _COLUMNS))
        return turned


@cache
def pays(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 much faster than float32.

    >>> pays(torch.device("meta"))
    False
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # older versions have no public name for it
    if device.type != "cpu" or supported is None:
        return False
    return bool(supported() and torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call,unused-ignore]


def _rounded(part: Tensor) -> Tensor:
    if part.dtype == torch.bfloat16:
        return part
    return scratch(part, torch.bfloat16, 1)[0].copy_(part)
