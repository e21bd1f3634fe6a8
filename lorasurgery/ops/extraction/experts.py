"""The work of extract on fused experts: each expert's own truncated SVD, with one expert's ΔW in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lorasurgery.linalg.blocks import Blocks, InMemory
from lorasurgery.linalg.fit import FIT, Fitted, fitted, keeping, refitted, scale_within
from lorasurgery.linalg.norms import losses, ranged, residual_norm, squared_norm
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, truncated_svd
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.extraction.difference import Difference, TensorPair
from lorasurgery.ops.extraction.options import ExtractOptions
from lorasurgery.ops.extraction.pairs import ExpertPair, Pair
from lorasurgery.ops.factors.factored import ExpertFactors, Share, added, joined, summary

Fit = Callable[[int, Blocks, int], Fitted | None]
"""(expert, M, k) -> factors of its ΔW = 2^k·M, or None where nothing is left of it."""


@dataclass
class ExpertWork:
    """Takes the experts of one parameter apart.

    Args:
        choice: Decides each expert's rank; the parameter gets the largest, the others zeros.
        dtype: What factors are written in.
        budget: Whether directions may be cut off later, so that it must be known what each of them holds.
    """

    difference: Difference
    options: ExtractOptions
    choice: RankChoice
    dtype: torch.dtype
    budget: bool = False

    def factor(self, pair: ExpertPair) -> tuple[ExpertFactors | None, set[str]]:
        """The factors of all experts, with their measured errors; None when no expert changed.

        Returns:
            Also the tensors of which something was left out, for it differs by rounding alone: they themselves, or some
            experts of one that holds all.
        """
        rank = self.choice.upper(*pair.matrix)
        for _ in range(2):  # a scale that depends on the rank is known when the ranks are
            scale = self.options.scaling(rank)[1]
            work = _Parameter(self, pair, scale)
            work.run(lambda _, delta, power, scale=scale: self._decomposed(delta, scale, power))  # type: ignore[misc]
            rank = max((u.rank for u in work.updates.values()), default=0)
            if not rank:
                return None, work.rounding
            found, wanted = work.joined(rank, self.options.alpha_of(rank, scale)), self.options.scaling(rank)[1]
            if self.budget or wanted == scale:  # with a budget, the rank is known when all modules are
                return found, work.rounding
        return self.again(pair, found, wanted), work.rounding

    def again(self, pair: ExpertPair, found: ExpertFactors, scale: float) -> ExpertFactors:
        """The same directions, fitted again for another scale."""

        def fit(expert: int, delta: Blocks, power: int) -> Fitted | None:
            own = found.of(expert)
            own = own.transposed if pair.turned else own
            if not bool(own.up.any()):
                return None
            return refitted(delta, own.with_scale(math.ldexp(own.scale, -power)), scale_within(scale, power))

        work = _Parameter(self, pair, scale)
        work.run(fit)
        again = work.joined(found.rank, self.options.alpha_of(found.rank, scale))
        return replace(again, copies=found.copies, surplus=found.surplus)

    def _decomposed(self, delta: Blocks, scale: float, power: int) -> Fitted | None:
        found = self._svd(delta, self.choice)
        if not len(found.s):
            return None

        def fit(found: TruncatedSVD) -> Fitted:
            return fitted(delta, found, scale_within(scale, power), self.dtype)

        return keeping(self.choice, found, fit, lambda rank: self._svd(delta, RankChoice(rank=rank)))

    def _svd(self, delta: Blocks, choice: RankChoice) -> TruncatedSVD:
        options = self.options
        return truncated_svd(delta, choice, method=options.svd, seed=options.seed, to_come=FIT)


class _Parameter:
    """One pass over the experts of a parameter."""

    def __init__(self, job: ExpertWork, pair: ExpertPair, scale: float) -> None:
        self.job, self.pair, self.scale = job, pair, scale
        self.updates: dict[int, LowRank] = {}
        self.squares: list[float] = []
        self.rounding: set[str] = set()
        self.shares = {m.name: Share(m.name.removesuffix(".weight"), m.tuned.shape) for m in pair.members}

    def run(self, fit: Fit) -> None:
        """Take expert after expert; what is kept is on the CPU and in the dtype of the file."""
        for expert in range(self.pair.count):
            delta, rounding = self.job.difference.read(*_pieces(self.pair, expert))
            members = zip(self.pair.of(expert), rounding, strict=True)
            self.rounding |= {self.shares[member.name].name for member, alone in members if alone}
            if not isinstance(delta, InMemory):
                continue
            matrix, power = ranged(delta)
            made = fit(expert, matrix, power)
            if made is not None:
                self._keep(expert, matrix, made, power)
            self.job.difference.give(delta)

    def _keep(self, expert: int, delta: Blocks, fit: Fitted, power: int) -> None:
        assert isinstance(delta, InMemory)
        update = fit.update
        for member, rows in _rows(self.pair.of(expert), delta.shape[0]):
            part, own = delta.matrix[rows], update.part(rows)
            lost = residual_norm(part, own) ** 2
            prefixes = losses(part, own) if self.job.budget else []
            numbers = [math.ldexp(x, 2 * power) for x in (squared_norm(part), lost, *prefixes)]
            self.shares[member.name].add(numbers[0], numbers[1], numbers[2:])
        self.squares = added(self.squares, [math.ldexp(x, 2 * power) for x in fit.squares])
        kept = update.transposed if self.pair.turned else update
        self.updates[expert] = LowRank(kept.up.cpu().contiguous(), kept.down.cpu().contiguous(), self.scale)

    def joined(self, rank: int, alpha: float) -> ExpertFactors:
        """All experts side by side; those that did not change, and directions that one lacks, are zero."""
        (out, into), experts = self.pair.matrix, self.pair.count
        up = torch.zeros(out, rank, experts, dtype=self.job.dtype)
        down = torch.zeros(experts, rank, into, dtype=self.job.dtype)
        for e, update in self.updates.items():
            up[:, : update.rank, e], down[e, : update.rank] = update.up, update.down
        shares = tuple(s for s in self.shares.values() if s.total)
        report = replace(summary(self.pair.name, (experts, out, into), shares), rank=rank, alpha=alpha)
        return ExpertFactors(report, joined(up, down, self.scale), self.squares[:rank], experts=experts, shares=shares)


def _pieces(pair: ExpertPair, expert: int) -> Iterator[TensorPair]:
    for member in pair.of(expert):
        assert member.base is not None
        yield TensorPair(member.base, member.tuned, expert if pair.is_stack else None)


def _rows(members: tuple[Pair, ...], height: int) -> Iterator[tuple[Pair, slice]]:
    step = height // len(members)
    return ((member, slice(i * step, (i + 1) * step)) for i, member in enumerate(members))
