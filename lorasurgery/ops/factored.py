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
        lost: ‖ΔW − BA‖² when only the first r directions are kept, for r from 0 up; only where a budget may cut.
    """

    report: ModuleReport
    update: LowRank
    squares: Sequence[float]
    copies: int = 1
    bias: Tensor | None = None
    surplus: int = 0
    lost: Sequence[float] = ()

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
        """The first `rank` directions as they are, with the error that they were found to leave.

        The scale stays; where that of the new rank is another one, the factors are still to be made for it.
        """
        if rank >= self.update.rank:
            return self
        report = restated(self.report, rank, scaling(rank)[0] if rank else 0.0, self.lost[rank])
        update = LowRank(self.update.up[:, :rank].contiguous(), self.update.down[:rank].contiguous(), self.update.scale)
        return replace(
            self, report=report, update=update, squares=self.squares[:rank], lost=self.lost[: rank + 1]
        )  # fmt: skip

    def pad(self, rank: int, rslora: bool = False) -> Factored:
        """Zero-padded to `rank`; alpha grows with it so that the scale stays."""
        from torch.nn.functional import pad

        more, old = rank - self.update.rank, self.update.rank
        alpha = (self.report.alpha or 0.0) * (rank / old) ** (0.5 if rslora else 1.0) if old else float(rank)
        wide = LowRank(pad(self.update.up, (0, more)), pad(self.update.down, (0, 0, 0, more)), self.update.scale)
        return replace(self, update=wide, report=replace(self.report, rank=rank, alpha=alpha))


def restated(report: ModuleReport, rank: int, alpha: float, lost: float) -> ModuleReport:
    """A module's line for another rank, of which ‖ΔW − BA‖² is known."""
    norm = report.delta_norm or 0.0
    error = math.sqrt(lost) / norm if norm else 0.0
    return replace(report, rank=rank, alpha=alpha, error=error, energy=1 - error**2)


def spend(
    modules: Sequence[Factored], room: int, scaling: Scaling, *, uniform: bool = False, least: Sequence[int] = ()
) -> list[Factored]:
    """Cut every module so that all together take at most `room` bytes and keep the most energy.

    Args:
        uniform: All get one rank, for they will be padded to it anyway; otherwise some may come out with rank 0.
        least: Directions that each module gets whatever they hold; there must be room for them.
    """
    costs = [m.cost for m in modules]
    if uniform:
        ranks = [even_share(room, costs)] * len(modules)
    else:
        given = list(least) or [0] * len(modules)
        spectra = [m.squares[g:] for m, g in zip(modules, given, strict=True)]
        more = allocate(spectra, costs, room - sum(g * c for g, c in zip(given, costs, strict=True)))
        ranks = [g + r for g, r in zip(given, more, strict=True)]
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
    modules: Sequence[Factored], files: Sequence[PlannedFile], budget: int, scaling: Scaling, *, uniform: bool,
    least: Sequence[int] = (),
) -> list[Factored]:  # fmt: skip
    """Cut the modules so that the files they are planned in take at most `budget` bytes, all else in it counted.

    Args:
        least: Directions that each module must keep.

    Raises:
        SurgeryError: the budget holds not even these, or not one direction.
    """
    overhead = file_bytes(files) - sum(m.cost * m.rank for m in modules)
    costs = [m.cost for m in modules] or [0]
    needed = sum(costs) if uniform else max(min(costs), sum(g * c for g, c in zip(least, costs, strict=False)))
    if budget < overhead + needed:
        raise too_small(budget, overhead, needed)
    return spend(modules, budget - overhead, scaling, uniform=uniform, least=least)


def file_bytes(files: Sequence[PlannedFile]) -> int:
    """Bytes of planned files, their headers among them."""
    return sum(len(f.header()) + sum(t.nbytes for t in f.tensors) for f in files)


def too_small(budget: int, overhead: int, factors: int) -> SurgeryError:
    """What is said of a budget that can't be kept, with the least that can."""
    return SurgeryError(
        f"--budget of {budget:,} bytes holds nothing: header and tensors stored whole take {overhead:,}, "
        f"the least of factors {factors:,}; give at least {overhead + factors:,}"
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
