"""extract: ΔW = W_tuned − W_base ≈ B·A, one pair of tensors at a time, written as a PEFT adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasurgery.checkpoint.output import check_output
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.extract_report import LeftOut, plan_report, summarise
from lorasurgery.ops.extract_write import AdapterDraft, write_adapter
from lorasurgery.ops.pairs import Pair, Selection, plan_pairs
from lorasurgery.ops.runtime import Clock, check_device_name, resolve_device
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_RANK = 16
Method = Literal["auto", "randomized", "exact"]


@dataclass(frozen=True)
class ExtractOptions:
    """How extract chooses ranks and scales and what it keeps.

    Args:
        choice: Rank by number, energy or tolerance.
        alpha: lora_alpha of the adapter; None makes every scale 1, so the factors say ΔW as they are.
        rslora: scale = alpha/√r instead of alpha/r (arXiv:2312.03732).
        uniform_rank: zero-pad all factors to one rank, the form every server takes.
        svd: `exact` for LAPACK/cuSOLVER, `randomized`, or `auto` by the matrix's size.
        dtype: safetensors name for what is written; None takes the tuned weights' own.
    """

    choice: RankChoice = field(default_factory=lambda: RankChoice(rank=DEFAULT_RANK))
    selection: Selection = field(default_factory=Selection)
    alpha: float | None = None
    rslora: bool = False
    uniform_rank: bool = False
    svd: Method = "auto"
    seed: int = 0
    dtype: str | None = None

    def check(self) -> None:
        """Raise UsageError for values that have no meaning."""
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"--alpha {self.alpha}: expected a positive number")
        if self.dtype not in (None, "F32", "BF16", "F16"):
            raise UsageError("--dtype: an adapter is written as float32, bfloat16 or float16")

    def scaling(self, rank: int) -> tuple[float, float]:
        """(alpha, scale) of a module of this rank."""
        root = math.sqrt(rank) if self.rslora else float(rank)
        alpha = root if self.alpha is None else self.alpha
        return alpha, alpha / root


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Extract a LoRA adapter from a fine-tuned checkpoint by truncated SVD of every changed matrix.

    Example:
        extract("llama", "llama-chat", "adapter", ExtractOptions(RankChoice(rank=64)))

    Args:
        base, tuned: Checkpoint folders or files of the same architecture.
        out: Folder for adapter_config.json and adapter_model.safetensors.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    clock, options = Clock(), options or ExtractOptions()
    options.check()
    check_device_name(device)
    out = Path(out)
    if out.suffix == ".safetensors":
        raise UsageError(f"{out}: an adapter is a folder (config and weights); give a folder name")
    first, second = Checkpoint.open(base), Checkpoint.open(tuned)
    check_output(out, [Path(base), Path(tuned)], overwrite)
    pairs = plan_pairs(first, second, options.selection)
    report = plan_report(first, second, out, pairs, options.choice, dry_run)
    if not dry_run:
        chosen = resolve_device(device)
        report.device = str(chosen)
        job = Extraction(first, second, options, chosen)
        draft = job.run(pairs, progress)
        report.bytes_written = write_adapter(draft, second, out, overwrite)
        report.bytes_read = first.bytes_read + second.bytes_read
        report.modules, report.full = job.modules, job.full
        summarise(report, draft, job.left_out, first.nbytes, unchanged=job.unchanged)
    return clock.stamp(report)


class Extraction:
    """One run over all pairs: factors go to the draft, numbers to the reports; memory holds one pair."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, device: torch.device) -> None:
        self.base, self.tuned, self.options, self.device = base, tuned, options, device
        self.draft = AdapterDraft(base, tuned, options.rslora, options.dtype)
        self.modules: list[ModuleReport] = []
        self.full: list[ModuleReport] = []
        self.left_out: list[LeftOut] = []
        self.unchanged = 0

    def run(self, pairs: Sequence[Pair], progress: Progress | None) -> AdapterDraft:
        """Go through the pairs in the order they lie on disk.

        Raises:
            MismatchError: nothing changed at all.
        """
        total = sum(p.tuned.nbytes for p in pairs if p.treatment != "skipped")
        done = 0
        for pair in pairs:
            if pair.treatment == "skipped":
                continue
            try:
                self._take(pair)
            except SurgeryError as problem:
                raise type(problem)(f"{pair.name}: {problem}") from None
            done += pair.tuned.nbytes
            if progress:
                progress(pair.name, done, total)
        if not (self.draft.factors or self.draft.full or self.left_out):
            raise MismatchError(
                f"{self.tuned.path}: equals {self.base.path} in every tensor compared; nothing to extract"
            )
        if self.options.uniform_rank:
            self.draft.pad()
        return self.draft

    def _take(self, pair: Pair) -> None:
        new = self.tuned.read(pair.tuned.name)
        old = self.base.read(pair.base.name) if pair.base is not None else None
        if old is not None and _same_bytes(old, new):
            self.unchanged += 1
            return
        if pair.treatment in ("linear", "conv1d", "embedding"):
            assert old is not None
            self._factor(pair, old, new)
            return
        norm = _change(old, new)
        if pair.treatment == "full":
            self.draft.full.append(pair)
            self.full.append(ModuleReport(pair.name, pair.tuned.shape, kind=pair.why or "full", delta_norm=norm))
        else:
            self.left_out.append(LeftOut(pair, norm))

    def _factor(self, pair: Pair, old: Tensor, new: Tensor) -> None:
        from lorasurgery.linalg.norms import residual_norm
        from lorasurgery.linalg.svd import truncated_svd

        delta = _difference(old.to(self.device), new.to(self.device))
        del old, new
        options = self.options
        found = truncated_svd(delta, options.choice, method=options.svd, seed=options.seed)
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
        self.draft.add(pair, update.transposed if pair.treatment != "linear" else update, alpha)
        self.modules.append(
            ModuleReport(
                pair.name.removesuffix(".weight"), tuple(delta.shape), kind=pair.treatment, rank=rank, alpha=alpha,
                delta_norm=norm, error=error, energy=1 - error**2,
            )
        )  # fmt: skip


def _same_bytes(old: Tensor, new: Tensor) -> bool:
    import torch

    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(_bytes_of(old), _bytes_of(new))


def _bytes_of(tensor: Tensor) -> Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def _difference(old: Tensor, new: Tensor) -> Tensor:
    """ΔW in float32, or float64 when either side is; never in the storage dtype."""
    import torch

    wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
    return new.to(wide).sub_(old.to(wide)) if new.dtype != wide else new - old.to(wide)


def _change(old: Tensor | None, new: Tensor) -> float | None:
    """‖ΔW‖ of a tensor that is kept or lost whole; None where old and new can't be subtracted."""
    import torch

    if old is None or old.shape != new.shape:
        return None
    return float(torch.linalg.vector_norm(new.to(torch.float64) - old.to(torch.float64)))
