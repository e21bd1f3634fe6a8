"""What a power cut leaves: of all that was written and named since the last fsync, any part may be lost.

Bytes are lost write by write, also in the middle of one. Names are lost call by call: creating, renaming and removing
count only when the folder was synced, as POSIX has it; file systems are kinder, but not all in the same way.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Node = int | Literal["folder"] | None
"""What bears a name: a file by its inode, a folder, or nothing."""
CALLS = "open write pwrite pread fsync replace rename unlink remove mkdir rmdir ftruncate".split()
_SECTOR = 512
raw = {name: getattr(os, name) for name in CALLS}


@dataclass
class _File:
    """A file and what was written to it since it was synced: (place, bytes), or (size, None) where it was cut."""

    path: str
    reader: int
    base: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def now(self) -> bytes:
        found, place = bytearray(), 0
        while piece := raw["pread"](self.reader, 1 << 20, place):
            found += piece
            place += len(piece)
        return bytes(found)

    def add(self, place: int, data: bytes | None) -> None:
        if not self.pending:
            self.base = self.now()
        self.pending.append((place, data))

    def survivor(self, keep: _Chance) -> bytes:
        """The bytes that the disk has."""
        found = bytearray(self.base)
        for place, data in self.pending:
            if data is None and keep():
                found = found[:place].ljust(place, b"\0")
            elif data is not None and keep():
                for start, stop in keep.parts(len(data)):
                    found = found.ljust(place + stop, b"\0")
                    found[place + start : place + stop] = data[start:stop]
        return bytes(found)


@dataclass
class _Naming:
    """One call that changed names: path -> what it meant before and afterwards."""

    changes: dict[str, tuple[Node, Node]]
    synced: bool = False


class _Chance:
    """Whether something that was not synced is on the disk all the same: never, always, or at random."""

    def __init__(self, random: random.Random) -> None:
        self._random, self._share = random, random.choice((0.0, 0.3, 0.7, 1.0))

    def __call__(self) -> bool:
        return self._random.random() < self._share

    def parts(self, size: int) -> list[tuple[int, int]]:
        """Of one write: all, what comes before some place, or some sectors."""
        how = self._random.randrange(4)
        if how < 2:
            return [(0, size)]
        if how == 2:
            return [(0, self._random.randrange(size + 1))]
        return [(i, min(i + _SECTOR, size)) for i in range(0, size, _SECTOR) if self._random.random() < 0.5]


class Disk:
    """Follows what a program does to files; everything is told before it is done, but opening, which is told after."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._names: list[_Naming] = []

    def opened(self, path: str) -> None:
        """Take note of a file that will be written to."""
        self._node(path)

    def wrote(self, descriptor: int, place: int, data: bytes | None) -> None:
        """Bytes go to a place; None: the file is cut or stretched there."""
        self._files[os.fstat(descriptor).st_ino].add(place, data)

    def synced(self, descriptor: int, path: str) -> None:
        """A file has its bytes on the disk, or a folder its names."""
        if Path(path).is_dir():
            paths: set[str] = set()  # what is on the disk stands on what came before it
            for naming in reversed(self._names):
                here = any(str(Path(p).parent) == path for p in naming.changes)
                if here or any(_is_within(p, q) for p in naming.changes for q in paths):
                    naming.synced = True
                    paths |= {p for p, (before, after) in naming.changes.items() if after != "folder"}
        elif file := self._files.get(os.fstat(descriptor).st_ino):
            file.pending.clear()

    def named(self, path: str, after: Node) -> None:
        """A path is created (told afterwards, as "folder" or 0 for a file) or removed (None)."""
        if after is None:
            self._names.append(_Naming({path: (self._node(path), None)}))
        else:
            self._names.append(_Naming({path: (None, after or self._node(path))}))

    def emptied(self, path: str) -> None:
        """A folder is removed."""
        self._names.append(_Naming({path: ("folder", None)}))

    def renamed(self, old: str, new: str) -> None:
        """A file gets another name, and what had it goes."""
        self._names.append(_Naming({old: (self._node(old), None), new: (self._node(new), self._node(old))}))

    def cut(self, seed: int) -> None:
        """Leave of everything what the disk has."""
        chance = random.Random(seed)
        names, data = _Chance(chance), _Chance(chance)
        wanted = self._surviving(names)
        for file in self._files.values():
            if file.pending and file.path not in wanted and os.path.lexists(file.path):
                wanted[file.path] = Path(file.path).stat().st_ino
        contents = {n: self._files[n].survivor(data) if self._files[n].pending else self._files[n].now()
                    for n in wanted.values() if isinstance(n, int)}  # fmt: skip
        for path in sorted(wanted, reverse=True):
            if wanted[path] != "folder":
                _remove(path)
        for path, node in sorted(wanted.items()):
            if node == "folder":
                Path(path).mkdir(exist_ok=True)
            elif node is not None:
                Path(path).write_bytes(contents[node])

    def _surviving(self, keep: _Chance) -> dict[str, Node]:
        """Path -> what it means on the disk, for all that was named again."""
        found: dict[str, Node] = {}
        for naming in self._names:
            for path, (before, _) in naming.changes.items():
                found.setdefault(path, before)
        lost: set[str] = set()
        for naming in self._names:
            needed = any(_is_within(p, q) or _is_within(q, p) for p in naming.changes for q in lost)
            if (naming.synced or keep()) and not needed:
                found |= {path: after for path, (_, after) in naming.changes.items()}
            else:
                lost |= set(naming.changes)
        return found

    def _node(self, path: str) -> Node:
        if not os.path.lexists(path):
            return None
        if Path(path).is_dir():
            return "folder"
        node = Path(path).stat().st_ino
        if node not in self._files:  # held open, so that its bytes stay when its name goes
            self._files[node] = _File(path, raw["open"](path, os.O_RDONLY))
        return node


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _remove(path: str) -> None:
    if Path(path).is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        raw["unlink"](path)
