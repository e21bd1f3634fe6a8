"""Work in pieces on several threads, each of which computes alone: results do not depend on how many there are.

torch's own threads split sums by their number, so that one core and eight give different last bits; and they wait for
one another after every operation. Here a matrix is cut into pieces of a fixed size, and each piece is one thread's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorasurgery.engine.process import use_threads, workers

T = TypeVar("T")
_own = threading.local()
_loading = threading.Lock()


class _ThreadPool:
    """The threads of one call."""

    def __init__(self, size: int) -> None:
        self.size, self.pool = size, workers(size)


# The call's: threads that work for it have it from the call.
_pool: ContextVar[_ThreadPool | None] = ContextVar("thread_pool", default=None)


@contextmanager
def thread_pool(size: int | None = None) -> Iterator[int]:
    """Give `parallel_for` its threads, as many as torch would use, and let every one of them compute alone.

    They belong to the call: another call, in another thread, has its own.

    Examples:
        ```python
        with thread_pool() as threads:
            parallel_for(work, pieces)
        ```

    Args:
        size: Threads; None takes torch.get_num_threads(), which OMP_NUM_THREADS sets.
    """
    mine = _pool.get()
    if mine is not None:  # a pool within a pool is the same one
        yield mine.size
        return
    before = torch.get_num_threads()
    use_threads(1)
    mine = _ThreadPool(size or before)
    token = _pool.set(mine)
    try:
        yield mine.size
    finally:
        _pool.reset(token)
        mine.pool.shutdown(cancel_futures=True)
        use_threads(before)


def parallel_for(work: Callable[[T], Any], pieces: Iterable[T]) -> None:
    """Do `work` on every piece and wait; without a pool, or for one piece, in this thread.

    >>> found = []
    >>> parallel_for(found.append, [1, 2])
    >>> found
    [1, 2]

    Raises:
        Exception: the first that a piece raised, when all have ended.
    """
    items, mine = list(pieces), _pool.get()
    if mine is None or mine.size == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    futures = [mine.pool.submit(_inferring, work, item) for item in items]
    wait(futures)
    for future in futures:
        future.result()


def _inferring(work: Callable[[T], Any], item: T) -> None:
    with torch.inference_mode():  # it belongs to a thread, so every one must ask for it
        work(item)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, let this thread queue its work apart from others': copies of one overlap with products of another.

    At the end it waits for its own, so that what it hands on is there.
    """
    if device.type != "cuda":
        yield
        return
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
    with torch.cuda.stream(streams[device]):
        try:
            yield
        finally:  # after a failure too: what was queued may still copy from and to memory that is lent to others
            streams[device].synchronize()


def load_solvers(device: torch.device) -> None:
    """Let torch load its solvers for a GPU in this thread, before several threads need them at once.

    torch loads them at the first call, and fails where two threads make it ("lazy wrapper should be called at most
    once", pytorch/pytorch#90613).
    """
    if device.type == "cuda":
        with _loading:
            torch.linalg.cholesky_ex(torch.eye(1, device=device))


def scratch(like: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Tensors of a shape to work in, the same memory at every call of this thread: new memory costs page faults.

    Args:
        like: Gives shape and device; on a GPU they are new, for its allocator keeps memory itself.
    """
    size = like.numel()
    if like.device.type != "cpu":
        whole = torch.empty(count * size, dtype=dtype, device=like.device)
    else:
        held: dict[torch.dtype, Tensor] = _own.__dict__.setdefault("held", {})
        if dtype not in held or held[dtype].numel() < count * size:
            with torch.inference_mode(False):  # so that it serves inside and outside
                held[dtype] = torch.empty(count * size, dtype=dtype)
        whole = held[dtype]
    return [whole[i * size : (i + 1) * size].view(like.shape) for i in range(count)]
