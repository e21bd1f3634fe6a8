"""Whether the files that an operation reads are still what they were when it opened them.

Every file is identified before it is read, and again before the result gets its name: device, inode, size, and the
times of the last change of its bytes and of its state. The last catches a rewrite that sets the other time back; it
also changes with permissions and hard links, and then a result is refused that would have been right.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lorasurgery.checkpoint.header import show
from lorasurgery.errors import FormatError, SurgeryError


class Identity(NamedTuple):
    """What a file is, as far as the system tells without reading it."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        """From what stat() says.

        >>> Identity.of(os.stat(".")) == Identity.of(os.stat("."))
        True
        """
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def differs(self, now: Identity) -> str:
        """What is different now, in a few words; empty where nothing is."""
        if self[:2] != now[:2]:
            return "another file has its name"
        if self.size != now.size:
            return f"it had {self.size:,} bytes and has {now.size:,}"
        if self.modified != now.modified:
            return "it was written to"
        return "it was written to, or its permissions or links were changed" if self != now else ""


class Inputs:
    """The files that one operation has opened, each as it was then; several threads may add to them.

    Examples:
        ```python
        inputs.note(path)       # before it is read
        inputs.check()          # before the result gets its name
        ```
    """

    def __init__(self) -> None:
        self._seen: dict[str, Identity] = {}
        self._checks: list[Callable[[], None]] = []
        self._own: set[str] = set()
        self._settled = False
        self._lock = threading.Lock()

    def note(self, path: Path) -> None:
        """Identify a file before it is read; one that was read before must be the same still.

        Raises:
            FormatError: it was changed since.
            OSError: the system's, such as that there is none.
        """
        found = path.stat()
        if not self._settled:
            self.compare(path, found)

    def compare(self, path: Path, found: os.stat_result) -> None:
        """The same of a file that was opened, perhaps again.

        Raises:
            FormatError: it is not the one that was noted, or was changed since.
        """
        name, now = str(path.absolute()), Identity.of(found)
        with self._lock:
            before = now if name in self._own else self._seen.setdefault(name, now)
        if before != now:
            raise FormatError(_changed(path, before.differs(now)))

    def watch(self, check: Callable[[], None]) -> None:
        """Have something else checked too, before the files."""
        self._checks.append(check)

    def check(self) -> None:
        """See that nothing has changed.

        Raises:
            FormatError: something has.
            SurgeryError: what the other checks say.
        """
        for check in self._checks:
            check()
        for name, before in list(self._seen.items()):
            found = _differs(name, before)
            if found:
                raise FormatError(_changed(Path(name), found))

    def cause(self) -> str:
        """What check() would say while the result has no name yet; whatever else goes wrong then may come of it."""
        try:
            if not self._settled:
                self.check()
        except SurgeryError as problem:
            return str(problem)
        return ""

    def settle(self) -> None:
        """From now on nothing is read for the result any more: it has its name."""
        self._settled = True

    @contextmanager
    def changing(self, paths: Iterable[Path]) -> Iterator[None]:
        """While the operation itself changes files; afterwards they are identified again."""
        names = {str(path.absolute()) for path in paths}
        with self._lock:
            self._own |= names
        try:
            yield
        finally:
            with self._lock:
                for name in names & set(self._seen):
                    del self._seen[name]
                    with suppress(OSError):  # it may be gone
                        self._seen[name] = Identity.of(Path(name).stat())
                self._own -= names


def _differs(name: str, before: Identity) -> str:
    try:
        return before.differs(Identity.of(Path(name).stat()))
    except FileNotFoundError:
        return "it is gone"
    except OSError as problem:
        return str(problem.strerror)


def _changed(path: Path, how: str) -> str:
    return f"{show(str(path))}: was changed while it was read ({how}); leave it alone and repeat the command"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read a megabyte at a time."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
    return digest.hexdigest()
