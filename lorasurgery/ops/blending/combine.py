"""The work of rerank and blend, one module at a time: load the factors, bring them together, truncate, measure."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.journal import Run
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.engine.threads import load_solvers, thread_pool
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.core import Core, distance, inner
from lorasurgery.linalg.elementwise import combine, knots_ties, sum_of
from lorasurgery.linalg.fit import narrowed, too_far
from lorasurgery.linalg.methods import ELEMENTWISE, Elementwise
from lorasurgery.linalg.norms import norm_of
from lorasurgery.linalg.rank import EVERYTHING, RankChoice
from lorasurgery.linalg.thin import NOT_FINITE
from lorasurgery.linalg.truncate import (
    BEYOND,
    Truncated,
    all_finite,
    core_of,
    rank_of,
    to_store,
    truncated_core,
    truncated_matrix,
)
from lorasurgery.lowrank import LowRank, Update
from lorasurgery.ops.blending.join import Joint, Term
from lorasurgery.ops.blending.options import BlendOptions
from lorasurgery.ops.blending.write import Composed
from lorasurgery.ops.factors.factored import Factored, brought, unit_scale
from lorasurgery.ops.factors.workload import Workload, spill
from lorasurgery.report import ModuleReport, Progress

_AT_ONCE = 8  # modules at a time, memory permitting
_COPIES, _LEAST = 8, 64 << 20  # factors in float64, their products and what they become, beside the file's bytes


class Composition:
    """One run over all modules; memory holds one module's factors and the adapter that comes out.

    Args:
        draft: Where the finished modules go; it knows the dtype they are written in.
    """

    def __init__(self, joints: Sequence[Joint], options: BlendOptions, draft: Composed, device: torch.device) -> None:
        self.joints, self.options, self.draft, self.device = joints, options, draft, device
        self.dtype = torch_dtype(draft.dtype)
        self.alone = len(draft.sources) == 1
        self.choice = options.choice
        self.budget: int | None = None
        self.fallback = Fallback()

    def run(self, budget: int | None, progress: Progress | None, run: Run) -> None:
        """Go through the modules in file order; a budget is spent when all of them are known.

        Args:
            run: The journal, shared by several ranks.
        """
        load_solvers(self.device)
        self.budget = budget
        if budget and self.options.method in ELEMENTWISE:
            costs = [sum(j.shape) * self.dtype.itemsize for j in self.joints]
            self.choice = brought(budget, costs, self.choice.max_rank if self.choice else None)
        with thread_pool() as threads, spill(run) as factors:
            names, sizes = [j.path for j in self.joints], [j.nbytes for j in self.joints]
            load = Workload(
                run, self.joints, names, sizes, factors.put, factors.get, self._accept, factors.sync, progress
            )
            work = [_BlendJob(self, j) for j in self.joints]
            room = max(2 * max((w.cost for w in work), default=0), _LEAST)
            load.work(Pipeline(room, (1, min(_AT_ONCE, threads), 1)), partial(_BlendJob, self))

    def _accept(self, joint: Joint, found: Factored) -> None:
        self.draft.add(joint, found)
        if self.budget:
            self.draft.hold(self.budget, uniform=self.options.uniform_rank)

    @torch.inference_mode()
    def take(self, joint: Joint) -> Factored:
        """One module of the new adapter."""
        ways = [partial(self._take, joint, device) for device in (self.device, torch.device("cpu"))]
        try:
            return self.fallback.first(joint.path, ways)[0]
        except SurgeryError as problem:
            where = ", ".join(dict.fromkeys(t.adapter.path for t in joint.terms))
            raise type(problem)(f"{where}: {joint.path}: {problem}") from None

    def _take(self, joint: Joint, device: torch.device) -> Factored:
        weights = [t.weight for t in joint.terms]
        method = self.options.method
        if method in ELEMENTWISE or not joint.is_thin:
            found = self._dense(joint, [t.load_update().to(device) for t in joint.terms], weights)
        else:
            terms = [_load(t, device) for t in joint.terms]
            found = (self._concatenated if method == "cat" else self._factored)(joint, terms, weights)
        bias = [t for t in joint.terms if t.delta.bias]
        return replace(found, bias=self._bias(joint, bias)) if bias else found

    def _factored(self, joint: Joint, terms: list[LowRank], weights: list[float]) -> Factored:
        choice = self.choice or EVERYTHING
        if self.options.method == "knots-ties":
            terms = [knots_ties(terms, weights, density=self.options.share)]
            if not all_finite(terms[0]):
                raise SurgeryError(BEYOND)
        else:
            terms = [t.times(w) for t, w in zip(terms, weights, strict=True)]
        core = core_of(terms, choice)
        plain = self.alone and joint.terms[0].delta.stores_factors
        same = rank_of(core, choice) == terms[0].rank
        if plain and same and choice.budget is None and terms[0].scale > 0:
            return self._unchanged(joint, terms[0], core)
        return self._cut(joint, truncated_core(core, choice, joint.shape, self.dtype, stepwise=bool(self.budget)))

    def _unchanged(self, joint: Joint, term: LowRank, core: Core) -> Factored:
        """The factors as they are, for there is nothing to gain: only --dtype may round them.

        Padded to one rank they are for servers that know one alpha, so the scale goes into lora_B.
        """
        if self.options.uniform_rank:
            term = LowRank(term.up.float() * term.scale, term.down)
        written, norm = narrowed(term, self.dtype), math.sqrt(core.total)
        rounding = term.scale * distance(term.with_scale(1.0), written.with_scale(1.0))
        found = self._found(joint, written, core.singular.square().tolist(), norm, rounding)
        return replace(found, report=replace(found.report, alpha=term.scale * term.rank))

    def _concatenated(self, joint: Joint, terms: list[LowRank], weights: list[float]) -> Factored:
        if not all(map(all_finite, terms)):
            raise SurgeryError(NOT_FINITE)
        ups = [t.up.float() * (t.scale * w) for t, w in zip(terms, weights, strict=True)]
        kept = LowRank(torch.cat(ups, 1), torch.cat([t.down.float() for t in terms]))
        sizes = [abs(t.scale * w) * norm_of(t.up.to(torch.float64)) for t, w in zip(terms, weights, strict=True)]
        if not math.isclose(norm_of(kept.up), math.hypot(*sizes), rel_tol=1e-3):
            raise SurgeryError(too_far(self.dtype, 1.0, math.hypot(*sizes)))
        written, norm = narrowed(kept, self.dtype), math.sqrt(max(inner([kept], [kept]), 0.0))
        return self._found(joint, written, [0.0] * kept.rank, norm, distance(kept, written))

    def _dense(self, joint: Joint, terms: list[Update], weights: list[float]) -> Factored:
        """What only a matrix can hold: a blend by entries, or a sum with terms that have no thin factors."""
        if not all(all_finite(t) for t in terms):  # comparisons would pass over a NaN in silence
            raise SurgeryError(NOT_FINITE)
        if self.options.method in ELEMENTWISE:
            choice = self.choice or RankChoice(rank=max(t.delta.rank for t in joint.terms))
            dense = self._combine(joint, terms, weights)
        elif self.options.method == "linear":
            choice = self.choice or RankChoice(rank=min(joint.shape))
            dense = sum_of([t.times(w) for t, w in zip(terms, weights, strict=True)])
        else:
            raise SurgeryError(f"--method {self.options.method} needs thin factors; rerank the adapters first")
        seed, stepwise = self.options.seed, bool(self.budget)
        return self._cut(joint, truncated_matrix(dense, choice, self.dtype, seed=seed, stepwise=stepwise))

    def _combine(self, joint: Joint, terms: Sequence[Update], weights: list[float]) -> Tensor:
        options, method = self.options, self.options.method
        entrywise: Elementwise = "ties" if method == "knots-ties" else method  # type: ignore[assignment]
        seed = options.seed ^ (zlib.crc32(joint.path.encode()) << 20)
        return combine(terms, weights, entrywise, density=options.share, seed=seed)

    def _bias(self, joint: Joint, terms: list[Term]) -> Tensor:
        """What is added to the layer's bias: a vector, blended by the same rule as the matrix."""
        updates, weights = [t.load_bias() for t in terms], [t.weight for t in terms]
        if self.options.method in ("linear", "cat"):
            total = sum(u.times(w).dense() for u, w in zip(updates, weights, strict=True))
        else:
            total = self._combine(joint, updates, weights)
        assert isinstance(total, Tensor)
        return total.squeeze(1).to(self.dtype)

    def _cut(self, joint: Joint, made: Truncated) -> Factored:
        return self._found(joint, made.update, made.squares, made.norm, made.error, made.left)

    def _found(
        self, joint: Joint, written: LowRank, squares: list[float], norm: float, lost: float, left: Sequence[float] = ()
    ) -> Factored:
        """A module as it will be written.

        Args:
            lost: ‖ΔW − BA‖.
            left: Its square for the first r directions alone, where a budget may cut.
        """
        update, error = to_store(written, norm), lost / norm if norm else 0.0
        report = ModuleReport(
            joint.path, joint.shape, kind=joint.kind, rank=update.rank, alpha=unit_scale(update.rank)[0],
            delta_norm=norm, error=error, energy=1 - error**2,
        )  # fmt: skip
        return Factored(report, update, squares, lost=left)


def _load(term: Term, device: torch.device) -> LowRank:
    update = term.load()
    return LowRank(update.up.to(device), update.down.to(device), update.scale)


class _BlendJob:
    """One module's way through the stages; its factors are read where they are used, for they are small."""

    def __init__(self, job: Composition, joint: Joint) -> None:
        self.job, self.joint = job, joint
        self.result: Any = None
        dense = job.options.method in ELEMENTWISE or not joint.is_thin
        self.cost = 4 * math.prod(joint.shape) if dense else _COPIES * joint.nbytes

    def read(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Make the module."""
        self.result = self.job.take(self.joint)
