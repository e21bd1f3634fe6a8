"""One safetensors file, streamed: the planned header first, then each tensor's bytes at the planned place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lorasurgery.checkpoint.files import LARGE, ReadFile, WriteFile
from lorasurgery.checkpoint.plan import PlannedFile

if TYPE_CHECKING:
    from torch import Tensor


class TensorFile:
    """A file that holds exactly what its header promised, or raises.

    Args:
        path: Where the bytes go (the temporary name). What lies there already stays, for resumed and shared files.
        planned: Tensors and metadata; write() takes them in this order, put() and copy() in any.
        count: Called with the number of bytes after each write.
        mode: Who may read it, as far as the umask allows.
        new: Nothing may lie there yet.
    """

    def __init__(
        self, path: Path, planned: PlannedFile, count: Callable[[int], None], *, mode: int = 0o600, new: bool = False
    ) -> None:
        self.path, self.planned, self._count, self._mode, self._new = path, planned, count, mode, new
        self._next, self._lock, self._closing = 0, threading.Lock(), threading.Lock()
        self._header = planned.header()
        self._places, place = {}, len(self._header)
        for tensor in planned.tensors:
            self._places[tensor.name] = place
            place += tensor.nbytes
        self.size = place
        self._missing = place - len(self._header)

    def __enter__(self) -> TensorFile:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, _p: BaseException | None, _t: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._missing:
                    due = self.planned.tensors[self._next].name if self._next < len(self.planned.tensors) else ""
                    raise ValueError(f"{due} was planned but not written ({self._missing} bytes)")
                self._file.sync()
        finally:
            self._file.close()

    def open(self) -> None:
        """Make the file in its full size, with its header."""
        with ExitStack() as failing:
            self._file = failing.enter_context(
                WriteFile(self.path, direct=self.size >= LARGE, mode=self._mode, new=self._new)
            )
            if self._file.seek(0, 2) != self.size:
                self._file.truncate(self.size)
            self._file.write_at(0, memoryview(self._header))
            failing.pop_all()
        self._count(len(self._header))

    def close(self) -> None:
        """Wait until the disk has what was written, and close; which tensors are there is the caller's to know."""
        with self._closing:
            self._file.sync()
            self._file.close()

    def sync(self) -> None:
        """Wait until the disk has what was written so far."""
        with self._closing:
            if not self._file.closed:
                self._file.sync()

    def abandon(self) -> None:
        """Close without waiting, after a failure."""
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
            self.put(name, written, piece)
            written += len(piece)
        if written != due.nbytes:
            raise ValueError(f"{name}: {written} bytes were written, {due.nbytes} were planned")
        self._next += 1

    def place(self, name: str) -> int:
        """Where in the file a tensor begins."""
        return self._places[name]

    def put(self, name: str, start: int, piece: memoryview) -> None:
        """Write some bytes of a tensor, from its byte `start` on; several threads may."""
        self._file.write_at(self._places[name] + start, piece)
        self._done(len(piece))

    def copy(self, name: str, source: ReadFile, start: int, size: int) -> int:
        """Let the system copy `size` bytes from another file to where this tensor begins; returns the bytes copied."""
        done = self._file.copy_at(self._places[name], source, start, size)
        self._done(done)
        return done

    def _done(self, size: int) -> None:
        with self._lock:
            self._missing -= size
            self._count(size)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _pieces(data: Tensor | Iterable[memoryview]) -> Iterable[memoryview]:
    import torch

    return (as_bytes(data.contiguous()),) if isinstance(data, torch.Tensor) else data
