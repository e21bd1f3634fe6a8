"""What the whole process shares, so that calls made side by side from several threads do not harm one another."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
_settings, _numbers = threading.RLock(), threading.Lock()


@contextmanager
def own_settings() -> Iterator[None]:
    """Hold the settings of the whole process (warnings, logging, matplotlib's style), to be put back at the end.

    One call at a time: of two that overlap, the second would find the first one's settings and put those back for good.
    Warnings' filters are put back here.
    """
    with _settings, warnings.catch_warnings():
        yield


def workers(size: int) -> ThreadPoolExecutor:
    """Threads that work for one call: they see its context variables, and torch has in them as many threads as here.

    All of them have begun when this returns: while one does, torch has our number for the whole process for a moment
    (use_threads), in which no callback of the user's may start a thread that meets torch.

    Examples:
        ```python
        with workers(2) as threads:
            threads.submit(work)
        ```
    """
    import torch

    context, count = copy_context(), torch.get_num_threads()

    def begin() -> None:
        for variable, value in context.items():
            variable.set(value)
        use_threads(count)

    pool, ready = ThreadPoolExecutor(size, "lorasurgery", begin), threading.Barrier(size)
    list(pool.map(lambda _: ready.wait(), range(size)))  # each waits for the others, so none takes two
    return pool


def use_threads(count: int) -> None:
    """Let torch, and MKL beneath it, use `count` threads in this thread, whatever others use.

    torch keeps a number for each thread, and one for the process, which a thread takes when torch first asks there.
    set_num_threads changes both, so the process's is put back, from a thread that is there for nothing else: a user's
    thread that meets torch during a call of ours would keep our number for ever.
    """
    import torch

    with _numbers:
        if torch.get_num_threads() == count:  # asking also tells MKL, in a thread where nobody asked before
            return
        before = _elsewhere(torch.get_num_threads)
        torch.set_num_threads(count)
        _elsewhere(lambda: torch.set_num_threads(before))


def _elsewhere(work: Callable[[], T]) -> T:
    """What `work` returns in a new thread."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(work).result()
