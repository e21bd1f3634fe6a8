"""The work of extract on one pair of tensors: difference, truncated SVD, measured error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.journal import Run
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.host import Host
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.engine.threads import load_solvers, own_stream, thread_pool
from lorasurgery.errors import MismatchError, SurgeryError
from lorasurgery.linalg.blocks import Blocks, InMemory
from lorasurgery.linalg.fit import FIT, Fitted, fitted, keeping, refitted, scale_within
from lorasurgery.linalg.krylov import pays
from lorasurgery.linalg.norms import losses, ranged, squared_norm
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.rounding import step_at_one
from lorasurgery.linalg.svd import INFINITE, WORKSPACE, TruncatedSVD, batched_svd, finite, may_round, truncated_svd
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.extraction.difference import Difference, Found, TensorPair, count_nonfinite
from lorasurgery.ops.extraction.experts import ExpertWork
from lorasurgery.ops.extraction.options import ExtractOptions
from lorasurgery.ops.extraction.pairs import FACTORED, ExpertPair, Pair
from lorasurgery.ops.extraction.report import LeftOut, Rounding
from lorasurgery.ops.extraction.write import AdapterDraft
from lorasurgery.ops.factors.factored import ExpertFactors, Factored, brought
from lorasurgery.ops.factors.workload import ModuleJob, Spill, Workload, named, spill
from lorasurgery.report import ModuleReport, Progress

if TYPE_CHECKING:
    from lorasurgery.ops.extraction.options import SvdMethod

MEASURED = 32 << 20  # bytes at a time of a difference of which only the norm is wanted
TURNED = ("conv1d", "embedding")  # of which PEFT's factors are those of the transposed tensor
_PARTS = 16  # of a difference that the device's memory does not suffice for: one of them at a time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pair gave: factors, or the norm of a change that is not factored, or nothing.

    Args:
        unchanged: Tensors that are equal on both sides.
        rounding: Tensors that differ by rounding alone, and are left out.
        broken: Whether a value is not finite, so that the tensor can only be stored whole.
    """

    found: Factored | None = None
    norm: float | None = None
    unchanged: int = 0
    broken: bool = False
    rounding: int = 0


class _PairJob:
    """What is read, and whether the device had memory for it: for one pair or several."""

    def __init__(self, job: Extraction, cost: int) -> None:
        self.job, self.cost = job, cost
        self.result: Any = None
        self._found: Found | None = None
        self._way = 0  # the first to be tried of the ways to compute

    @torch.inference_mode()
    def read(self) -> None:
        """Read and subtract both sides, where they can be compared."""
        with own_stream(self.job.device):
            self._way = 0 if self.job.fallback.attempt(self._read) else 1

    def _read(self) -> None:
        raise NotImplementedError


class PairWork(_PairJob):
    """One pair: read() makes the difference, compute() takes it apart.

    Where the device's memory does not suffice for that, compute() reads it again, in blocks of rows or on the CPU.
    """

    def __init__(self, job: Extraction, pair: Pair) -> None:
        super().__init__(job, difference_bytes(pair))
        self.pair = pair
        if pair.base is not None and pair.base.shape == pair.tuned.shape and not isinstance(pair, ExpertPair):
            job.difference.expect(pair.base, pair.tuned)  # while this waits for memory, the disk can work

    @torch.inference_mode()
    def compute(self) -> None:
        """Decompose the difference, or measure it."""
        if self.result is not None:
            return
        ways = [self._as_read, self._in_blocks, self._on_cpu]
        if isinstance(self.pair, ExpertPair):
            ways = [partial(self._experts, self.pair, d) for d in (self.job.difference, self.job.on_cpu)]
        with own_stream(self.job.device):
            self.result, _ = self.job.fallback.first(self.pair.name, ways, self._way)

    def _read(self) -> None:
        pair, difference = self.pair, self.job.difference
        comparable = pair.base is not None and pair.base.shape == pair.tuned.shape
        if isinstance(pair, ExpertPair):
            return
        if not comparable or pair.base is None:
            self._check_stored()
            self.result = Outcome()
        elif pair.base.dtype not in FLOAT_DTYPES or pair.tuned.dtype not in FLOAT_DTYPES:
            self.result = Outcome(unchanged=int(difference.same_bytes(pair.base, pair.tuned)))
        else:
            self._found = self._difference(difference)
            self.result = as_it_was(*self._found.rounding) if self._found.delta is None else None

    def _difference(self, difference: Difference) -> Found:
        """ΔW as it fits into --memory-limit."""
        limit = self.job.limit
        room = None if limit is None else limit // 4
        if self.pair.treatment == "skipped":
            room = min(MEASURED, room or MEASURED)
        if room is not None and _whole_bytes(self.pair) > room:
            return difference.streamed(self._piece, room)
        return difference.read(self._piece)

    @property
    def _piece(self) -> TensorPair:
        assert self.pair.base is not None
        return TensorPair(self.pair.base, self.pair.tuned)

    def _check_stored(self) -> None:
        """A tensor that is stored whole is not looked at otherwise."""
        info = self.pair.tuned
        stored = self.pair.treatment == "full" and info.is_float and not self.job.options.allow_nonfinite
        if stored and count_nonfinite(self.job.tuned, info):
            raise SurgeryError(
                "holds NaN or infinity in the tuned checkpoint; --allow-nonfinite stores it all the same"
            )

    def _as_read(self) -> Outcome:
        found, self._found = self._found, None
        assert found is not None
        try:
            return self._apart(found)
        finally:
            if isinstance(found.delta, InMemory):
                self.job.difference.give(found.delta)

    def _in_blocks(self) -> Outcome:
        return self._apart(self.job.difference.streamed(self._piece, self.cost // _PARTS))

    def _on_cpu(self) -> Outcome:
        return self._apart(self._difference(self.job.on_cpu))

    def _apart(self, found: Found) -> Outcome:
        delta = found.delta
        if delta is None:
            return as_it_was(*found.rounding)
        matrix, power = ranged(delta)
        square = squared_norm(matrix)
        if not math.isfinite(square):
            if self.job.options.allow_nonfinite or self.pair.treatment == "skipped":
                return Outcome(broken=True)
            raise SurgeryError(self._why_not_finite())
        if self.pair.treatment in FACTORED:
            return self._factor(matrix, power)
        return Outcome(norm=math.ldexp(math.sqrt(square), power))

    def _why_not_finite(self) -> str:
        """Two finite numbers may lie further apart than their dtype goes."""
        sides = ((self.job.base, self.pair.base), (self.job.tuned, self.pair.tuned))
        if any(info is not None and count_nonfinite(side, info) for side, info in sides):
            return INFINITE
        return "the two checkpoints are further apart than float32 can tell (3.4e38); --exclude leaves the tensor out"

    def _experts(self, pair: ExpertPair, difference: Difference) -> Outcome:
        job = self.job
        work = job.expert_work(pair, difference)
        found, rounding = work.factor(pair)
        changed = {share.name for share in found.shares} if found else set()
        return Outcome(found, unchanged=len(pair.members) - len(changed | rounding), rounding=len(rounding))

    def _factor(self, delta: Blocks, power: int) -> Outcome:
        options = self.job.options
        found = truncated_svd(delta, self.job.choice, method=options.svd, seed=options.seed, to_come=FIT)
        return outcome_of(self.job, self.pair, delta, found, power)


class Again(PairWork):
    """A second look at a pair whose factors were made for another scale; the result is the pair's new factors."""

    def __init__(self, job: Extraction, pair: Pair, found: Factored, scale: float) -> None:
        super().__init__(job, pair)
        self.found, self.scale = found, scale

    def _factor(self, delta: Blocks, power: int) -> Any:
        turned = self.pair.treatment in TURNED
        update = self.found.update.transposed if turned else self.found.update
        update = update.with_scale(math.ldexp(update.scale, -power))
        fit = refitted(delta, update, scale_within(self.scale, power))
        made = factored_of(self.job, self.pair, delta, fit, squared_norm(delta), power)
        return replace(made, copies=self.found.copies, surplus=self.found.surplus)

    def _experts(self, pair: ExpertPair, difference: Difference) -> Any:
        assert isinstance(self.found, ExpertFactors)
        return self.job.expert_work(pair, difference).again(pair, self.found, self.scale)


def as_it_was(rounding: bool) -> Outcome:
    """The outcome of a tensor that did not change, but perhaps for its rounding."""
    return Outcome(rounding=1) if rounding else Outcome(unchanged=1)


def outcome_of(job: Extraction, pair: Pair, delta: Blocks, found: TruncatedSVD, power: int = 0) -> Outcome:
    """The factors of a decomposed pair as they will be written, with the error measured on them.

    Args:
        power: ΔW is 2^power · delta.
    """
    if not len(found.s):  # the bytes differ but the values do not (a signed zero)
        return Outcome(unchanged=1)
    fit = fit_of(job, delta, found, job.draft.factor_dtype(pair), power)
    return Outcome(factored_of(job, pair, delta, fit, found.total, power))


def fit_of(job: Extraction, delta: Blocks, found: TruncatedSVD, dtype: torch.dtype, power: int = 0) -> Fitted:
    """Factors of as many directions as the rule needs in this dtype, with the scale of their rank."""
    options = job.options

    def fit(found: TruncatedSVD) -> Fitted:
        return fitted(delta, found, scale_within(options.scaling(len(found.s))[1], power), dtype)

    def more(rank: int) -> TruncatedSVD:
        choice = RankChoice(rank=rank)
        return truncated_svd(delta, choice, method=options.svd, seed=options.seed, to_come=FIT)

    return keeping(job.choice, found, fit, more)


def factored_of(job: Extraction, pair: Pair, delta: Blocks, fit: Fitted, total: float, power: int = 0) -> Factored:
    """A pair's factors as they lie in the file, with what is stated of them.

    Args:
        total: ‖delta‖².
        power: ΔW is 2^power · delta, of which `fit` is made.
    """
    rank, norm = fit.update.rank, math.sqrt(total)
    error, update = fit.error / norm, fit.update.with_scale(math.ldexp(fit.update.scale, power))
    report = ModuleReport(
        pair.name.removesuffix(".weight"), (delta.shape[0], delta.shape[1]), kind=pair.treatment, rank=rank,
        alpha=job.options.alpha_of(rank, update.scale), delta_norm=math.ldexp(norm, power), error=error,
        energy=1 - error**2,
    )  # fmt: skip
    kept = update.transposed if pair.treatment in TURNED else update
    kept = LowRank(kept.up.cpu().contiguous(), kept.down.cpu().contiguous(), kept.scale)
    lost = [math.ldexp(x, 2 * power) for x in losses(delta, fit.update)] if job.budget else ()
    return Factored(report, kept, [math.ldexp(x, 2 * power) for x in fit.squares], lost=lost)


def difference_bytes(pair: Pair) -> int:
    """Bytes of a pair's difference that are held at a time; of what is only measured, a part suffices."""
    size = _whole_bytes(pair)
    return min(size, MEASURED) if pair.treatment == "skipped" else size


def _whole_bytes(pair: Pair) -> int:
    """Bytes of a pair's difference in float32 (of one expert's, where there are several)."""
    rows, columns = pair.matrix
    return rows * columns * (8 if "F64" in (pair.tuned.dtype, pair.base.dtype if pair.base else "") else 4)


def packed(factors: Spill, outcome: Outcome) -> Any:
    """An outcome as JSON, its factors put beside the output."""
    found = factors.put(outcome.found) if outcome.found is not None else None
    return {
        "found": found, "norm": outcome.norm, "unchanged": outcome.unchanged, "broken": outcome.broken,
        "rounding": outcome.rounding,
    }  # fmt: skip


def unpacked(factors: Spill, record: Any) -> Outcome:
    """The outcome that was packed."""
    found = factors.get(record["found"]) if record["found"] is not None else None
    return Outcome(found, record["norm"], record["unchanged"], record["broken"], record["rounding"])


BATCHED_DEVICES: tuple[str, ...] = ("cuda",)  # kinds of device on which small pairs are taken together
_MOST = 64  # pairs of a group
_NUMEL, _SIDE = 1 << 20, 192  # what is small: elements, and rows or columns; beyond, a Krylov basis is less work
_BYTES = 64 << 20  # of the differences of a group
_SPAN = 1 << 30  # bytes of the checkpoint that a group reaches over: results wait for those of the pairs before them


def plan_groups(
    pairs: Sequence[Pair], device: torch.device, method: SvdMethod, limit: int | None = None
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


def work_on(job: Extraction, *pairs: Pair) -> ModuleJob:
    """The work on one pair, or on a group."""
    return PairWork(job, pairs[0]) if len(pairs) == 1 else GroupWork(job, pairs)


class GroupWork(_PairJob):
    """Several small pairs: read() makes their differences, one above the other, compute() takes them all apart."""

    def __init__(self, job: Extraction, pairs: Sequence[Pair]) -> None:
        super().__init__(job, work_cost(pairs))
        self.pairs = pairs

    @torch.inference_mode()
    def compute(self) -> None:
        """Decompose all differences at once; one by one where the device's memory does not suffice for that."""
        with own_stream(self.job.device):
            ways = [self._together, self._one_by_one]
            self.result, _ = self.job.fallback.first(self.pairs[0].name, ways, self._way, cpu=False)

    def _read(self) -> None:
        self._found = self.job.difference.read(*(TensorPair(p.base, p.tuned) for p in self.pairs if p.base is not None))

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
        with spill(self.job) as factors, thread_pool() as threads:
            load = Workload(
                self.job, wanted, [p.name for p in wanted], [p.nbytes for p in wanted], partial(packed, factors),
                partial(unpacked, factors), self._accept, factors.sync, progress,
            )  # fmt: skip
            # what may not be finite is looked at one by one
            method = "exact" if self.options.allow_nonfinite else self.options.svd
            groups = plan_groups(wanted, self.device, method, self.limit)
            room = self._room([work_cost([wanted[i] for i in g]) for g in groups])
            self.difference = self._differences(self.device, room)
            load.work(Pipeline(room, _lanes(threads)), partial(work_on, self), groups)
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

        Factors that were made for another one are made again, from a second look at the pair: rounding them once more
        would cost accuracy, and nobody would know how much.
        """
        wanted = self.draft.scales(self.options.scaling)
        with thread_pool():
            for i, ((pair, found), scale) in enumerate(zip(self.draft.factors, wanted, strict=True)):
                if found.held.scale != scale:
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
            found = outcome.found if self.budget else outcome.found.compact()
            self.draft.factors.append((pair, found))
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
        return [f.report.name for f in found if f.rank == self.choice.upper(*f.held.shape) < min(f.held.shape)]

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
