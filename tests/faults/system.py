"""A system whose calls fail: the n-th of some kind, and from then on all, as on a full disk, or that one alone."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

GROWING = ("pwrite", "write", "copy_file_range", "open", "mkdir", "fsync")  # what a full disk refuses
NAMING = ("replace", "rename", "unlink")


class Faults:
    """Counts calls of the system that write, and lets some fail.

    Example:
        faults = Faults(monkeypatch, GROWING, errno.ENOSPC)
        faults.begin(3)  # the fourth call and all later ones
        ...
        faults.end()

    Args:
        calls: Names in `os`; `open` stands for opening a file to write to it.
        number: The errno.
        below: Only what happens to paths that hold this text (calls on descriptors always count).

    Attributes:
        seen: Calls since begin().
    """

    def __init__(self, patch: pytest.MonkeyPatch, calls: Sequence[str], number: int, *, once: bool = False) -> None:
        self.number, self.once = number, once
        self.seen, self._first = 0, None
        self._lock = threading.Lock()
        for name in calls:
            if name == "open":
                patch.setattr(os, "open", self._checked(os.open, lambda path, flags, *_: bool(flags & os.O_CREAT)))
                patch.setattr(io, "open", self._checked(io.open, _is_made))
            elif hasattr(os, name):
                patch.setattr(os, name, self._checked(getattr(os, name), lambda *_: True))

    def begin(self, first: int) -> None:
        """From call number `first` (0 is the next one) on there are failures."""
        self.seen, self._first = 0, first

    def end(self) -> bool:
        """No failures any more; whether there were any."""
        failed = self._first is not None and self.seen > self._first
        self._first = None
        return failed

    def _checked(self, call: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def checked(*args: Any, **more: Any) -> Any:
            if self._first is not None and counts(*args):
                with self._lock:
                    here, self.seen = self.seen, self.seen + 1
                if here == self._first or (here > self._first and not self.once):
                    path = next((a for a in args if isinstance(a, (str, os.PathLike))), None)
                    raise OSError(self.number, os.strerror(self.number), *([str(path)] if path else []))
            return call(*args, **more)

        return checked


def _is_made(_: Any, mode: str = "r", *__: Any) -> bool:
    return any(letter in mode for letter in "wax+")


def full_disk(patch: pytest.MonkeyPatch) -> Faults:
    """No space left from some call on."""
    return Faults(patch, GROWING, errno.ENOSPC)
