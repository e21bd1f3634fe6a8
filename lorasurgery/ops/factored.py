"""Modules as they will be written: factors, their singular values and error; cut to a budget, padded to one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import RankChoice, allocate
from lorasurgery.lowrank import LowRank
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.checkpoint.plan import PlannedFile

Scaling = Callable[[int], tuple[float, float]]
"""rank -> (alpha, scale)."""


# With a budget, a module may bring this many times the rank that all could have alike; --max-rank says otherwise.
GENEROUS = 8


def unit_scale(rank: int) -> tuple[float, float]:
    """alpha = r, so that the scale is 1 and the factors say ΔW as they are."""
    return float(rank), 1.0


@dataclass
class Factored:
    """One module's factors on the CPU, in PEFT's orientation and the dtype of the file.

    Args:
        report: name, shape, rank, alpha, delta_norm and the measured error of the factors.
        update: up (out, r), down (r, in), the columns in the order of falling σ.
        squares: σᵢ² of each direction.
        copies: How often the file holds these factors (tied modules).
        bias: lora_B.bias (out,) before division by the scale; None when there is none.
        surplus: Numbers more that a direction takes in the file (modules cut from one tensor, or joined).
    """

    report: ModuleReport
    update: LowRank
    squares: Sequence[float]
    copies: int = 1
    bias: Tensor | None = None
    surplus: int = 0

    @property
    def rank(self) -> int:
        """Directions of the update (of each expert, where there are several)."""
        return self.update.rank

    @property
    def reports(self) -> tuple[ModuleReport, ...]:
        """A line for each tensor of the base that the factors belong to."""
        return (self.report,)

    @property
    def cost(self) -> int:
        """Bytes of one direction in the file."""
        return (sum(self.update.shape) * self.copies + self.surplus) * self.update.up.element_size()

    def cut(self, rank: int, scaling: Scaling) -> Factored:
        """The first `rank` directions; what is dropped is orthogonal to the rest, so its energy adds to the error's."""
        if rank >= self.update.rank:
            return self
        norm = self.report.delta_norm or 0.0
        lost = ((self.report.error or 0.0) * norm) ** 2 + sum(self.squares[rank:])
        alpha, scale = scaling(rank) if rank else (0.0, 1.0)
        ratio = math.sqrt(self.update.scale / scale)
        up, down = self.update.up[:, :rank], self.update.down[:rank]
        if ratio != 1:
            up, down = (up.float() * ratio).to(up.dtype), (down.float() * ratio).to(down.dtype)
        error = min(1.0, math.sqrt(lost) / norm) if norm else 0.0
        report = replace(self.report, rank=rank, alpha=alpha, error=error, energy=1 - error**2)
        update = LowRank(up.contiguous(), down.contiguous(), scale)
        return replace(self, report=report, update=update, squares=self.squares[:rank])

    def pad(self, rank: int, rslora: bool = False) -> Factored:
        """Zero-padded to `rank`; alpha grows with it so that the scale stays."""
        from torch.nn.functional import pad

        more, old = rank - self.update.rank, self.update.rank
        alpha = (self.report.alpha or 0.0) * (rank / old) ** (0.5 if rslora else 1.0) if old else float(rank)
        wide = LowRank(pad(self.update.up, (0, more)), pad(self.update.down, (0, 0, 0, more)), self.update.scale)
        return replace(self, update=wide, report=replace(self.report, rank=rank, alpha=alpha))


def spend(modules: Sequence[Factored], room: int, scaling: Scaling, *, uniform: bool = False) -> list[Factored]:
    """Cut every module so that all together take at most `room` bytes and keep the most energy.

    Args:
        uniform: All get one rank, for they will be padded to it anyway; otherwise some may come out with rank 0.
    """
    if uniform:
        ranks = [even_share(room, [m.cost for m in modules])] * len(modules)
    else:
        ranks = allocate([m.squares for m in modules], [m.cost for m in modules], room)
    return [m.cut(rank, scaling) for m, rank in zip(modules, ranks, strict=True)]


def hold(modules: Sequence[Factored], budget: int, scaling: Scaling, *, uniform: bool) -> list[Factored] | None:
    """Drop directions that can't be among the best any more: memory stays near the budget while modules come in.

    Returns:
        The cut modules, or None while all of them together are small enough.
    """
    if sum(m.cost * m.rank for m in modules) <= 2 * budget:
        return None
    return spend(modules, max(budget, sum(m.cost for m in modules)), scaling, uniform=uniform)


def fit(
    modules: Sequence[Factored], files: Sequence[PlannedFile], budget: int, scaling: Scaling, *, uniform: bool
) -> list[Factored]:
    """Cut the modules so that the files they are planned in take at most `budget` bytes, all else in it counted.

    Raises:
        SurgeryError: the budget holds not even one direction.
    """
    factors = sum(m.cost * m.rank for m in modules)
    overhead = sum(len(f.header()) + sum(t.nbytes for t in f.tensors) for f in files) - factors
    _check_room(modules, budget, overhead, uniform)
    return spend(modules, budget - overhead, scaling, uniform=uniform)


def _check_room(modules: Sequence[Factored], budget: int, overhead: int, uniform: bool) -> None:
    least = (sum if uniform else min)([m.cost for m in modules] or [0])
    if budget < overhead + least:
        raise SurgeryError(
            f"--budget of {budget:,} bytes holds nothing: header and tensors stored whole take {overhead:,}, "
            f"the least of factors {least:,}; give at least {overhead + least:,}"
        )


def even_share(budget: int, costs: Sequence[int]) -> int:
    """The rank that all modules can have alike within a budget of bytes; at least 1.

    >>> even_share(100, [10, 20])
    3
    """
    return max(1, budget // max(1, sum(costs)))


def brought(budget: int, costs: Sequence[int], max_rank: int | None) -> RankChoice:
    """How many directions a dense matrix is decomposed to before they compete for the budget.

    >>> brought(1000, [10, 40], None).rank
    160
    """
    return RankChoice(rank=max_rank or GENEROUS * even_share(budget, costs))
