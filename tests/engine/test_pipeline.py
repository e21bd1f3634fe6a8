"""Small jobs go from thread to thread together, and never more of them than the room is for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.engine import pipeline as flow
from lorasurgery.engine.pipeline import Pipeline


@dataclass
class Step:
    """A job that does nothing."""

    cost: int

    def read(self) -> None: ...
    def compute(self) -> None: ...
    def write(self) -> None: ...


@given(st.lists(st.one_of(st.integers(0, 100), st.integers(0, 3 << 20)), max_size=300), st.integers(1, 1 << 30))
def test_neighbours_go_together_up_to_a_bound(costs: list[int], room: int) -> None:
    """All jobs in their order; several together cost no more than a 64th of the room, and no neighbour had fitted in."""
    jobs = [Step(cost) for cost in costs]
    found = list(Pipeline(room)._together(jobs))
    assert [job for few in found for job in few.jobs] == jobs
    limit, least = min(flow._TOGETHER, room // 64), min(flow._LEAST, room // 64)
    for few in found:
        assert few.cost == sum(max(1, job.cost, least) for job in few.jobs)
        assert len(few.jobs) == 1 or few.cost <= limit
    for few, following in pairwise(found):
        assert few.cost + max(1, following.jobs[0].cost, least) > limit


def test_jobs_under_way_keep_to_the_room() -> None:
    """The costs of all that has been read and not yet written are never above the room, save those of one job alone."""
    held, most, lock = [0], [0], threading.Lock()

    @dataclass
    class Holding(Step):
        def read(self) -> None:
            with lock:
                held[0] += self.cost
                most[0] = max(most[0], held[0])

        def write(self) -> None:
            with lock:
                held[0] -= self.cost

    room = 10 << 20
    Pipeline(room, threads=(2, 2, 2)).run(Holding(cost) for cost in [3 << 20] * 40)
    assert held == [0]
    assert 0 < most[0] <= room
    Pipeline(room, threads=(2, 2, 2)).run(Holding(cost) for cost in [2 * room, room // 2, 2 * room])
    assert most[0] == 2 * room


@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 20 << 10), st.integers(1 << 20, 3 << 20)), max_size=60),
    st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 2)),
)
def test_no_step_has_more_threads_than_it_was_given(costs: list[int], threads: tuple[int, int, int]) -> None:
    """Tiny jobs between large ones do not bring in one thread more: who writes alone may count on that."""
    lock, now, most = threading.Lock(), Counter[str](), Counter[str]()

    class Watched(Step):
        def step(self, name: str) -> None:
            with lock:
                now[name] += 1
                most[name] = max(most[name], now[name])
            time.sleep(0)
            with lock:
                now[name] -= 1

        def read(self) -> None:
            self.step("read")

        def compute(self) -> None:
            self.step("compute")

        def write(self) -> None:
            self.step("write")

    Pipeline(8 << 20, threads).run([Watched(cost) for cost in costs])
    readers, computers, writers = threads
    assert most["read"] <= (readers or computers)
    assert most["compute"] <= computers
    assert most["write"] <= writers
