"""Reading, computing and writing at the same time, with a bounded number of bytes between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from lorasurgery.engine.process import workers

_LEAST = 16 << 10  # bytes that even the smallest job holds, in objects
_TOGETHER = 1 << 20  # bytes of small jobs that go from thread to thread as one: handing on costs more than their work


class Job(Protocol):
    """One piece of work; its three steps run one after the other, each in a thread of that stage.

    Attributes:
        cost: Bytes of memory it holds from the beginning of read() to the end of write().
    """

    cost: int

    def read(self) -> None:
        """Bring what is needed into memory."""
        ...

    def compute(self) -> None:
        """Make the result."""
        ...

    def write(self) -> None:
        """Put the result where it belongs, and free the memory."""
        ...


class _Jobs:
    """Several jobs, one after the other at every step.

    Attributes:
        tiny: Whether none of them holds more than its objects, so that the threads would only wait for one another.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cost = 0
        self.tiny = True

    def add(self, job: Job, cost: int) -> None:
        self.jobs.append(job)
        self.cost += cost

    def read(self) -> None:
        for job in self.jobs:
            job.read()

    def compute(self) -> None:
        for job in self.jobs:
            job.compute()

    def write(self) -> None:
        for job in self.jobs:
            job.write()


@dataclass
class Pipeline:
    """Takes jobs through their steps in the order given; several may be at different steps at once.

    >>> class Print:
    ...     cost = 1
    ...     def read(self): self.x = 2
    ...     def compute(self): self.x *= 21
    ...     def write(self): print(self.x)
    >>> Pipeline(max_bytes=10).run([Print()])
    42

    Args:
        max_bytes: Bytes that all jobs under way may hold together; a job larger than that goes alone.
        threads: How many for reading, computing and writing; without readers, those that compute also read.
    """

    max_bytes: int
    threads: tuple[int, int, int] = (1, 2, 2)
    _used: int = 0
    _failure: BaseException | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self, jobs: Iterable[Job]) -> None:
        """Do all jobs, or stop at the first that fails: those under way end their step, no other begins.

        Raises:
            BaseException: what a step raised, or what interrupted the waiting.
        """
        readers, computers, writers = self.threads
        computing = workers(computers)
        pools = [workers(readers) if readers else computing, computing, workers(writers)]
        try:
            for job in self._together(jobs):
                if job.tiny and self._is_idle():
                    self._here(job)
                    continue
                self._admit(job)
                steps = list(zip(pools, (job.read, job.compute, job.write), strict=True))
                self._next(job, steps)
            self._wait(lambda: not self._used)
        except BaseException as problem:
            self._fail(problem)
            raise
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def _together(self, jobs: Iterable[Job]) -> Iterator[_Jobs]:
        """Small neighbours as one job; where little room is given, each by itself."""
        limit, least = (min(size, self.max_bytes // 64) for size in (_TOGETHER, _LEAST))
        few = _Jobs()
        for job in jobs:
            cost = max(1, job.cost, least)
            if few.jobs and few.cost + cost > limit:
                yield few
                few = _Jobs()
            few.add(job, cost)
            few.tiny = few.tiny and job.cost <= least
        if few.jobs:
            yield few

    def _is_idle(self) -> bool:
        """Whether no job is under way: only then may this thread do a step without being one thread too many for it."""
        with self._changed:
            return not self._used

    def _here(self, job: _Jobs) -> None:
        """All steps at once, in this thread."""
        for step in (job.read, job.compute, job.write):
            self._wait(lambda: True)
            step()

    def _admit(self, job: Job) -> None:
        self._wait(lambda: not self._used or self._used + job.cost <= self.max_bytes)
        with self._changed:
            self._used += job.cost

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            while not (ready() or self._failure):
                self._changed.wait()
        if self._failure:
            raise self._failure

    def _next(self, job: Job, steps: list[tuple[ThreadPoolExecutor, Callable[[], None]]]) -> None:
        """Hand a job to the thread of its next step, or count it as done."""
        if not steps:
            with self._changed:
                self._used -= job.cost
                self._changed.notify_all()
            return
        (pool, step), *rest = steps

        def work() -> None:
            if self._failure:
                return
            try:
                step()
                self._next(job, rest)
            except BaseException as problem:
                self._fail(problem)

        pool.submit(work)

    def _fail(self, problem: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or problem
            self._changed.notify_all()
