"""The work of extract on one pair of tensors: difference, truncated SVD, measured error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, InMemory, Streamed
from lorasurgery.linalg.fit import FIT, fitted
from lorasurgery.linalg.norms import squared_norm
from lorasurgery.linalg.svd import TruncatedSVD, finite, truncated_svd
from lorasurgery.linalg.threads import own_stream
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.difference import Piece
from lorasurgery.ops.expert_extraction import ExpertWork
from lorasurgery.ops.expert_pairs import ExpertPair
from lorasurgery.ops.factored import Factored
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.ops.spill import Spill
from lorasurgery.ops.verify_values import count_nonfinite
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from lorasurgery.ops.extraction import Extraction


@dataclass(frozen=True)
class Outcome:
    """What one pair gave: factors, or the norm of a change that is not factored, or nothing.

    Args:
        unchanged: Tensors that are equal on both sides.
        broken: Whether a value is not finite, so that the tensor can only be stored whole.
    """

    found: Factored | None = None
    norm: float | None = None
    unchanged: int = 0
    broken: bool = False


class PairWork:
    """One pair: read() makes the difference, compute() takes it apart."""

    def __init__(self, job: Extraction, pair: Pair) -> None:
        self.job, self.pair = job, pair
        self.result: Any = None
        self.cost = difference_bytes(pair)
        self._delta: InMemory | Streamed | None = None
        if pair.base is not None and pair.base.shape == pair.tuned.shape and not isinstance(pair, ExpertPair):
            job.difference.expect(pair.base, pair.tuned)  # while this waits for memory, the disk can work

    @torch.inference_mode()
    def read(self) -> None:
        """Read and subtract both sides, where they can be compared."""
        with own_stream(self.job.device):
            self._read()

    @torch.inference_mode()
    def compute(self) -> None:
        """Decompose the difference, or measure it."""
        with own_stream(self.job.device):
            self._compute()

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
            piece, limit = Piece(pair.base, pair.tuned), self.job.limit
            large = limit is not None and self.cost > limit // 4
            self._delta = difference.streamed(piece, (limit or 0) // 4) if large else difference.read(piece)
            self.result = Outcome(unchanged=1) if self._delta is None else None

    def _check_stored(self) -> None:
        """A tensor that is stored whole is not looked at otherwise."""
        info = self.pair.tuned
        stored = self.pair.treatment == "full" and info.is_float and not self.job.options.allow_nonfinite
        if stored and count_nonfinite(self.job.tuned, info):
            raise SurgeryError("holds NaN or infinity in the tuned checkpoint; --allow-nonfinite stores it all the same")

    def _compute(self) -> None:
        if isinstance(self.pair, ExpertPair):
            self.result = self._experts(self.pair)
        elif self.result is None:
            assert self._delta is not None
            square = squared_norm(self._delta)
            if self.job.options.allow_nonfinite and not math.isfinite(square):
                self.result = Outcome(broken=True)
            elif self.pair.treatment in FACTORED:
                self.result = self._factor(self._delta)
            else:
                self.result = Outcome(norm=math.sqrt(finite(square)))
            if isinstance(self._delta, InMemory):
                self.job.difference.give(self._delta)
            self._delta = None

    def _experts(self, pair: ExpertPair) -> Outcome:
        job = self.job
        found = ExpertWork(job.difference, job.options, job.choice, job.draft.factor_dtype(pair)).factor(pair)
        return Outcome(found, unchanged=len(pair.members) - (len(found.shares) if found else 0))

    def _factor(self, delta: Blocks) -> Outcome:
        options = self.job.options
        return outcome_of(
            self.job, self.pair, delta,
            truncated_svd(delta, self.job.choice, method=options.svd, seed=options.seed, to_come=FIT),
        )  # fmt: skip


def outcome_of(job: Extraction, pair: Pair, delta: Blocks, found: TruncatedSVD) -> Outcome:
    """The factors of a decomposed pair as they will be written, with the error measured on them."""
    rank, norm = len(found.s), math.sqrt(found.total)
    if rank == 0:  # the bytes differ but the values do not (a signed zero)
        return Outcome(unchanged=1)
    alpha, scale = job.options.scaling(rank)
    fit = fitted(delta, found, scale, job.draft.factor_dtype(pair))
    error = fit.error / norm
    report = ModuleReport(
        pair.name.removesuffix(".weight"), (delta.shape[0], delta.shape[1]), kind=pair.treatment, rank=rank,
        alpha=alpha, delta_norm=norm, error=error, energy=1 - error**2,
    )  # fmt: skip
    kept = fit.update.transposed if pair.treatment in ("conv1d", "embedding") else fit.update
    kept = LowRank(kept.up.cpu().contiguous(), kept.down.cpu().contiguous(), kept.scale)
    return Outcome(Factored(report, kept, fit.squares))


def difference_bytes(pair: Pair) -> int:
    """Bytes of a pair's difference in float32 (of one expert's, where there are several)."""
    rows, columns = pair.matrix
    return rows * columns * (8 if "F64" in (pair.tuned.dtype, pair.base.dtype if pair.base else "") else 4)


def packed(factors: Spill, outcome: Outcome) -> Any:
    """An outcome as JSON, its factors put beside the output."""
    found = factors.put(outcome.found) if outcome.found is not None else None
    return {"found": found, "norm": outcome.norm, "unchanged": outcome.unchanged, "broken": outcome.broken}


def unpacked(factors: Spill, record: Any) -> Outcome:
    """The outcome that was packed."""
    found = factors.get(record["found"]) if record["found"] is not None else None
    return Outcome(found, record["norm"], record["unchanged"], record["broken"])
