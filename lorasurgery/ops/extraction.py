"""The work of extract over all pairs of tensors: read, decomposed and measured, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.flow import Flow
from lorasurgery.checkpoint.journal import Run
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.host import Host
from lorasurgery.errors import MismatchError
from lorasurgery.linalg.coarse import pays
from lorasurgery.linalg.fallback import Fallback
from lorasurgery.linalg.half_step import step_at_one
from lorasurgery.linalg.svd import may_round
from lorasurgery.linalg.threads import load_solvers, team
from lorasurgery.ops.difference import Difference
from lorasurgery.ops.expert_extraction import ExpertWork
from lorasurgery.ops.extract import ExtractOptions
from lorasurgery.ops.extract_report import LeftOut, Rounding
from lorasurgery.ops.extract_write import AdapterDraft
from lorasurgery.ops.factored import brought
from lorasurgery.ops.pair_groups import plan_groups, work_cost, work_on
from lorasurgery.ops.pair_work import Again, Outcome, packed, unpacked
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.ops.spill import spill
from lorasurgery.ops.workload import Workload, named
from lorasurgery.report import ModuleReport, Progress

_LANES = 8  # pairs at a time, memory permitting
_LEAST = 64 << 20


class Extraction:
    """One run over all pairs: factors go to the draft, numbers to the reports; memory holds the largest difference.

    Args:
        run: Knows what is finished already, and which of the pairs are this rank's.
        limit: Bytes that differences may take together (--memory-limit); None for the largest and a quarter.
    """

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, host: Host, options: ExtractOptions, device: torch.device, run: Run,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.base, self.tuned, self.options, self.device = base, tuned, options, device
        self.job, self.limit = run, limit
        self.draft = AdapterDraft(base, tuned, host, options.rslora, options.dtype)
        self.choice = options.choice
        self.full: list[ModuleReport] = []
        self.left_out: list[LeftOut] = []
        self.excluded: list[LeftOut] = []
        self.unchanged = 0
        self.rounding = Rounding()
        self.budget: int | None = None
        self.fallback = Fallback()

    @cached_property
    def on_cpu(self) -> Difference:
        """Differences on the CPU, where the device's memory does not suffice."""
        return self._differences(torch.device("cpu"))

    def _differences(self, device: torch.device, room: int = 0) -> Difference:
        return Difference(
            self.base, self.tuned, device, room, coarse=self._coarse, keep_rounding=self.options.keep_rounding
        )

    def run(self, pairs: Sequence[Pair], progress: Progress | None) -> AdapterDraft:
        """Go through the pairs in the order they lie on disk; only the first rank's draft has all of them.

        Raises:
            MismatchError: nothing changed at all.
        """
        load_solvers(self.device)
        self.budget = self._set_budget(pairs)
        wanted = [p for p in pairs if p.treatment != "skipped" or p.is_measured]
        with spill(self.job) as factors, team() as threads:
            load = Workload(
                self.job, wanted, [p.name for p in wanted], [p.nbytes for p in wanted], partial(packed, factors),
                partial(unpacked, factors), self._accept, factors.sync, progress,
            )  # fmt: skip
            # what may not be finite is looked at one by one
            method = "exact" if self.options.allow_nonfinite else self.options.svd
            groups = plan_groups(wanted, self.device, method, self.limit)
            room = self._room([work_cost([wanted[i] for i in g]) for g in groups])
            self.difference = self._differences(self.device, room)
            load.work(Flow(room, _lanes(threads)), partial(work_on, self), groups)
        if self.job.ranks.first:
            self._complete()
        return self.draft

    def _complete(self) -> None:
        if not (self.draft.factors or self.draft.full or self.left_out):
            alike, rest = f"equals {self.base.path} in every tensor compared", ""
            if self.rounding.tensors:
                alike = f"differs from {self.base.path} by no more than rounding to {self.rounding.dtype}"
                rest = "; --keep-rounding takes that"
            changed = f"; {len(self.excluded)} that are left out by name changed" if self.excluded else ""
            raise MismatchError(f"{self.tuned.path}: {alike}; nothing to extract{rest}{changed}")
        if self.budget:
            self.draft.spend(self.budget, self.options.scaling, uniform=self.options.uniform_rank)
        self._settle_scales()
        if self.options.uniform_rank:
            self.draft.pad()

    def _settle_scales(self) -> None:
        """With --alpha a scale depends on a rank that a budget, or modules joined in memory, tell only at the end.

        Factors that were made for another one are made anew, from a second look at the pair: rounding them once more
        would cost accuracy, and nobody would know how much.
        """
        wanted = self.draft.scales(self.options.scaling)
        with team():
            for i, ((pair, found), scale) in enumerate(zip(self.draft.factors, wanted, strict=True)):
                if found.update.scale != scale:
                    with named(pair.name):
                        again = Again(self, pair, found, scale)
                        again.read()
                        again.compute()
                        self.draft.factors[i] = pair, again.result

    def expert_work(self, pair: Pair, difference: Difference) -> ExpertWork:
        """The work on the experts of a pair."""
        return ExpertWork(difference, self.options, self.choice, self.draft.factor_dtype(pair), bool(self.budget))

    def _room(self, costs: Sequence[int]) -> int:
        """The largest difference and a small one beside it; of small ones, several at a time.

        Two of the largest would be twice the memory and no faster: all threads work on one, and what comes next is read
        into the system's cache meanwhile.
        """
        if self.limit:
            return self.limit // 2
        return max(5 * max(costs, default=0) // 4, _LEAST)

    @property
    def _coarse(self) -> bool:
        """Whether sketches are made in bfloat16: where they may, and the processor is made for it."""
        return pays(self.device) and may_round(self.choice, self.options.svd)

    def _accept(self, pair: Pair, outcome: Outcome) -> None:
        """Take what one pair gave, in the order of the pairs."""
        if pair.treatment == "skipped":
            if not (outcome.unchanged or outcome.rounding):
                self.excluded.append(LeftOut(pair, outcome.norm))
            return
        self.unchanged += outcome.unchanged
        if outcome.rounding:
            self.rounding.add(pair.name, outcome.rounding, _coarser(pair))
        if outcome.found is not None:
            self.draft.factors.append((pair, outcome.found))
        elif not (outcome.unchanged or outcome.rounding):
            self._keep_whole(pair, outcome.norm, broken=outcome.broken)
        if self.budget:
            self.draft.hold(self.budget, self.options.scaling, uniform=self.options.uniform_rank)

    def _keep_whole(self, pair: Pair, norm: float | None, *, broken: bool) -> None:
        if broken or pair.treatment == "full":
            self.draft.full.append(pair)
            why = "not finite" if broken else pair.why or "full"
            self.full.append(ModuleReport(pair.name, pair.tuned.shape, kind=why, delta_norm=norm))
        else:
            self.left_out.append(LeftOut(pair, norm))

    @property
    def modules(self) -> list[ModuleReport]:
        """The reports of all changed matrices, those that a budget left out last."""
        return [line for _, f in self.draft.factors for line in f.reports] + self.draft.dropped

    @property
    def dtypes(self) -> set[str]:
        """What factors are written in, as people type it."""
        return {str(f.update.up.dtype).removeprefix("torch.") for _, f in self.draft.factors}

    @property
    def capped(self) -> list[str]:
        """Modules that brought all they were allowed to and kept it: a budget would have given them more."""
        if self.options.choice.budget is None:
            return []
        found = [f for _, f in self.draft.factors]
        return [f.report.name for f in found if f.rank == self.choice.upper(*f.update.shape) < min(f.update.shape)]

    def _set_budget(self, pairs: Sequence[Pair]) -> int | None:
        """Bytes to spend, and how many directions a module may bring to the competition."""
        choice = self.options.choice
        if choice.budget is None:
            return None
        budget = choice.budget.bytes_of(self.base.nbytes)
        matrices = [p for p in pairs if p.treatment in FACTORED]
        costs = [p.count * sum(p.matrix) * self.draft.factor_dtype(p).itemsize for p in matrices]
        self.choice = brought(budget, costs, choice.max_rank)
        return budget


def _coarser(pair: Pair) -> str:
    """The dtype of a pair's two whose rounding shows, as people type it."""
    dtypes = [torch_dtype(side.dtype) for side in (pair.base, pair.tuned) if side is not None]
    return str(max(dtypes, key=step_at_one)).removeprefix("torch.")


def _lanes(threads: int) -> tuple[int, int, int]:
    """Readers, pairs decomposed at a time and writers; one thread is kept to itself, with nothing beside it."""
    return (1, min(_LANES, threads), 1) if threads > 1 else (0, 1, 1)
