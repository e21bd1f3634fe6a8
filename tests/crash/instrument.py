"""Every call of this process that changes files, counted; at one of them the process ends, as by kill -9 or a power cut.

For a process of its own: what is put in the place of the system's calls stays there.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from power import Disk, raw

KILLED = 137
_COPY = getattr(os, "copy_file_range", None)
_OPEN = io.open
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Counts, and ends the process.

    Args:
        root: Only what lies in this folder counts.
        stop: The number of the call, from 1, before which the process ends; 0 when all is done; None lets it live.
        half: If that call writes, half of its bytes are written.
        seed: Of a power cut; None for a kill, after which all that was written stays.

    Attributes:
        calls: What was called and on what, in order. escaped: What changed files without being counted.
    """

    def __init__(self, root: Path, *, stop: int | None = None, half: bool = False, seed: int | None = None) -> None:
        self.root, self.stop, self.half, self.seed = os.path.realpath(root), stop, half, seed
        self.calls: list[str] = []
        self.escaped: list[str] = []
        self._paths: dict[int, str] = {}
        self._disk = Disk()
        self._lock, self._mine = threading.RLock(), threading.local()

    def install(self) -> None:
        """Take the place of the system's calls."""
        from lorasurgery.checkpoint.files import WriteFile

        for name in ("open", "write", "pwrite", "fsync", "mkdir", "rmdir", "ftruncate"):
            setattr(os, name, getattr(self, f"_{name}"))
        os.replace = os.rename = self._replace
        os.unlink = os.remove = self._unlink
        if _COPY is not None:
            os.copy_file_range = self._copy_file_range
        io.open = builtins.open = self._file
        WriteFile.truncate = lambda file, size: os.ftruncate(file.fileno(), size)  # FileIO's own is out of reach
        sys.addaudithook(self._audit)

    def ended(self) -> None:
        """All is done, and reported; a power cut may come now."""
        if self.stop == 0:
            self._end()

    @contextmanager
    def _call(self, kind: str, path: str, half: Callable[[], object] | None = None) -> Any:
        """One call at a time; the process ends before it, or in the middle of it."""
        with self._lock:
            self.calls.append(f"{kind} {os.path.relpath(path, self.root)}")
            self._mine.inside = True
            try:
                if len(self.calls) == self.stop:
                    if half is not None and self.half:
                        half()
                    self._end()
                yield
            finally:
                self._mine.inside = False

    def _end(self) -> None:
        if self.seed is not None:
            for name, call in raw.items():
                setattr(os, name, call)
            io.open = builtins.open = _OPEN
            self._disk.cut(self.seed)
        os._exit(KILLED)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = self._full(path, dir_fd)
        if not self._is_ours(full):
            return raw["open"](path, flags, mode, dir_fd=dir_fd)
        there = os.path.lexists(full)
        if flags & os.O_CREAT and not there:
            with self._call("create", full):
                descriptor = raw["open"](full, flags, mode)
                self._disk.named(full, 0)
        elif flags & os.O_TRUNC and Path(full).stat().st_size:
            with self._call("truncate", full):
                self._disk.opened(full)
                descriptor = raw["open"](full, flags & ~os.O_TRUNC, mode)
                self._disk.wrote(descriptor, 0, None)
                raw["ftruncate"](descriptor, 0)
        else:
            with self._lock:
                self._mine.inside = True
                descriptor = raw["open"](full, flags, mode)
                self._mine.inside = False
        if flags & _WRITING:
            self._disk.opened(full)
        self._paths[descriptor] = full
        return descriptor

    def _file(self, path: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        """open(), with buffers of Python's own above our writes."""
        if isinstance(path, int) or not self._is_ours(self._full(path)):
            return _OPEN(path, mode, buffering, *more, **named)
        if not set("wax+") & set(mode):
            found = _OPEN(path, mode, buffering, *more, **named)
            self._paths[found.fileno()] = self._full(path)
            return found
        flags = {"w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": os.O_CREAT | os.O_EXCL, "r": 0}
        bare = _Bare(os.open(path, flags[mode[0]] | os.O_RDWR, 0o666), "r+")
        if buffering == 0:
            return bare
        buffered = io.BufferedRandom(bare) if "+" in mode else io.BufferedWriter(bare)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)

    def _write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._paths:
            return raw["write"](descriptor, data)
        size = os.fstat(descriptor).st_size
        place = size if _is_appending(descriptor) else os.lseek(descriptor, 0, os.SEEK_CUR)
        data = bytes(data)
        with self._call("write", self._paths[descriptor], lambda: self._put(descriptor, data[: len(data) // 2], place)):
            self._disk.wrote(descriptor, place, data)
            return raw["write"](descriptor, data)

    def _pwrite(self, descriptor: int, data: Any, place: int) -> int:
        if descriptor not in self._paths:
            return raw["pwrite"](descriptor, data, place)
        data = bytes(data)
        with self._call("write", self._paths[descriptor], lambda: self._put(descriptor, data[: len(data) // 2], place)):
            return self._put(descriptor, data, place)

    def _put(self, descriptor: int, data: bytes, place: int) -> int:
        self._disk.wrote(descriptor, place, data)
        return raw["write"](descriptor, data) if _is_appending(descriptor) else raw["pwrite"](descriptor, data, place)

    def _copy_file_range(self, source: int, target: int, count: int, start: int, place: int) -> int:
        data = raw["pread"](source, count, start)
        half = data[: len(data) // 2]
        with self._call("copy", self._paths[target], lambda: self._put(target, half, place)):
            return self._put(target, data, place)

    def _ftruncate(self, descriptor: int, size: int) -> None:
        if descriptor not in self._paths:
            return raw["ftruncate"](descriptor, size)
        with self._call("truncate", self._paths[descriptor]):
            self._disk.wrote(descriptor, size, None)
            return raw["ftruncate"](descriptor, size)

    def _fsync(self, descriptor: int) -> None:
        if descriptor not in self._paths:
            return raw["fsync"](descriptor)
        with self._call("fsync", self._paths[descriptor]):
            return self._disk.synced(descriptor, self._paths[descriptor])  # the disk itself need not work

    def _replace(self, old: Any, new: Any) -> None:
        if not self._is_ours(self._full(new)):
            return raw["replace"](old, new)
        with self._call("rename", self._full(new)):
            self._disk.renamed(self._full(old), self._full(new))
            return raw["replace"](old, new)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if not self._is_ours(full):
            return raw["unlink"](path, dir_fd=dir_fd)
        with self._call("unlink", full):
            self._disk.named(full, None)
            return raw["unlink"](full)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if not self._is_ours(full):
            return raw["mkdir"](path, mode, dir_fd=dir_fd)
        with self._call("mkdir", full):
            raw["mkdir"](full, mode)
            return self._disk.named(full, "folder")

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._full(path, dir_fd)
        if not self._is_ours(full):
            return raw["rmdir"](path, dir_fd=dir_fd)
        with self._call("rmdir", full):
            raw["rmdir"](full)
            return self._disk.emptied(full)

    def _full(self, path: Any, dir_fd: int | None = None) -> str:
        folder = Path.cwd() if dir_fd is None else self._paths.get(dir_fd, "")
        return os.path.normpath(Path(folder, os.fsdecode(path)))

    def _is_ours(self, path: str) -> bool:
        return path.startswith(self.root + os.sep) or path == self.root

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The interpreter tells of what it opens, renames and removes; all of that must have come by here."""
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & _WRITING)
        if changes and not getattr(self._mine, "inside", False) and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.normpath(Path.cwd() / os.fsdecode(arguments[0]))
            if self._is_ours(path):
                self.escaped.append(f"{event} {path}")


class _Bare(io.FileIO):
    """An unbuffered file whose writes are seen."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None) -> int:
        os.ftruncate(self.fileno(), self.tell() if size is None else size)
        return self.tell() if size is None else size


def _is_appending(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND)
