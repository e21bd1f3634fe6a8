"""Factors of all experts of one parameter, side by side as PEFT holds them, with a report for each tensor on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.lowrank import LowRank
from lorasurgery.ops.factored import Factored, Scaling
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Share:
    """What one tensor on disk has in an expert parameter's change.

    Args:
        name, shape: The tensor's.
        total: ‖ΔW‖² of the tensor.
        lost: What the factors as written leave of it, squared.
        prefixes: What they leave when only the first r directions of each expert are kept, for r from 0 up; only where
            a budget may cut.
    """

    name: str
    shape: tuple[int, ...]
    total: float = 0.0
    lost: float = 0.0
    prefixes: list[float] = field(default_factory=list)

    def add(self, total: float, lost: float, prefixes: Sequence[float] = ()) -> None:
        """Count one expert's part in."""
        self.total, self.lost = self.total + total, self.lost + lost
        self.prefixes = added(self.prefixes, prefixes, last=True)

    def cut(self, rank: int) -> Share:
        """The same with the directions from `rank` on left out."""
        return replace(self, lost=self.prefixes[min(rank, len(self.prefixes) - 1)], prefixes=self.prefixes[: rank + 1])

    def report(self, rank: int, alpha: float) -> ModuleReport:
        """The tensor's line."""
        error = math.sqrt(self.lost / self.total) if self.total else 0.0
        return ModuleReport(
            self.name, self.shape, kind="experts", rank=rank, alpha=alpha, delta_norm=math.sqrt(self.total),
            error=error, energy=1 - error**2,
        )  # fmt: skip


@dataclass
class ExpertFactors(Factored):
    """Like Factored, for many experts: every expert has the same rank, and a direction is one of each expert.

    Args:
        update: up (out, r·E), column k·E + e being direction k of expert e; down (r·E, in), an expert's rows together.
        squares: Σσ² over the experts, direction by direction.
        shares: One for each changed tensor on disk.
    """

    experts: int = 1
    shares: tuple[Share, ...] = ()

    @property
    def rank(self) -> int:
        """Directions of each expert."""
        return self.update.rank // self.experts

    @property
    def reports(self) -> tuple[ModuleReport, ...]:
        """A line for each changed tensor on disk."""
        return tuple(s.report(self.rank, self.report.alpha or 0.0) for s in self.shares)

    @property
    def cost(self) -> int:
        """Bytes of one direction of every expert in the file."""
        return super().cost * self.experts

    def cut(self, rank: int, scaling: Scaling) -> ExpertFactors:
        """The first `rank` directions of each expert, under the scale that they have."""
        if rank >= self.rank:
            return self
        up, down = self._split()
        shares = tuple(s.cut(rank) for s in self.shares)
        report = replace(
            summary(self.report.name, self.report.shape, shares), rank=rank, alpha=scaling(rank)[0] if rank else 0.0
        )
        return replace(
            self, update=joined(up[:, :rank], down[:, :rank], self.update.scale), squares=self.squares[:rank],
            shares=shares, report=report,
        )  # fmt: skip

    def of(self, expert: int) -> LowRank:
        """One expert's own factors."""
        up, down = self._split()
        return LowRank(up[:, :, expert], down[expert], self.update.scale)

    def pad(self, rank: int, rslora: bool = False) -> ExpertFactors:
        """Zero-padded to `rank` for each expert; alpha grows with it so that the scale stays."""
        from torch.nn.functional import pad

        more, old = rank - self.rank, self.rank
        alpha = (self.report.alpha or 0.0) * (rank / old) ** (0.5 if rslora else 1.0) if old else float(rank)
        up, down = self._split()
        wide = joined(pad(up, (0, 0, 0, more)), pad(down, (0, 0, 0, more)), self.update.scale)
        return replace(self, update=wide, report=replace(self.report, rank=rank, alpha=alpha))

    def _split(self) -> tuple[Tensor, Tensor]:
        """up (out, r, E) and down (E, r, in)."""
        up, down = self.update.up, self.update.down
        return up.reshape(len(up), -1, self.experts), down.reshape(self.experts, -1, down.shape[1])


def joined(up: Tensor, down: Tensor, scale: float) -> LowRank:
    """PEFT's layout of target_parameters from up (out, r, E) and down (E, r, in).

    >>> import torch
    >>> joined(torch.zeros(4, 2, 3), torch.zeros(3, 2, 5), 1.0).shape
    (4, 5)
    """
    return LowRank(up.flatten(1).contiguous(), down.flatten(0, 1).contiguous(), scale)


def summary(name: str, shape: tuple[int, ...], shares: Sequence[Share]) -> ModuleReport:
    """The whole parameter's line."""
    whole = Share(name, shape, sum(s.total for s in shares), sum(s.lost for s in shares))
    return whole.report(0, 0.0)


def added(one: Sequence[float], two: Sequence[float], *, last: bool = False) -> list[float]:
    """Sums of two lists, the shorter one taken to go on with zeros, or with its last number.

    >>> added([1.0, 2.0], [3.0]), added([1.0, 2.0], [3.0], last=True)
    ([4.0, 2.0], [4.0, 5.0])
    """
    length = max(len(one), len(two))
    longer = [[*v, *[v[-1] if last and v else 0.0] * (length - len(v))] for v in (one, two)]
    return [a + b for a, b in zip(*longer, strict=True)]
