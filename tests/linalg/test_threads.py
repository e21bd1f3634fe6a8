"""Threads of ours compute alone: LAPACK in them does not use the others' cores, so bits don't depend on who is first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lorasurgery.checkpoint.flow import Flow
from lorasurgery.linalg.threads import each, team


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
    Flow(room=10, threads=(1, 2, 1)).run(jobs)


def in_team(jobs: list[Decompose]) -> None:
    each(Decompose.compute, jobs)


@pytest.mark.parametrize("way", [in_flow, in_team])
def test_the_first_call_of_a_thread_has_the_bits_of_one_thread(way: Callable[[list[Decompose]], None]) -> None:
    """torch tells MKL how many threads to use when a thread first asks: an SVD that came before took all cores."""
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    with team(1):
        expected = torch.linalg.svd(matrix)[0]
    jobs = [Decompose(matrix) for _ in range(4)]
    with team(2):
        way(jobs)
    assert all(torch.equal(job.found, expected) for job in jobs)
