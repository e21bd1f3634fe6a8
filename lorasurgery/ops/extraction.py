"""The work of extract, one pair of tensors at a time: difference, truncated SVD, measured error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, SurgeryError
from lorasurgery.linalg.norms import residual_norm, squared_norm
from lorasurgery.linalg.svd import truncated_svd
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.difference import Difference
from lorasurgery.ops.expert_extraction import ExpertWork
from lorasurgery.ops.expert_pairs import ExpertPair
from lorasurgery.ops.extract import ExtractOptions
from lorasurgery.ops.extract_report import LeftOut
from lorasurgery.ops.extract_write import AdapterDraft
from lorasurgery.ops.factored import Factored, brought
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.report import ModuleReport, Progress


class Extraction:
    """One run over all pairs: factors go to the draft, numbers to the reports; memory holds one pair."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, device: torch.device) -> None:
        self.base, self.tuned, self.options, self.device = base, tuned, options, device
        self.difference = Difference(base, tuned, device)
        self.draft = AdapterDraft(base, tuned, options.rslora, options.dtype)
        self.choice = options.choice
        self.full: list[ModuleReport] = []
        self.left_out: list[LeftOut] = []
        self.unchanged = 0

    @torch.inference_mode()
    def run(self, pairs: Sequence[Pair], progress: Progress | None) -> AdapterDraft:
        """Go through the pairs in the order they lie on disk.

        Raises:
            MismatchError: nothing changed at all.
        """
        total = sum(p.nbytes for p in pairs if p.treatment != "skipped")
        done = 0
        budget = self._set_budget(pairs)
        wanted = [p for p in pairs if p.treatment != "skipped"]
        for pair, following in zip(wanted, [*wanted[1:], None], strict=True):
            if following is not None:
                self.difference.prefetch(following.base, following.tuned)
            try:
                self._take(pair)
            except SurgeryError as problem:
                raise type(problem)(f"{pair.name}: {problem}") from None
            if budget:
                self.draft.hold(budget, self.options.scaling, uniform=self.options.uniform_rank)
            done += pair.nbytes
            if progress:
                progress(pair.name, done, total)
        if not (self.draft.factors or self.draft.full or self.left_out):
            raise MismatchError(
                f"{self.tuned.path}: equals {self.base.path} in every tensor compared; nothing to extract"
            )
        if budget:
            self.draft.spend(budget, self.options.scaling, uniform=self.options.uniform_rank)
        if self.options.uniform_rank:
            self.draft.pad()
        return self.draft

    @property
    def modules(self) -> list[ModuleReport]:
        """The reports of all changed matrices, those that a budget left out last."""
        return [line for _, f in self.draft.factors for line in f.reports] + self.draft.dropped

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

    def _take(self, pair: Pair) -> None:
        if isinstance(pair, ExpertPair):
            return self._factor_experts(pair)
        factored = pair.treatment in FACTORED
        comparable = pair.base is not None and pair.base.shape == pair.tuned.shape
        if not comparable or pair.base is None:
            self._keep_whole(pair, None)
        elif pair.base.dtype in FLOAT_DTYPES and pair.tuned.dtype in FLOAT_DTYPES:
            delta = self.difference.read(pair.base, pair.tuned)
            if delta is None:
                self.unchanged += 1
            elif factored:
                self._factor(pair, delta)
            else:
                self._keep_whole(pair, math.sqrt(squared_norm(delta)))
        elif self.difference.same_bytes(pair.base, pair.tuned):
            self.unchanged += 1
        else:
            self._keep_whole(pair, None)
        return None

    def _factor_experts(self, pair: ExpertPair) -> None:
        found = ExpertWork(self.difference, self.options, self.choice, self.draft.factor_dtype(pair)).factor(pair)
        self.unchanged += len(pair.members) - (len(found.shares) if found else 0)
        if found is not None:
            self.draft.factors.append((pair, found))

    def _keep_whole(self, pair: Pair, norm: float | None) -> None:
        if pair.treatment == "full":
            self.draft.full.append(pair)
            self.full.append(ModuleReport(pair.name, pair.tuned.shape, kind=pair.why or "full", delta_norm=norm))
        else:
            self.left_out.append(LeftOut(pair, norm))

    def _factor(self, pair: Pair, delta: Tensor) -> None:
        options = self.options
        found = truncated_svd(delta, self.choice, method=options.svd, seed=options.seed)
        rank = len(found.s)
        norm = math.sqrt(found.total)
        if rank == 0:  # the bytes differ but the values do not (a signed zero)
            self.unchanged += 1
            return
        alpha, scale = options.scaling(rank)
        root = (found.s / scale).sqrt().to(delta.dtype)
        dtype = self.draft.factor_dtype(pair)
        update = LowRank((found.u * root).to(dtype), (root[:, None] * found.vt).to(dtype), scale)
        error = residual_norm(delta, update) / norm
        report = ModuleReport(
            pair.name.removesuffix(".weight"), tuple(delta.shape), kind=pair.treatment, rank=rank, alpha=alpha,
            delta_norm=norm, error=error, energy=1 - error**2,
        )  # fmt: skip
        kept = update.transposed if pair.treatment in ("conv1d", "embedding") else update
        kept = LowRank(kept.up.cpu().contiguous(), kept.down.cpu().contiguous(), kept.scale)
        self.draft.factors.append((pair, Factored(report, kept, found.s.square().tolist())))
