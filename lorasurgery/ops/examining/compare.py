"""The arithmetic of diff on checkpoints: one tensor in two files, read and compared block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import DTYPE_BITS, TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.linalg.norms import norm_of
from lorasurgery.lowrank import widened
from lorasurgery.ops.extraction.difference import Difference

if TYPE_CHECKING:
    pass


_BLOCK = 1 << 20  # elements: the block, its difference and both sides stay near the cache


@dataclass(frozen=True)
class Compared:
    """What differs between two tensors: norms put together in float64; `share` counts elements. None for no numbers."""

    norm: float | None
    delta_norm: float | None
    largest: float | None
    share: float


class Comparer:
    """Compares tensors of two checkpoints in memory that does not grow with them.

    Args:
        a: The checkpoints.
        b: The checkpoints.
        device: Where the arithmetic is done.
    """

    def __init__(self, a: Checkpoint, b: Checkpoint, device: torch.device) -> None:
        self._sides, self._device = (a, b), device
        self._bytes = Difference(a, b, device)

    def compare(self, old: TensorInfo, new: TensorInfo) -> Compared | None:
        """Compare two tensors of one shape; None when every value is the same.

        A tensor in float16 whose values are all the same as in float32 is equal. Of integers and packed numbers only
        the share of values, or bytes, that differ is told.
        """
        if old.dtype == new.dtype and self._bytes.same_bytes(old, new):
            return None
        count = math.prod(old.shape)
        if not (old.is_float and new.is_float):
            return Compared(None, None, None, self._different_bytes(old, new))
        norm = delta = 0.0
        largest, different = 0.0, 0
        for start in range(0, count, _BLOCK):
            x, y = self._values(0, old, start, count), self._values(1, new, start, count)
            wide = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(wide), y.to(wide)
            gap = y - x
            norm = math.hypot(norm, norm_of(x))
            delta = math.hypot(delta, _distance(x, y, gap))
            different += int((gap != 0).sum())  # not-a-number differs from everything
            largest = max(float(gap.abs().max()), largest)  # in this order a not-a-number stays
        if not different:
            return None
        return Compared(norm, delta, largest, different / count)

    def _values(self, side: int, info: TensorInfo, start: int, count: int) -> Tensor:
        size = torch_dtype(info.dtype).itemsize
        raw = self._read(side, info, start * size, min(start + _BLOCK, count) * size)
        values = raw.view(torch_dtype(info.dtype)).to(self._device)
        return values.to(widened(values.dtype))

    def _read(self, side: int, info: TensorInfo, start: int, stop: int) -> Tensor:
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        self._sides[side].fill(info.name, buffer.numpy().data, start)
        return buffer

    def _different_bytes(self, old: TensorInfo, new: TensorInfo) -> float:
        if old.nbytes != new.nbytes:
            return 1.0
        width, different = max(1, DTYPE_BITS[old.dtype] // 8) if old.dtype == new.dtype else 1, 0
        for start in range(0, old.nbytes, _BLOCK * width):
            stop = min(start + _BLOCK * width, old.nbytes)
            unequal = self._read(0, old, start, stop) != self._read(1, new, start, stop)
            different += int(unequal.view(-1, width).any(1).sum())
        return different * width / old.nbytes


def _distance(x: Tensor, y: Tensor, gap: Tensor) -> float:
    """‖y − x‖; two finite numbers may lie further apart than their dtype goes."""
    found = norm_of(gap)
    if math.isfinite(found) or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        return found
    return norm_of(y.cpu().to(torch.float64) - x.cpu().to(torch.float64))
