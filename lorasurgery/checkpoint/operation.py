"""What one call of an operation holds while it lasts: the locks of what it writes, and its inputs as it found them.

Whoever opens a file or begins an output finds the operation that he works for here, so no verb need think of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from pathlib import Path

from lorasurgery.checkpoint.fingerprint import Inputs
from lorasurgery.checkpoint.lock import Lock, lock_of
from lorasurgery.engine.ranks import ranks

_CURRENT: ContextVar[Operation | None] = ContextVar("OPERATION", default=None)


class Operation:
    """One call, from before its first look at anything until it is recorded.

    Examples:
        ```python
        with Operation("lorasurgery merge …") as operation:
            operation.hold(Path("merged"))
        ```

    Args:
        call: What is done, for whoever finds a place locked.
        writes: Whether it writes anything; a dry run locks nothing.
        alone: Whether it is this process's own; else of several ranks the first holds the locks for all.
    """

    def __init__(self, call: str = "", *, writes: bool = True, alone: bool = False) -> None:
        self.call, self.inputs = call, Inputs()
        self._writes = writes and (alone or ranks().first)
        self._locks: list[Lock] = []
        self._outer: Operation | None = None
        self._token: Token[Operation | None] | None = None

    def __enter__(self) -> Operation:
        self._outer = _CURRENT.get()
        self.call = self._outer.call if self._outer is not None else self.call  # what was asked for
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        for lock in reversed(self._locks):
            lock.release()

    def hold(self, place: Path) -> None:
        """Keep other writers away from an output or a checkpoint until this operation ends.

        Raises:
            OutputError: another command is at work there.
            OSError: the system refuses the lock.
        """
        if self._writes and os.path.realpath(lock_of(place)) not in self._files():
            around = self._outer._files() if self._outer is not None else frozenset()
            self._locks.append(Lock(place, self.call, self._files() | around))

    @property
    def made(self) -> list[Path]:
        """The folders that were made for its locks."""
        return [folder for lock in self._locks for folder in lock.made]

    def _files(self) -> frozenset[str]:
        return frozenset(os.path.realpath(lock.file) for lock in self._locks)


@contextmanager
def holding(place: Path) -> Iterator[Operation]:
    """Hold a place for the operation under way; where there is none, until the end of the `with`.

    Raises:
        OutputError: another command is at work there.
        OSError: the system refuses the lock.
    """
    operation = current()
    if operation is not None:
        operation.hold(place)
        yield operation
    else:
        with Operation(alone=True) as own:
            own.hold(place)
            yield own


def current() -> Operation | None:
    """The operation under way."""
    return _CURRENT.get()


def inputs() -> Inputs:
    """Where the files of the operation under way are noted; of none, a list of one's own."""
    operation = current()
    return operation.inputs if operation is not None else Inputs()


def note(path: Path) -> None:
    """Identify a file for the operation under way, before it is read; a missing one is the reader's to find.

    Raises:
        FormatError: it was read before, and changed since.
    """
    with suppress(OSError):
        inputs().note(path)
