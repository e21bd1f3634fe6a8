"""Factors of very many small modules, held until they are written: torch takes half a kilobyte for any tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.lowrank import LowRank

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALL = 4096  # bytes of both factors; above that a tensor's own memory does not matter


@dataclass(frozen=True, slots=True)
class CompactFactors:
    """A LowRank as bytes.

    >>> import torch
    >>> small = compacted(LowRank(torch.ones(3, 1), torch.zeros(1, 2), 0.5))
    >>> small.shape, small.rank, small.scale, small.open().up.tolist()
    ((3, 2), 1, 0.5, [[1.0], [1.0], [1.0]])

    Args:
        data: up (out, r), then down (r, in), row by row.
        rows: out.
        rank: r.
        columns: in.
        scale: As the LowRank's.
        dtype: Of both factors.
    """

    data: bytes
    rows: int
    rank: int
    columns: int
    scale: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of ΔW."""
        return self.rows, self.columns

    def open(self) -> LowRank:
        """The factors as tensors, in memory of their own."""
        end = self.rows * self.rank * self.dtype.itemsize
        up = _tensor(self.data[:end], (self.rows, self.rank), self.dtype)
        down = _tensor(self.data[end:], (self.rank, self.columns), self.dtype)
        return LowRank(up, down, self.scale)


def compacted(update: LowRank) -> LowRank | CompactFactors:
    """Small factors as bytes, and large ones as they are."""
    from lorasurgery.checkpoint.writer import as_bytes

    (rows, columns), rank, dtype = update.shape, update.rank, update.up.dtype
    if (rows + columns) * rank * dtype.itemsize > SMALL or update.down.dtype != dtype:
        return update
    data = b"".join((as_bytes(update.up), as_bytes(update.down)))
    return CompactFactors(data, rows, rank, columns, update.scale, dtype)


def _tensor(data: bytes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    import torch

    from lorasurgery.checkpoint.writer import as_bytes

    tensor = torch.empty(shape, dtype=dtype)
    as_bytes(tensor)[:] = data
    return tensor
