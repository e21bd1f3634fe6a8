"""The work of extract on one pair of tensors: difference, truncated SVD, measured error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, InMemory
from lorasurgery.linalg.fit import FIT, Fitted, fitted, refitted, scale_within
from lorasurgery.linalg.keep import keeping
from lorasurgery.linalg.norms import losses, squared_norm
from lorasurgery.linalg.ranged import ranged
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import INFINITE, TruncatedSVD, truncated_svd
from lorasurgery.linalg.threads import own_stream
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.difference import Difference
from lorasurgery.ops.expert_factors import ExpertFactors
from lorasurgery.ops.expert_pairs import ExpertPair
from lorasurgery.ops.factored import Factored
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.ops.spill import Spill
from lorasurgery.ops.verdict import Found, Piece
from lorasurgery.ops.verify_values import count_nonfinite
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from lorasurgery.ops.extraction import Extraction

MEASURED = 32 << 20  # bytes at a time of a difference of which only the norm is wanted
TURNED = ("conv1d", "embedding")  # of which PEFT's factors are those of the transposed tensor
_PARTS = 16  # of a difference that the device's memory does not suffice for: one of them at a time


@dataclass(frozen=True)
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


class PairWork:
    """One pair: read() makes the difference, compute() takes it apart.

    Where the device's memory does not suffice for that, compute() reads it anew, in blocks of rows or on the CPU.
    """

    def __init__(self, job: Extraction, pair: Pair) -> None:
        self.job, self.pair = job, pair
        self.result: Any = None
        self.cost = difference_bytes(pair)
        self._found: Found | None = None
        self._way = 0
        if pair.base is not None and pair.base.shape == pair.tuned.shape and not isinstance(pair, ExpertPair):
            job.difference.expect(pair.base, pair.tuned)  # while this waits for memory, the disk can work

    @torch.inference_mode()
    def read(self) -> None:
        """Read and subtract both sides, where they can be compared."""
        with own_stream(self.job.device):
            self._way = 0 if self.job.fallback.attempt(self._read) else 1

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
    def _piece(self) -> Piece:
        assert self.pair.base is not None
        return Piece(self.pair.base, self.pair.tuned)

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
        total: ‖delta‖². power: ΔW is 2^power · delta, of which `fit` is made.
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
