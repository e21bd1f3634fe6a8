"""Where a GPU's memory does not suffice: less at a time, then the CPU, and one warning that says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from lorasurgery.errors import some

T = TypeVar("T")
_SIGNS = ("out of memory", "ALLOC_FAILED")  # of the libraries that torch calls, whose errors have no type of their own


class Fallback:
    """Ways to do one thing, tried one after the other while memory does not suffice; several threads may.

    >>> import torch
    >>> def too_large():
    ...     raise torch.OutOfMemoryError("CUDA out of memory")
    >>> fallback = Fallback()
    >>> fallback.first("lm_head", [too_large, lambda: 42])
    (42, 1)
    >>> fallback.warnings
    ['out of GPU memory at 1 of the tensors (lm_head): done on the CPU, which is slower']
    """

    def __init__(self) -> None:
        self._done: dict[str, bool] = {}  # name -> whether it took the CPU
        self._lock = threading.Lock()

    def first(self, name: str, ways: Sequence[Callable[[], T]], begin: int = 0, *, cpu: bool = True) -> tuple[T, int]:
        """The result of the first way for which the memory suffices, and which one that is.

        Args:
            name: Of the tensor, for the warning.
            ways: Each takes less of the device's memory than the one before.
            cpu: Whether the last one is on the CPU and takes none.
            begin: The way to begin with, where those before it are known to be too large.
        """
        for number, way in enumerate(ways[begin:-1], begin):
            found = self.attempt(way)
            if found:
                self._note(name, number, on_cpu=False)
                return found[0], number
        last = len(ways) - 1
        found = [ways[-1]()]
        self._note(name, last, on_cpu=cpu)
        return found[0], last

    def attempt(self, way: Callable[[], T]) -> list[T]:
        """Its result, as a list of one; an empty list where the device's memory did not suffice for it."""
        try:
            return [way()]
        except RuntimeError as problem:
            if not _is_full(problem):
                raise
        _empty_cache()  # here the error is gone, and with it what the way had made and its traceback held
        return []

    @property
    def warnings(self) -> list[str]:
        """One line for the report; none where the memory sufficed."""
        names, on_cpu = sorted(self._done), sum(self._done.values())
        if not names:
            return []
        how = "done in smaller pieces"
        if on_cpu:
            how = f"{'' if on_cpu == len(names) else f'{on_cpu} of them '}done on the CPU, which is slower"
        return [f"out of GPU memory at {len(names)} of the tensors ({some(names)}): {how}"]

    def _note(self, name: str, number: int, *, on_cpu: bool) -> None:
        if number:
            with self._lock:
                self._done[name] = self._done.get(name, False) or on_cpu


def _is_full(problem: RuntimeError) -> bool:
    from torch import OutOfMemoryError

    return isinstance(problem, OutOfMemoryError) or any(sign in str(problem) for sign in _SIGNS)


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
