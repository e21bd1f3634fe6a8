"""ΔW of one tensor in two checkpoints, read and subtracted block by block, so that each byte is touched once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.checkpoint.reader import Checkpoint

_BLOCK = 2 << 20  # bytes of one side: both sides and their difference stay in cache


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
    """Reads pairs of tensors into one float32 buffer that is used again for every pair.

    New memory costs a page fault every 4 KiB, which for large matrices takes longer than the arithmetic.

    Args:
        base, tuned: The two checkpoints.
        device: Where the difference is wanted.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, device: torch.device) -> None:
        self.base, self.tuned, self.device = base, tuned, device
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._blocks = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._other = ThreadPoolExecutor(1, "read-base")  # the two sides are read side by side

    def read(self, old: TensorInfo, new: TensorInfo) -> Tensor | None:
        """ΔW = new − old in float32 (float64 when either side is), or None when all bytes are equal.

        Args:
            old, new: Floating tensors of the same shape.

        Returns:
            (shape[0], the rest) on the device; it is overwritten by the next call.
        """
        return self.stack(Piece(old, new))

    def stack(self, *pieces: Piece) -> Tensor | None:
        """The same for several tensors of equal width, one above the other; None when nothing changed in any.

        Returns:
            (all rows, columns) on the device; it is overwritten by the next call.
        """
        rows, columns = sum(p.size[0] for p in pieces), pieces[0].size[1]
        delta = self._buffer(pieces, rows * columns).view(rows, columns)
        parts = torch.split(delta, [p.size[0] for p in pieces])
        same = [part for part, piece in zip(parts, pieces, strict=True) if not self._fill(part, piece)]
        if len(same) == len(pieces):
            return None
        for part in same:
            part.zero_()
        return delta

    def _fill(self, delta: Tensor, piece: Piece) -> bool:
        """Write one piece's difference; False, and nothing is written, when all bytes are equal."""
        old, new, (rows, columns) = piece.old, piece.new, piece.size
        step = max(1, _BLOCK // max(1, columns * _itemsize(new)))
        first = (piece.expert or 0) * rows
        equal = True
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            before, after = self._both(old, new, first + start, first + stop, columns)
            if equal and old.dtype == new.dtype and torch.equal(before, after):
                continue
            if equal:
                delta[:start].zero_()
                equal = False
            self._subtract(delta[start:stop], before, after, old, new)
        return not equal

    def prefetch(self, old: TensorInfo | None, new: TensorInfo) -> None:
        """Let the system read the next pair while this one is computed."""
        if old is not None:
            self.base.prefetch(old.name)
        self.tuned.prefetch(new.name)

    def same_bytes(self, old: TensorInfo, new: TensorInfo) -> bool:
        """Whether two tensors of any dtype are the same, byte for byte."""
        if old.dtype != new.dtype or old.shape != new.shape:
            return False
        size = old.nbytes
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            if not torch.equal(self._bytes(0, old, start, stop), self._bytes(1, new, start, stop)):
                return False
        return True

    def _subtract(self, out: Tensor, before: Tensor, after: Tensor, old: TensorInfo, new: TensorInfo) -> None:
        lower = before.view(torch_dtype(old.dtype)).view(out.shape).to(self.device)
        upper = after.view(torch_dtype(new.dtype)).view(out.shape).to(self.device)
        torch.sub(upper.to(out.dtype), lower.to(out.dtype), out=out)

    def _both(self, old: TensorInfo, new: TensorInfo, start: int, stop: int, columns: int) -> tuple[Tensor, Tensor]:
        before = self._other.submit(self._rows, 0, old, start, stop, columns)
        after = self._rows(1, new, start, stop, columns)
        return before.result(), after

    def _rows(self, side: int, info: TensorInfo, start: int, stop: int, columns: int) -> Tensor:
        size = columns * _itemsize(info)
        return self._bytes(side, info, start * size, stop * size)

    def _bytes(self, side: int, info: TensorInfo, start: int, stop: int) -> Tensor:
        if self._blocks[side].numel() < stop - start:
            self._blocks[side] = torch.empty(stop - start, dtype=torch.uint8)
        view = self._blocks[side][: stop - start]
        (self.tuned if side else self.base).fill(info.name, view.numpy().data, start)
        return view

    def _buffer(self, pieces: tuple[Piece, ...], size: int) -> Tensor:
        dtypes = {info.dtype for piece in pieces for info in (piece.old, piece.new)}
        wide = torch.float64 if "F64" in dtypes else torch.float32
        if wide not in self._scratch or self._scratch[wide].numel() < size:
            self._scratch.pop(wide, None)
            self._scratch[wide] = torch.empty(size, dtype=wide, device=self.device)
        return self._scratch[wide][:size]


def _itemsize(info: TensorInfo) -> int:
    return torch_dtype(info.dtype).itemsize
