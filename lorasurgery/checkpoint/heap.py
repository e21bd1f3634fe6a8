"""Stretches of bytes, put one behind the other into a file beside an output until it is known where they belong."""

from __future__ import annotations

import threading
import zlib
from pathlib import Path

from lorasurgery.checkpoint.files import ReadFile, WriteFile
from lorasurgery.checkpoint.inside import to_read
from lorasurgery.errors import FormatError

Place = list[object]
"""Where a stretch lies: the file's name, the first byte, how many, and their CRC-32. JSON."""


class Heap:
    """Takes stretches from several threads; what lies in the file already stays, unless it is to be a `new` one.

    >>> import tempfile
    >>> heap = Heap(Path(tempfile.mkdtemp()) / "heap")
    >>> read_back(heap.path.parent, heap.put(b"abc"))
    b'abc'
    >>> heap.close()
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        self._file = WriteFile(path, new=new)
        self._end, self._lock = path.stat().st_size, threading.Lock()

    def put(self, data: bytes | memoryview) -> Place:
        """Write a stretch; the place is good once sync() was called after it."""
        with self._lock:
            start, self._end = self._end, self._end + len(data)
        self._file.write_at(start, memoryview(data))
        return [self.path.name, start, len(data), zlib.crc32(data)]

    def sync(self) -> None:
        """Wait until the disk has what was put."""
        self._file.sync()

    def close(self) -> None:
        """Close; the file stays."""
        self._file.close()


def read_back(folder: Path, place: Place) -> bytes:
    """A stretch that was put into a heap of this folder.

    Raises:
        FormatError: it is not what was put.
    """
    name, start, size, crc = place
    path = to_read(folder, name, odd=True)
    there = path.stat().st_size if path.is_file() else -1
    if isinstance(start, int) and isinstance(size, int) and 0 <= start <= start + size <= there:
        data = bytearray(size)
        with ReadFile(path) as file:
            got = file.read_all(start, memoryview(data))
        if got == size and zlib.crc32(data) == crc:
            return bytes(data)
    raise FormatError(f"{path}: is damaged, so --resume can't; into a new output, --overwrite starts anew")
