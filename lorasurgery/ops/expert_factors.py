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
        squares: The part of each direction's σ² that lies in this tensor's rows.
    """

    name: str
    shape: tuple[int, ...]
    total: float = 0.0
    lost: float = 0.0
    squares: list[float] = field(default_factory=list)

    def add(self, total: float, lost: float, squares: Sequence[float]) -> None:
        """Count one expert's part in."""
        self.total, self.lost = self.total + total, self.lost + lost
        self.squares = added(self.squares, squares)

    def cut(self, rank: int) -> Share:
        """The same with the directions from `rank` on lost."""
        lost = min(self.total, self.lost + sum(self.squares[rank:]))
        return replace(self, lost=lost, squares=self.squares[:rank])

    def report(self, rank: int, alpha: float) -> ModuleReport:
        """The tensor's line."""
        error = math.sqrt(self.lost / self.total)
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
        """The first `rank` directions of each expert."""
        if rank >= self.rank:
            return self
        alpha, scale = scaling(rank) if rank else (0.0, 1.0)
        up, down = self._split()
        ratio = math.sqrt(self.update.scale / scale)
        up, down = up[:, :rank], down[:, :rank]
        if ratio != 1:
            up, down = (up.float() * ratio).to(up.dtype), (down.float() * ratio).to(down.dtype)
        shares = tuple(s.cut(rank) for s in self.shares)
        return replace(
            self, update=joined(up, down, scale), squares=self.squares[:rank], shares=shares,
            report=replace(summary(self.report.name, self.report.shape, shares), rank=rank, alpha=alpha),
        )  # fmt: skip

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


def added(one: Sequence[float], two: Sequence[float]) -> list[float]:
    """Sums of two lists, the shorter one taken to go on with zeros.

    >>> added([1.0, 2.0], [3.0])
    [4.0, 2.0]
    """
    length = max(len(one), len(two))
    longer = [[*values, *[0.0] * (length - len(values))] for values in (one, two)]
    return [a + b for a, b in zip(*longer, strict=True)]
