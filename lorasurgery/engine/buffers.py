"""Memory for bytes on their way, used again and again: new memory costs a page fault every 4 KiB."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEP = 1 << 20
_PART = 2 << 20  # parts begin where a large page does
_SMALL = 64 << 10  # bytes that the allocator has at hand: such memory is not worth keeping
_LOOSE = 1.5  # times what is asked for: a buffer much larger than that is better given up


class Buffers:
    """Gives out one-dimensional uint8 tensors on the CPU and takes them back; any thread may.

    Args:
        device: Where the bytes go to or come from; for a GPU the memory is pinned, so that copies need not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A tensor of at least `size` bytes: the smallest free one, or a new one in place of one too small."""
        import torch

        if size <= _SMALL:
            with torch.inference_mode(False):
                return torch.empty(size, dtype=torch.uint8)
        with self._lock:
            fit = [b for b in self._free if size <= b.numel() <= max(_LOOSE * size, _STEP)]
            if fit:
                best = min(fit, key=lambda b: b.numel())
                self._free = [b for b in self._free if b is not best]
                return best
            if self._free:  # memory is bounded by what is lent: what does not fit makes room
                largest = max(self._free, key=lambda b: b.numel())
                self._free = [b for b in self._free if b is not largest]
                del largest
        with torch.inference_mode(False):
            return torch.empty(-(-size // _STEP) * _STEP, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor | None) -> None:
        """Take a tensor back."""
        if buffer is not None and buffer.numel() > _SMALL:
            with self._lock:
                self._free.append(buffer)


class Arena:
    """One stretch of memory, lent in parts of any size: large matrices and small ones take turns in the same pages.

    The system is asked for large pages, where it has them: a page fault every 2 MiB instead of every 4 KiB.

    >>> arena = Arena(1 << 20)
    >>> part = arena.take(500_000)
    >>> part.numel()
    500000
    >>> arena.give(part)

    Args:
        room: Bytes; they become real when they are first written to.
    """

    def __init__(self, room: int) -> None:
        self._room = -(-room // _PART) * _PART
        self._free = [(0, self._room)]  # (first byte, byte after the last), in order
        self._lent: dict[int, tuple[int, int]] = {}  # address -> its place
        self._lock = threading.Lock()
        self._whole: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """A uint8 tensor of `size` bytes; where no gap is as wide as that, memory of its own, and for few bytes too."""
        import torch

        if size <= _SMALL:
            with torch.inference_mode(False):
                return torch.empty(size, dtype=torch.uint8)
        wanted = max(1, -(-size // _PART)) * _PART
        with self._lock, torch.inference_mode(False):
            gap = next((gap for gap in self._free if gap[1] - gap[0] >= wanted), None)
            if gap is None:
                return _large_pages(wanted)[:size]
            i, (first, end) = self._free.index(gap), gap
            self._free[i : i + 1] = [(first + wanted, end)] if end - first > wanted else []
            if self._whole is None:
                self._whole = _large_pages(self._room)
            part = self._whole[first : first + size]
            self._lent[part.data_ptr()] = first, first + wanted
            return part

    def give(self, part: Tensor) -> None:
        """Take a part back: the tensor that was lent, or a view of all of it."""
        with self._lock:
            place = self._lent.pop(part.data_ptr(), None)
            if place is None:
                return
            joined: list[tuple[int, int]] = []
            for first, end in sorted([*self._free, place]):
                if joined and joined[-1][1] == first:
                    joined[-1] = joined[-1][0], end
                else:
                    joined.append((first, end))
            self._free = joined


def _large_pages(size: int) -> Tensor:
    import torch

    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # pages that are shared stay small
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def spans(nbytes: int, step: int = 8 << 20) -> Iterator[tuple[int, int]]:
    """(first byte, length) of the pieces in which bytes are read.

    >>> list(spans(20, 8))
    [(0, 8), (8, 8), (16, 4)]
    """
    return ((start, min(step, nbytes - start)) for start in range(0, nbytes, step))
