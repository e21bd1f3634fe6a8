"""One safetensors file, streamed: the planned header first, then each tensor's bytes in the planned order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lorasurgery.checkpoint.plan import PlannedFile

if TYPE_CHECKING:
    from torch import Tensor


class TensorFile:
    """A file that holds exactly what its header promised, or raises.

    Args:
        path: Where the bytes go (the temporary name).
        planned: Tensors and metadata; write() takes them in this order.
        count: Called with the number of bytes after each write.
    """

    def __init__(self, path: Path, planned: PlannedFile, count: Callable[[int], None]) -> None:
        self.path, self.planned, self._count = path, planned, count
        self._next = 0

    def __enter__(self) -> TensorFile:
        self._file = self.path.open("wb", buffering=0)
        self._put(memoryview(self.planned.header()))
        return self

    def __exit__(self, kind: type[BaseException] | None, _p: BaseException | None, _t: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._next != len(self.planned.tensors):
                    raise ValueError(f"{self.planned.tensors[self._next].name} was planned but not written")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, data: Tensor | Iterable[memoryview]) -> None:
        """Write the next tensor, from a CPU tensor or as pieces of raw bytes.

        Raises:
            ValueError: another tensor was due, or the number of bytes is not the planned one.
        """
        due = self.planned.tensors[self._next]
        if due.name != name:
            raise ValueError(f"{name} was written where {due.name} was due")
        written = 0
        for piece in _pieces(data):
            self._put(piece)
            written += len(piece)
        if written != due.nbytes:
            raise ValueError(f"{name}: {written} bytes were written, {due.nbytes} were planned")
        self._next += 1

    def _put(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + (1 << 30)])
        self._count(done)


def _pieces(data: Tensor | Iterable[memoryview]) -> Iterable[memoryview]:
    import torch

    if not isinstance(data, torch.Tensor):
        return data
    return (data.contiguous().reshape(-1).view(torch.uint8).numpy().data,) if data.numel() else ()
