"""Memory for bytes on their way, used again and again: new memory costs a page fault every 4 KiB."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEP = 1 << 20
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
        if buffer is not None:
            with self._lock:
                self._free.append(buffer)
