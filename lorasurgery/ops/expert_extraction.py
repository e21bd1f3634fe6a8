"""The work of extract on fused experts: each expert's own truncated SVD, with one expert's ΔW in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasurgery.linalg.blocks import InMemory
from lorasurgery.linalg.fit import FIT, fitted
from lorasurgery.linalg.norms import residual_norm, squared_norm
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, truncated_svd
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.difference import Difference
from lorasurgery.ops.expert_factors import ExpertFactors, Share, added, joined, summary
from lorasurgery.ops.expert_pairs import ExpertPair
from lorasurgery.ops.extract import ExtractOptions
from lorasurgery.ops.pairs import Pair
from lorasurgery.ops.verdict import Piece


@dataclass
class ExpertWork:
    """Takes the experts of one parameter apart.

    Args:
        choice: Decides each expert's rank; the parameter gets the largest, the others zeros.
        dtype: What factors are written in.
    """

    difference: Difference
    options: ExtractOptions
    choice: RankChoice
    dtype: torch.dtype

    def factor(self, pair: ExpertPair) -> tuple[ExpertFactors | None, set[str]]:
        """The factors of all experts, with their measured errors; None when no expert changed.

        Returns:
            Also the tensors of which something was left out, for it differs by rounding alone: they themselves, or some
            experts of one that holds all.
        """
        rank = self.choice.upper(*pair.matrix)
        while True:  # a scale that depends on the rank is known when the ranks are
            alpha, scale = self.options.scaling(rank)
            work = _Parameter(self, pair, scale)
            work.run()
            top = max((u.rank for u in work.updates.values()), default=0)
            if not top:
                return None, work.rounding
            alpha, wanted = self.options.scaling(top)
            if wanted == scale:
                return work.joined(top, alpha), work.rounding
            rank = top


class _Parameter:
    """One pass over the experts of a parameter."""

    def __init__(self, job: ExpertWork, pair: ExpertPair, scale: float) -> None:
        self.job, self.pair, self.scale = job, pair, scale
        self.updates: dict[int, LowRank] = {}
        self.squares: list[float] = []
        self.rounding: set[str] = set()
        self.shares = {m.name: Share(m.name.removesuffix(".weight"), m.tuned.shape) for m in pair.members}

    def run(self) -> None:
        """Decompose expert after expert; what is kept is on the CPU and in the dtype of the file."""
        for expert in range(self.pair.count):
            delta, rounding = self.job.difference.read(*_pieces(self.pair, expert))
            members = zip(self.pair.of(expert), rounding, strict=True)
            self.rounding |= {self.shares[member.name].name for member, alone in members if alone}
            if not isinstance(delta, InMemory):
                continue
            options = self.job.options
            found = truncated_svd(delta, self.job.choice, method=options.svd, seed=options.seed, to_come=FIT)
            if len(found.s):
                self._keep(expert, delta.matrix, found)
            self.job.difference.give(delta)

    def _keep(self, expert: int, delta: Tensor, found: TruncatedSVD) -> None:
        fit = fitted(delta, found, self.scale, self.job.dtype)
        update, squares = fit.update, torch.tensor(fit.squares, dtype=torch.float64)
        for member, rows in _rows(self.pair.of(expert), delta.shape[0]):
            part = squares * _shares(update.up, rows)
            lost = residual_norm(delta[rows], update.part(rows)) ** 2
            self.shares[member.name].add(squared_norm(delta[rows]), lost, part.tolist())
        self.squares = added(self.squares, squares.tolist())
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


def _pieces(pair: ExpertPair, expert: int) -> Iterator[Piece]:
    for member in pair.of(expert):
        assert member.base is not None
        yield Piece(member.base, member.tuned, expert if pair.is_stack else None)


def _shares(up: Tensor, rows: slice) -> Tensor:
    """How much of each direction lies in some of the rows."""
    squares = up.to(torch.float64).square().cpu()
    return torch.nan_to_num(squares[rows].sum(0) / squares.sum(0))


def _rows(members: tuple[Pair, ...], height: int) -> Iterator[tuple[Pair, slice]]:
    step = height // len(members)
    return ((member, slice(i * step, (i + 1) * step)) for i, member in enumerate(members))
