"""Files read and written at given offsets, from several threads at once; copies by the system; a scratch file."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from lorasurgery.checkpoint.inside import to_read
from lorasurgery.errors import FormatError

PAGE = 4096
LARGE = 1 << 30  # bytes of a file that is written past the cache
_WORTH = 1 << 20
_CHUNK = 4 << 20
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # what we write to is never a link: one would have been put there
_AT_ONCE = 64 << 20  # bytes that the system copies before others have their turn, and a stop is heard
_PLAIN = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file


class ReadFile(FileIO):
    """A file open for reading at any place; it closes when the last one who holds it lets go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._turn = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def read_at(self, place: int, view: memoryview) -> int:
        """Fill the view from byte `place` on; returns the bytes read, 0 at the end.

        Raises:
            OSError: the system's.
        """
        if hasattr(os, "preadv"):
            return os.preadv(self.fileno(), [view], place)
        with self._turn:  # Windows has one position for all
            self.seek(place)
            return self.readinto(view) or 0

    def read_all(self, place: int, view: memoryview) -> int:
        """The same until the view is full or the file ends: the system gives at most 2 GiB at once."""
        done = 0
        while done < len(view) and (got := self.read_at(place + done, view[done : done + (1 << 30)])):
            done += got
        return done

    def crc(self, place: int, size: int) -> int | None:
        """CRC-32 of some bytes, None where the file ends before them."""
        buffer, found, done = memoryview(bytearray(min(size, _CHUNK))), 0, 0
        while done < size:
            piece = buffer[: size - done]
            if self.read_all(place + done, piece) != len(piece):
                return None
            found, done = zlib.crc32(piece, found), done + len(piece)
        return found

    def expect(self, place: int, size: int) -> None:
        """Say that these bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self.fileno(), place, size, os.POSIX_FADV_WILLNEED)


class WriteFile(FileIO):
    """A file open for writing at any place; what is there already stays, for others may write to it too.

    Args:
        direct: Write what fills whole pages without the system's cache, where the file system can: for files so large
            that the cache would not hold them until they are wanted. Half as much work for the processor, or less.
        mode: Who may read it when it is made here, as far as the umask allows; others than the user only when asked.
        new: It must not be there yet.

    Raises:
        OSError: the system's; also where the path is a link.
    """

    def __init__(self, path: Path, *, direct: bool = False, mode: int = 0o600, new: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | _NO_LINK | getattr(os, "O_BINARY", 0) | (os.O_EXCL if new else 0)
        super().__init__(os.open(path, flags, mode), "r+")
        self._turn = threading.Lock()
        self._direct = _open_direct(path) if direct else None

    def close(self) -> None:
        """Close; nothing is waited for."""
        if getattr(self, "_direct", None) is not None:
            os.close(self._direct)  # type: ignore[arg-type]
            self._direct = None
        super().close()

    def write_at(self, place: int, view: memoryview) -> None:
        """Write all of the view from byte `place` on.

        Raises:
            OSError: the system's, such as no space left.
        """
        done = 0
        if self._direct is not None and len(view) >= _WORTH:
            before = -place % PAGE
            if (_address(view) + before) % PAGE == 0:
                self._buffered(place, view[:before])
                done = before + self._past_cache(place + before, view[before:])
        self._buffered(place + done, view[done:])

    def _past_cache(self, place: int, view: memoryview) -> int:
        """Write the whole pages of a view from the disk's own memory access; returns the bytes written, maybe none."""
        assert self._direct is not None
        size, done = len(view) // PAGE * PAGE, 0
        try:
            while done < size and not done % PAGE:
                done += os.pwrite(self._direct, view[done : min(size, done + (1 << 30))], place + done)
        except OSError as problem:
            if problem.errno != errno.EINVAL:  # a file system that takes the flag and then can't
                raise
        return done

    def _buffered(self, place: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._some(place + done, view[done : done + (1 << 30)])

    def _some(self, place: int, view: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.fileno(), view, place)
        with self._turn:
            self.seek(place)
            return self.write(view) or 0

    def copy_at(self, place: int, source: ReadFile, start: int, size: int) -> int:
        """Copy `size` bytes of another file, by the system where it can: they never pass through this program.

        Returns:
            The bytes copied, fewer where the source ends too soon.
        """
        done = 0
        while done < size:
            got = _copied(self, place + done, source, start + done, min(size - done, _AT_ONCE))
            if got is None:
                return done + self._through(place + done, source, start + done, size - done)
            if not got:
                break
            done += got
        return done

    def _through(self, place: int, source: ReadFile, start: int, size: int) -> int:
        buffer, done = memoryview(bytearray(min(size, 8 << 20))), 0
        while done < size and (got := source.read_at(start + done, buffer[: size - done])):
            self.write_at(place + done, buffer[:got])
            done += got
        return done

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        os.fsync(self.fileno())


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    with suppress(OSError):  # file systems in memory, some of the network
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def clone(source: ReadFile, target: WriteFile) -> bool:
    """Let a file share another's blocks until one of them changes, where the file system can (Btrfs, XFS, bcachefs)."""
    if sys.platform != "linux":
        return False
    import fcntl

    with suppress(OSError):
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return True
    return False


def _copied(target: WriteFile, place: int, source: ReadFile, start: int, size: int) -> int | None:
    """Bytes that the system copied; None where it can't."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), size, start, place)
    except OSError as problem:
        if problem.errno in _PLAIN:
            return None
        raise


def make(path: Path, mode: int = 0o600) -> None:
    """Make an empty file that others than the user can read only when asked; one that is there stays as it is."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))


Place = list[object]
"""Where a stretch lies: the file's name, the first byte, how many, and their CRC-32. JSON."""


class ScratchFile:
    """Takes stretches from several threads, one behind the other.

    What lies in the file already stays, unless it is to be a `new` one.

    >>> import tempfile
    >>> scratch = ScratchFile(Path(tempfile.mkdtemp()) / "scratch")
    >>> bytes(read_back(scratch.path.parent, scratch.put(b"abc")))
    b'abc'
    >>> scratch.close()
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


def read_back(folder: Path, place: Place, view: memoryview | None = None) -> memoryview:
    """Read a stretch that was put into a scratch file of this folder.

    Args:
        folder: Where the scratch file lies.
        place: What put() returned.
        view: Memory to read it into, as long as the stretch; None takes new memory.

    Raises:
        FormatError: it is not what was put, or the file was removed.
    """
    path = _scratch_path(folder, place[0])
    with ReadFile(path) as file:
        return _stretch(file, path, place, view)


def read_all_back(folder: Path, places: Iterable[Place]) -> Iterator[memoryview]:
    """Read many stretches; those that follow one another in the same scratch file open it once.

    Raises:
        FormatError: one is not what was put, or its file was removed.
    """
    for name, in_file in groupby(places, itemgetter(0)):
        path = _scratch_path(folder, name)
        with ReadFile(path) as file:
            for place in in_file:
                yield _stretch(file, path, place)


def _scratch_path(folder: Path, name: object) -> Path:
    path = to_read(folder, name, odd=True)
    if not path.is_file():
        raise _unusable(path, "was removed")
    return path


def _stretch(file: ReadFile, path: Path, place: Place, view: memoryview | None = None) -> memoryview:
    _, start, size, crc = place
    there = os.fstat(file.fileno()).st_size
    if isinstance(start, int) and isinstance(size, int) and 0 <= start <= start + size <= there:
        found = memoryview(bytearray(size)) if view is None else view
        if file.read_all(start, found) == size and zlib.crc32(found) == crc:
            return found
    raise _unusable(path, "is damaged")


def _unusable(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: {what}, so --resume can't; into a new output, --overwrite starts over")
