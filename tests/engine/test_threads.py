"""Threads of ours compute alone: LAPACK in them does not use the others' cores, so bits don't depend on who is first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.engine.threads import parallel_for, thread_pool

PATIENCE = 60  # seconds after which something counts as hanging


class Decompose:
    """A job whose first call in its thread is one of LAPACK's."""

    cost = 1

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.found = matrix, torch.empty(0)

    def read(self) -> None: ...

    def compute(self) -> None:
        self.found = torch.linalg.svd(self.matrix)[0]

    def write(self) -> None: ...


def in_flow(jobs: list[Decompose]) -> None:
    Pipeline(max_bytes=10, threads=(1, 2, 1)).run(jobs)


def in_team(jobs: list[Decompose]) -> None:
    parallel_for(Decompose.compute, jobs)


@pytest.mark.parametrize("way", [in_flow, in_team])
def test_the_first_call_of_a_thread_has_the_bits_of_one_thread(way: Callable[[list[Decompose]], None]) -> None:
    """torch tells MKL how many threads to use when a thread first asks: an SVD that came before took all cores."""
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    with thread_pool(1):
        expected = torch.linalg.svd(matrix)[0]
    jobs = [Decompose(matrix) for _ in range(4)]
    with thread_pool(2):
        way(jobs)
    assert all(torch.equal(job.found, expected) for job in jobs)


def test_the_end_of_one_team_leaves_the_work_of_another() -> None:
    """Pieces that wait for a thread when another call ends are done all the same."""
    queued, ended = threading.Event(), threading.Event()
    done: list[int] = []

    def brief() -> None:
        with thread_pool(2):
            assert queued.wait(PATIENCE)
        ended.set()

    def work(piece: int) -> None:
        queued.set()
        assert ended.wait(PATIENCE)
        done.append(piece)

    def long() -> None:
        with thread_pool(2):
            parallel_for(work, range(8))

    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(brief), callers.submit(long)]
        for call in calls:
            call.result(2 * PATIENCE)
    assert sorted(done) == list(range(8))


def test_a_team_changes_its_own_threads_alone() -> None:
    """Inside, one thread each; a thread that asks torch for the first time meanwhile is told what the user set."""

    def number(_: object = None) -> None:
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        seen: list[int] = []
        with thread_pool(2):
            number()
            parallel_for(number, range(4))
            assert seen == [1] * 5
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
