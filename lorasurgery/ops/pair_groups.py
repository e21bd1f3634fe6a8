"""Small pairs of one shape, read and decomposed together: a GPU needs work enough for a call to be worth its while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.batched import WORKSPACE, batched_svd
from lorasurgery.linalg.blocks import InMemory
from lorasurgery.linalg.norms import squared_norm
from lorasurgery.linalg.svd import TruncatedSVD, finite
from lorasurgery.linalg.threads import own_stream
from lorasurgery.ops.pair_work import Outcome, PairWork, as_it_was, difference_bytes, outcome_of
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.ops.verdict import Found, Piece
from lorasurgery.ops.workload import Step, named

if TYPE_CHECKING:
    from lorasurgery.ops.extract import Method
    from lorasurgery.ops.extraction import Extraction

BATCHED_DEVICES: tuple[str, ...] = ("cuda",)  # kinds of device on which small pairs are taken together
_MOST = 64  # pairs of a group
_NUMEL, _SIDE = 1 << 20, 192  # what is small: elements, and rows or columns; beyond, a Krylov basis is less work
_BYTES = 64 << 20  # of the differences of a group
_SPAN = 1 << 30  # bytes of the checkpoint that a group reaches over: results wait for those of the pairs before them


def plan_groups(
    pairs: Sequence[Pair], device: torch.device, method: Method, limit: int | None = None
) -> list[list[int]]:
    """Which pairs are taken together, by their places, from headers alone; the others stand in groups of one.

    Pairs of one shape need not be neighbours: between a model's weights of one shape stand biases and other shapes.

    Args:
        method: Only `auto` leaves the choice to us.
        limit: --memory-limit; a group must leave room for another.
    """
    groups: list[list[int]] = []
    begun: dict[tuple[int, int], tuple[list[int], int]] = {}  # shape -> the last group of it, and where it began
    place = 0
    for i, pair in enumerate(pairs):
        group: list[int] = []
        if device.type in BATCHED_DEVICES and method == "auto" and _is_small(pair):
            group, start = begun.get(pair.matrix, (group, place))
            together = work_cost([pair] * (len(group) + 1))
            full = len(group) == _MOST or difference_bytes(pair) * (len(group) + 1) > _BYTES
            if full or place + pair.nbytes - start > _SPAN or (limit is not None and together > limit // 2):
                group, start = [], place
            begun[pair.matrix] = group, start
        if not group:
            groups.append(group)
        group.append(i)
        place += pair.nbytes
    return groups


def _is_small(pair: Pair) -> bool:
    """Whether a pair is a float32 difference of a few rows or columns to be factored, whatever its values are."""
    base, tuned = pair.base, pair.tuned
    if base is None or base.shape != tuned.shape or pair.treatment not in FACTORED or pair.treatment == "experts":
        return False
    floats = {base.dtype, tuned.dtype} <= FLOAT_DTYPES - {"F64"}
    rows, columns = pair.matrix
    return floats and 0 < rows * columns <= _NUMEL and min(rows, columns) <= _SIDE


def work_cost(pairs: Sequence[Pair]) -> int:
    """Bytes that the work on a group holds."""
    return sum(difference_bytes(p) for p in pairs) * (1 if len(pairs) == 1 else WORKSPACE)


def work_on(job: Extraction, *pairs: Pair) -> Step:
    """The work on one pair, or on a group."""
    return PairWork(job, pairs[0]) if len(pairs) == 1 else GroupWork(job, pairs)


class GroupWork:
    """Several small pairs: read() makes their differences, one above the other, compute() takes them all apart."""

    def __init__(self, job: Extraction, pairs: Sequence[Pair]) -> None:
        self.job, self.pairs = job, pairs
        self.result: Any = None
        self.cost = work_cost(pairs)
        self._found: Found | None = None
        self._way = 0

    @torch.inference_mode()
    def read(self) -> None:
        """Read and subtract both sides of all."""
        with own_stream(self.job.device):
            self._way = 0 if self.job.fallback.attempt(self._read) else 1

    @torch.inference_mode()
    def compute(self) -> None:
        """Decompose all differences at once; one by one where the device's memory does not suffice for that."""
        with own_stream(self.job.device):
            ways = [self._together, self._one_by_one]
            self.result, _ = self.job.fallback.first(self.pairs[0].name, ways, self._way, cpu=False)

    def _read(self) -> None:
        self._found = self.job.difference.read(*(Piece(p.base, p.tuned) for p in self.pairs if p.base is not None))

    def _together(self) -> list[Outcome]:
        """All at once; those that are zero are unchanged, or differ by rounding alone."""
        found, self._found = self._found, None
        assert found is not None
        delta, rounding = found
        if not isinstance(delta, InMemory):
            return [as_it_was(alone) for alone in rounding]
        try:
            stack = delta.matrix.view(len(self.pairs), *self.pairs[0].matrix)
            return [
                as_it_was(alone) if alone else outcome_of(self.job, pair, InMemory(one), svd)
                for pair, alone, one, svd in zip(self.pairs, rounding, stack, self._decomposed(stack), strict=True)
            ]
        finally:
            self.job.difference.give(delta)

    def _one_by_one(self) -> list[Outcome]:
        found = []
        for pair in self.pairs:
            work = PairWork(self.job, pair)
            with named(pair.name):
                work.read()
                work.compute()
            found.append(work.result)
        return found

    def _decomposed(self, stack: Tensor) -> list[TruncatedSVD]:
        try:
            return batched_svd(stack, self.job.choice)
        except SurgeryError:
            for pair, delta in zip(self.pairs, stack, strict=True):  # let it be said of the one that it is about
                with named(pair.name):
                    finite(squared_norm(delta))
            raise
