"""One tensor in two checkpoints, and what its blocks come to: equal, apart by rounding alone, or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.same import same_bytes, same_tensors
from lorasurgery.engine.buffers import Arena, Buffers, spans
from lorasurgery.engine.threads import parallel_for, scratch
from lorasurgery.linalg.blocks import InMemory, Streamed
from lorasurgery.linalg.norms import summed
from lorasurgery.linalg.rounding import is_finite, same_but_rounded
from lorasurgery.lowrank import widened

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class TensorPair:
    """A tensor in both checkpoints, or one expert's slice of a three-dimensional one.

    Args:
        old: Floating tensors of the same shape.
        new: Floating tensors of the same shape.
    """

    old: TensorInfo
    new: TensorInfo
    expert: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns), all but the first axis taken as one."""
        shape = self.old.shape if self.expert is None else self.old.shape[1:]
        return (shape[0], prod(shape[1:])) if shape else (1, 1)


class Found(NamedTuple):
    """What became of some pieces: ΔW, None where none of them changed, and which differ by rounding alone (ΔW is 0)."""

    delta: InMemory | Streamed | None
    rounding: tuple[bool, ...]


class Verdict:
    """What the blocks of a piece come to: equal, apart by rounding alone, or changed. Any thread may add to it."""

    def __init__(self, piece: TensorPair, *, keep_rounding: bool) -> None:
        self._dtypes = torch_dtype(piece.old.dtype), torch_dtype(piece.new.dtype)
        self._mixed, self._keep = piece.old.dtype != piece.new.dtype, keep_rounding
        self.changed = self._apart = False

    @property
    def rounding(self) -> bool:
        """Whether values differ, and none by more than rounding."""
        return self._apart and not self.changed

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take a block in which bytes differ; after the first that changed, none is looked at any more."""
        if self.changed or (self._mixed and torch.equal(before, after)):
            return
        if self._mixed and not self._keep and same_but_rounded(before, after, self._dtypes):
            self._apart = True
        else:
            self.changed = True


_BLOCK = 2 << 20  # bytes of one side: both sides and their difference stay in cache
_PINNED = 32 << 20  # the same for a GPU, where a copy must be worth its while


ByteRange = tuple[TensorInfo, int, int]
"""A tensor, the byte of it to begin with, and how many."""


@dataclass(frozen=True)
class _Rows:
    """Some rows of a difference, and what is made of them while they are in cache: norms, a copy in bfloat16."""

    values: Tensor
    norms: Tensor | None = None
    rounded: Tensor | None = None

    def part(self, rows: slice) -> _Rows:
        norms, rounded = (x[rows] if x is not None else None for x in (self.norms, self.rounded))
        return _Rows(self.values[rows], norms, rounded)

    def derive(self) -> None:
        if self.norms is not None:
            torch.linalg.vector_norm(self.values, dim=-1, out=self.norms)
        if self.rounded is not None:
            self.rounded.copy_(self.values)

    def zero(self) -> None:
        for made in (self.values, self.norms, self.rounded):
            if made is not None:
                made.zero_()


class Difference:
    """Reads pairs of tensors into float32 memory that is used again; any thread may, several at once.

    Args:
        base: The two checkpoints.
        tuned: The two checkpoints.
        device: Where the difference is wanted.
        room: Bytes that all differences under way take together; beyond them, each gets memory of its own.
        coarse: Keep each rounded to bfloat16 as well, half as much again, for the products of a sketch.
        keep_rounding: Take a tensor that differs by its dtype's rounding alone for changed.
    """

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, device: torch.device, room: int = 0, *, coarse: bool = False,
        keep_rounding: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.tuned, self.device, self.coarse, self.keep = base, tuned, device, coarse, keep_rounding
        self._memory = Arena(room * 3 // 2 if coarse else room)  # of differences
        self._bytes = Buffers(device)  # of what is on its way to a GPU

    def read(self, *pieces: TensorPair) -> Found:
        """ΔW = new − old in float32 (float64 when either side is), tensors of equal width one above the other.

        Returns:
            (all rows, columns) on the device with its norm, to be given back when done with.
        """
        rows, columns, dtype = sum(p.size[0] for p in pieces), pieces[0].size[1], _wide(pieces)
        delta, rounded = self._take(rows, columns, dtype)
        norms = torch.zeros(rows, dtype=dtype, device=self.device)
        whole, first, blank, verdicts = _Rows(delta, norms, rounded), 0, [], []
        for piece in pieces:
            part, verdict = whole.part(slice(first, first + piece.size[0])), self._verdict(piece)
            equal = self._fill(part, piece, verdict)
            blank += equal if verdict.changed else [part]
            verdicts.append(verdict)
            first += piece.size[0]
        rounding = tuple(v.rounding for v in verdicts)
        if not any(v.changed for v in verdicts):
            self.give(InMemory(delta))
            return Found(None, rounding)
        for part in blank:
            part.zero()
        return Found(InMemory(delta, summed(norms), rounded), rounding)

    def streamed(self, piece: TensorPair, room: int) -> Found:
        """The same for a tensor that is too large for the memory allowed: read again for every pass over it.

        Args:
            room: Bytes that the rows at hand may take.
        """
        verdict = self._judge(piece)
        if not verdict.changed:
            return Found(None, (verdict.rounding,))
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
            for equal in self._fill(_Rows(part), piece, first=wanted.start):
                equal.zero()
            return part

        delta = Streamed(make, (rows, columns), dtype, self.device, room, coarse=self._rounds(dtype))
        return Found(delta, (False,))

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
        return same_tensors(self.base, old, self.tuned, new, self._bytes)

    def _verdict(self, piece: TensorPair) -> Verdict:
        return Verdict(piece, keep_rounding=self.keep)

    def _judge(self, piece: TensorPair) -> Verdict:
        """Look at both sides, a few rows at a time, as far as the first rows that changed."""
        verdict, (rows, columns), step = self._verdict(piece), piece.size, self._step(piece)

        def look(start: int) -> None:
            if not verdict.changed:
                out = torch.empty(min(step, rows - start), columns, dtype=_wide((piece,)), device=self.device)
                self._block(out, piece, start, columns, verdict)

        if piece.old.dtype != piece.new.dtype:
            parallel_for(look, range(0, rows, step))
        else:
            verdict.changed = not self.same_bytes(piece.old, piece.new)
        return verdict

    def _fill(self, delta: _Rows, piece: TensorPair, verdict: Verdict | None = None, first: int = 0) -> list[_Rows]:
        """Write one piece's difference, its rows from `first` on, and what else is wanted of the rows.

        Returns:
            The parts where all bytes are equal: they are not written to, for memory that is not used costs nothing.
        """
        rows, columns = piece.size
        first += (piece.expert or 0) * rows
        step = self._step(piece)
        equal: list[_Rows] = []

        def work(start: int) -> None:
            part = delta.part(slice(start, start + step))
            if self._block(part.values, piece, first + start, columns, verdict):
                part.derive()
            else:
                equal.append(part)

        parallel_for(work, range(0, delta.values.shape[0], step))
        return equal

    def _step(self, piece: TensorPair) -> int:
        """Rows that are read at a time."""
        limit = _BLOCK if self.device.type == "cpu" else _PINNED
        return max(1, limit // max(1, piece.size[1] * max(_itemsize(piece.old), _itemsize(piece.new))))

    def _block(self, out: Tensor, piece: TensorPair, first: int, columns: int, verdict: Verdict | None) -> bool:
        """Some rows of both sides, judged and subtracted; False, and nothing written, where all bytes are equal."""
        start, count, shape = first * columns, out.numel(), out.shape
        old, new = ((info, start * _itemsize(info), count * _itemsize(info)) for info in (piece.old, piece.new))
        with self._both(old, new) as (before, after):
            if piece.old.dtype == piece.new.dtype and same_bytes(before, after):
                return False
            lower = before.view(torch_dtype(piece.old.dtype)).view(shape).to(out.device, non_blocking=True)
            upper = after.view(torch_dtype(piece.new.dtype)).view(shape).to(out.device, non_blocking=True)
            below = scratch(out, out.dtype, 1)[0].copy_(lower)
            out.copy_(upper)
            if verdict is not None:
                verdict.add(below, out)
            out.sub_(below)
            if out.device.type == "cuda":
                torch.cuda.current_stream(out.device).synchronize()  # before the pinned memory is lent again
        return True

    @contextmanager
    def _both(self, old: ByteRange, new: ByteRange) -> Iterator[tuple[Tensor, Tensor]]:
        """Some bytes of each side, in memory that is lent."""
        lent = [self._bytes.take(size) for _, _, size in (old, new)]
        try:
            for side, buffer, (info, start, size) in zip((self.base, self.tuned), lent, (old, new), strict=True):
                side.fill(info.name, buffer[:size].numpy().data, start)
            yield lent[0][: old[2]], lent[1][: new[2]]
        finally:
            for buffer in lent:
                self._bytes.give(buffer)

    def _take(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Memory for a difference, and for its rounded copy where one is wanted, in one stretch."""
        if self.device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=self.device), None
        size = rows * columns * dtype.itemsize
        if not self._rounds(dtype):
            return self._memory.take(size).view(dtype).view(rows, columns), None
        values, rounded = self._memory.take(size + size // 2).tensor_split((size,))
        return values.view(dtype).view(rows, columns), rounded.view(torch.bfloat16).view(rows, columns)

    def _rounds(self, dtype: torch.dtype) -> bool:
        return self.coarse and dtype == torch.float32


def _wide(pieces: tuple[TensorPair, ...]) -> torch.dtype:
    dtypes = {info.dtype for piece in pieces for info in (piece.old, piece.new)}
    return torch.float64 if "F64" in dtypes else torch.float32


def _itemsize(info: TensorInfo) -> int:
    return torch_dtype(info.dtype).itemsize


def count_nonfinite(model: Checkpoint, info: TensorInfo) -> int:
    """How many values of a tensor are NaN or infinite; it is read in pieces, several at a time."""
    dtype, counts = torch_dtype(info.dtype), []

    def look(span: tuple[int, int]) -> None:
        raw = bytearray(span[1])
        model.fill(info.name, memoryview(raw), span[0])
        values = torch.frombuffer(raw, dtype=dtype)
        if not is_finite(values):
            counts.append(int((~torch.isfinite(values.to(widened(dtype)))).sum()))

    parallel_for(look, spans(info.nbytes))
    return sum(counts)
