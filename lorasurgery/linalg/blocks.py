"""A matrix in blocks of rows, in memory or read again for every pass, and the products that a decomposition needs.

The blocks' size depends on the matrix alone, never on threads or memory: all of them give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lorasurgery.engine.threads import parallel_for

_BLOCK = 4 << 20  # elements: large enough that a product of it is worth a thread's while
_COLUMNS, _ROWS = 1024, 64  # of a tile of Mᵀ; blocks are whole multiples of its rows


class Blocks(Protocol):
    """M (m, n), seen through spans of its rows that follow one another.

    Attributes:
        shape: (m, n).
        dtype: float32 or float64.
        device: Where the spans are.
        coarse: Whether a sketch had better be made from M rounded to bfloat16.
        total: ‖M‖_F², once it is known.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    coarse: bool
    total: float | None

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows from there on); each starts where a block does, and is gone when the next one comes."""
        ...


class InMemory:
    """A matrix that is there already: one span.

    >>> times(InMemory(torch.eye(2)), torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]

    Args:
        matrix: (m, n), float32 or float64, on any device.
        total: ‖M‖_F², where it was summed up already while the matrix was made.
        rounded: M in bfloat16, where a sketch is to be made from that.
    """

    def __init__(self, matrix: Tensor, total: float | None = None, rounded: Tensor | None = None) -> None:
        self.matrix, self.total, self.rounded, self.coarse = matrix, total, rounded, rounded is not None
        self.shape, self.dtype, self.device = (matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """All of it."""
        yield 0, self.matrix


class Streamed:
    """A matrix too large for the memory allowed: its rows are made again whenever they are asked for.

    Args:
        make: Given a slice of rows, M's rows; the memory may be that of the last call.
        room: Bytes that a span may take; a single block is always allowed.
        coarse: As M in memory would be: the bits are the same.
    """

    def __init__(
        self, make: Callable[[slice], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device,
        room: int, *, coarse: bool = False,
    ) -> None:  # fmt: skip
        self.make, self.shape, self.dtype, self.device, self.coarse = make, shape, dtype, device, coarse
        self.total: float | None = None
        block = block_rows(self) if device.type == "cpu" else _ROWS  # a GPU takes a span at once, whatever its height
        self.step = max(1, room // max(1, block * shape[1] * dtype.itemsize)) * block

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """As many rows at a time as there is room for."""
        for start in range(0, self.shape[0], self.step):
            yield start, self.make(slice(start, min(start + self.step, self.shape[0])))


def blocked(matrix: Tensor | Blocks) -> Blocks:
    """A tensor as blocks; blocks as they are."""
    return InMemory(matrix) if isinstance(matrix, Tensor) else matrix


def dense(matrix: Blocks) -> Tensor:
    """The whole matrix, made where it was not there."""
    if isinstance(matrix, InMemory):
        return matrix.matrix
    return torch.cat([span.clone() for _, span in matrix.spans()])


def block_rows(matrix: Blocks) -> int:
    """Rows of a block; a GPU takes all of them at once.

    >>> block_rows(InMemory(torch.empty(9, 1 << 16)))
    64
    """
    if matrix.device.type != "cpu":
        return max(1, matrix.shape[0])
    return max(1, _BLOCK // max(1, matrix.shape[1]) // 64) * 64


def over_rows(matrix: Blocks, work: Callable[[Tensor, slice], object]) -> None:
    """Call work(part, rows) for every block, several at a time: `part` is M's `rows`."""
    step = block_rows(matrix)
    for first, span in matrix.spans():
        stop = first + span.shape[0]
        pieces = [slice(start, min(start + step, stop)) for start in range(first, stop, step)]

        def on_block(rows: slice, first: int = first, span: Tensor = span) -> None:
            work(span[rows.start - first : rows.stop - first], rows)

        parallel_for(on_block, pieces)


def times(matrix: Blocks, x: Tensor) -> Tensor:
    """M @ x for x (n, k): (m, k)."""
    out = torch.empty(matrix.shape[0], x.shape[1], dtype=matrix.dtype, device=matrix.device)
    over_rows(matrix, lambda part, rows: torch.mm(part, x, out=out[rows]))  # (b, n) @ (n, k) -> (b, k)
    return out


def transposed_times(matrix: Blocks, y: Tensor) -> Tensor:
    """Mᵀ @ y for y (m, k): (n, k), summed from the first row down, a few rows of some columns at a time.

    Such a tile stays in a core's cache beside its sum, which lies the other way round: twice as fast as taller ones.
    """
    out = torch.zeros(y.shape[1], matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    on_cpu = matrix.device.type == "cpu"
    wide, tall = (_COLUMNS, _ROWS) if on_cpu else (matrix.shape[1], matrix.shape[0])
    stripes = range(0, matrix.shape[1], max(1, wide))
    for first, span in matrix.spans():

        def add(left: int, first: int = first, span: Tensor = span) -> None:
            columns = slice(left, left + wide)
            for start in range(0, span.shape[0], max(1, tall)):
                part = span[start : start + tall, columns]
                rows = slice(first + start, first + start + part.shape[0])
                out[:, columns].addmm_(y[rows].mT, part)  # (k, b) @ (b, c) -> (k, c)

        parallel_for(add, stripes)
    turned = torch.empty(matrix.shape[1], y.shape[1], dtype=matrix.dtype, device=matrix.device)

    def turn(left: int) -> None:
        turned[left : left + wide] = out[:, left : left + wide].mT

    parallel_for(turn, stripes)
    return turned
