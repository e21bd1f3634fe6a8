"""Modules as they will be written, and fused experts: factors, singular values and error; cut to a budget, padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.header import DTYPE_BITS
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import RankChoice, allocate
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.factors.compact import CompactFactors, compacted
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


def common_dtype(sources: Sequence[Adapter]) -> str:
    """The widest dtype among the adapters' factors; float16 and bfloat16 together need float32."""
    found = {a.weights.tensors[name].dtype for a in sources for d in a.deltas.values() for name in d.names}
    if len(found) != 1 or max(DTYPE_BITS[d] for d in found) > 16:
        return "F32"
    only = found.pop()
    return only if only in ("F16", "BF16") else "BF16"


@dataclass(slots=True)
class Factored:
    """One module's factors on the CPU, in PEFT's orientation and the dtype of the file.

    Args:
        report: name, shape, rank, alpha, delta_norm and the measured error of the factors.
        held: The update as tensors, or compact: up (out, r), down (r, in), the columns in the order of falling σ.
        squares: σᵢ² of each direction.
        copies: How often the file holds these factors (tied modules).
        bias: lora_B.bias (out,) before division by the scale; None when there is none.
        surplus: Numbers more that a direction takes in the file (modules cut from one tensor, or joined).
        lost: ‖ΔW − BA‖² when only the first r directions are kept, for r from 0 up; only where a budget may cut.
    """

    report: ModuleReport
    held: LowRank | CompactFactors
    squares: Sequence[float]
    copies: int = 1
    bias: Tensor | None = None
    surplus: int = 0
    lost: Sequence[float] = ()

    @property
    def update(self) -> LowRank:
        """The update as tensors; where it is held compact, new ones each time."""
        return self.held if isinstance(self.held, LowRank) else self.held.open()

    @property
    def rank(self) -> int:
        """Directions of the update (of each expert, where there are several)."""
        return self.held.rank

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
            self, report=report, held=update, squares=self.squares[:rank], lost=self.lost[: rank + 1]
        )  # fmt: skip

    def compact(self) -> Factored:
        """The same in little memory where the factors are small, without what only a budget asks for."""
        return replace(self, held=compacted(self.update), squares=(), lost=())

    def pad(self, rank: int, rslora: bool = False) -> Factored:
        """Zero-padded to `rank`; alpha grows with it so that the scale stays."""
        from torch.nn.functional import pad

        more, old = rank - self.update.rank, self.update.rank
        alpha = (self.report.alpha or 0.0) * (rank / old) ** (0.5 if rslora else 1.0) if old else float(rank)
        wide = LowRank(pad(self.update.up, (0, more)), pad(self.update.down, (0, 0, 0, more)), self.update.scale)
        return replace(self, held=wide, report=replace(self.report, rank=rank, alpha=alpha))


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


@dataclass
class Share:
    """What one tensor on disk has in an expert parameter's change.

    Args:
        name: The tensor's.
        shape: The tensor's.
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
            self, held=joined(up[:, :rank], down[:, :rank], self.update.scale), squares=self.squares[:rank],
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
        return replace(self, held=wide, report=replace(self.report, rank=rank, alpha=alpha))

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
