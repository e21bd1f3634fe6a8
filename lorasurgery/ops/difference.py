"""ΔW of one tensor in two checkpoints, read and subtracted block by block, so that each byte is touched once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from lorasurgery.checkpoint.buffers import Arena, Buffers
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.linalg.blocks import InMemory, Streamed
from lorasurgery.linalg.norms import summed
from lorasurgery.linalg.threads import each, scratch

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.checkpoint.reader import Checkpoint

_BLOCK = 2 << 20  # bytes of one side: both sides and their difference stay in cache
_PINNED = 32 << 20  # the same for a GPU, where a copy must be worth its while


Part = tuple[TensorInfo, int, int]
"""A tensor, the byte of it to begin with, and how many."""


@dataclass(frozen=True)
class Piece:
    """A tensor in both checkpoints, or one expert's slice of a three-dimensional one.

    Args:
        old, new: Floating tensors of the same shape.
    """

    old: TensorInfo
    new: TensorInfo
    expert: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns), all but the first axis taken as one."""
        shape = self.old.shape if self.expert is None else self.old.shape[1:]
        return (shape[0], prod(shape[1:])) if shape else (1, 1)


class Difference:
    """Reads pairs of tensors into float32 memory that is used again; any thread may, several at once.

    Args:
        base, tuned: The two checkpoints.
        device: Where the difference is wanted.
        room: Bytes that all differences under way take together; beyond them, each gets memory of its own.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, device: torch.device, room: int = 0) -> None:
        self.base, self.tuned, self.device = base, tuned, device
        self._memory = Arena(room)  # of differences
        self._bytes = Buffers(device)  # of what is on its way to a GPU

    def read(self, *pieces: Piece) -> InMemory | None:
        """ΔW = new − old in float32 (float64 when either side is), tensors of equal width one above the other.

        Returns:
            (all rows, columns) on the device with its norm, to be given back when done with; None when no byte differs
            in any.
        """
        rows, columns, dtype = sum(p.size[0] for p in pieces), pieces[0].size[1], _wide(pieces)
        delta = self._take(rows * columns, dtype).view(rows, columns)
        norms = torch.zeros(rows, dtype=dtype, device=self.device)
        parts = zip(_split(delta, pieces), _split(norms, pieces), pieces, strict=True)
        equal = [found for part, own, p in parts for found in self._fill(part, own, p)]
        if sum(part.shape[0] for part in equal) == rows:
            self.give(InMemory(delta))
            return None
        for part in equal:
            part.zero_()
        return InMemory(delta, summed(norms))

    def streamed(self, piece: Piece, room: int) -> Streamed | None:
        """The same for a tensor that is too large for the memory allowed: read anew for every pass over it.

        Args:
            room: Bytes that the rows at hand may take.
        """
        if self.same_bytes(piece.old, piece.new):
            return None
        rows, columns = piece.size
        dtype, held = _wide((piece,)), torch.empty(0)

        def make(wanted: slice) -> Tensor:
            nonlocal held
            if self.device.type == "cuda":  # other streams fill it, while products of it may be queued on this one
                torch.cuda.current_stream(self.device).synchronize()
            size = (wanted.stop - wanted.start) * columns
            if held.numel() < size:
                held = torch.empty(size, dtype=dtype, device=self.device)
            part = held[:size].view(-1, columns)
            for equal in self._fill(part, None, piece, wanted.start):
                equal.zero_()
            return part

        return Streamed(make, (rows, columns), dtype, self.device, room)

    def expect(self, old: TensorInfo, new: TensorInfo) -> None:
        """Say that both sides of a tensor will be read soon."""
        self.base.expect(old.name)
        self.tuned.expect(new.name)

    def give(self, delta: InMemory | None) -> None:
        """Take the memory of a difference back."""
        if delta is not None and delta.device.type == "cpu":
            self._memory.give(delta.matrix)

    def same_bytes(self, old: TensorInfo, new: TensorInfo) -> bool:
        """Whether two tensors of any dtype are the same, byte for byte."""
        if old.dtype != new.dtype or old.shape != new.shape:
            return False
        starts = range(0, old.nbytes, _BLOCK)
        same = [True] * len(starts)

        def compare(i: int) -> None:
            if all(same):
                size = min(_BLOCK, old.nbytes - starts[i])
                with self._both((old, starts[i], size), (new, starts[i], size)) as (before, after):
                    same[i] = _same(before, after)

        each(compare, range(len(starts)))
        return all(same)

    def _fill(self, delta: Tensor, norms: Tensor | None, piece: Piece, first: int = 0) -> list[Tensor]:
        """Write one piece's difference, its rows from `first` on, and the norms of the rows.

        Returns:
            The parts where all bytes are equal: they are not written to, for memory that is not used costs nothing.
        """
        rows, columns = piece.size
        first += (piece.expert or 0) * rows
        limit = _BLOCK if self.device.type == "cpu" else _PINNED
        step = max(1, limit // max(1, columns * max(_itemsize(piece.old), _itemsize(piece.new))))
        equal: list[Tensor] = []

        def work(start: int) -> None:
            part = delta[start : start + step]
            if not self._block(part, piece, first + start, columns):
                equal.append(part)
            elif norms is not None:
                torch.linalg.vector_norm(part, dim=-1, out=norms[start : start + step])

        each(work, range(0, delta.shape[0], step))
        return equal

    def _block(self, out: Tensor, piece: Piece, first: int, columns: int) -> bool:
        """Some rows of both sides, subtracted; False, and nothing written, where all bytes are equal."""
        start, count, shape = first * columns, out.numel(), out.shape
        old, new = ((info, start * _itemsize(info), count * _itemsize(info)) for info in (piece.old, piece.new))
        with self._both(old, new) as (before, after):
            if piece.old.dtype == piece.new.dtype and _same(before, after):
                return False
            lower = before.view(torch_dtype(piece.old.dtype)).view(shape).to(out.device, non_blocking=True)
            upper = after.view(torch_dtype(piece.new.dtype)).view(shape).to(out.device, non_blocking=True)
            out.copy_(upper).sub_(scratch(out, out.dtype, 1)[0].copy_(lower))
            if out.device.type == "cuda":
                torch.cuda.current_stream(out.device).synchronize()  # before the pinned memory is lent again
        return True

    @contextmanager
    def _both(self, old: Part, new: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Some bytes of each side, in memory that is lent."""
        lent = [self._bytes.take(size) for _, _, size in (old, new)]
        try:
            for side, buffer, (info, start, size) in zip((self.base, self.tuned), lent, (old, new), strict=True):
                side.fill(info.name, buffer[:size].numpy().data, start)
            yield lent[0][: old[2]], lent[1][: new[2]]
        finally:
            for buffer in lent:
                self._bytes.give(buffer)

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.empty(size, dtype=dtype, device=self.device)
        return self._memory.take(size * dtype.itemsize).view(dtype)


def _wide(pieces: tuple[Piece, ...]) -> torch.dtype:
    dtypes = {info.dtype for piece in pieces for info in (piece.old, piece.new)}
    return torch.float64 if "F64" in dtypes else torch.float32


def _split(whole: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.split(whole, [p.size[0] for p in pieces])
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether bytes are equal, compared eight at a time."""
    whole = a.numel() // 8 * 8
    wide = torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64))
    return wide and torch.equal(a[whole:], b[whole:])


def _itemsize(info: TensorInfo) -> int:
    return torch_dtype(info.dtype).itemsize
