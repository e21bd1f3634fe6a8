"""What extract says: the plan before it starts, and one line a person can act on when it is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.peft_load import Problem
from lorasurgery.errors import some
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.extraction.pairs import FACTORED, Pair
from lorasurgery.ops.factors.losses import total_error, worst
from lorasurgery.report import ModuleReport, Report, percent


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed and is not in the adapter; `norm` is ‖ΔW‖, None when it can't be told."""

    pair: Pair
    norm: float | None


@dataclass
class Rounding:
    """The tensors that differ by rounding alone.

    >>> found = Rounding()
    >>> found.add("lm_head.weight", 1, "float16")
    >>> found.warning
    '1 tensor differs by no more than rounding to float16 and is left out (lm_head.weight); --keep-rounding takes it'
    """

    tensors: int = 0
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)

    def add(self, name: str, tensors: int, dtype: str) -> None:
        """Take what is called by one name: a tensor, or the experts of a parameter."""
        self.tensors += tensors
        self.names.append(name)
        if dtype not in self.dtypes:
            self.dtypes.append(dtype)

    @property
    def dtype(self) -> str:
        """What was rounded to."""
        return " or ".join(self.dtypes)

    @property
    def warning(self) -> str:
        """What is said of them in the report."""
        what, differ, are, them = ("tensors", "differ", "are", "them")
        if self.tensors == 1:
            what, differ, are, them = ("tensor", "differs", "is", "it")
        return (
            f"{self.tensors} {what} {differ} by no more than rounding to {self.dtype} and {are} left out "
            f"({some(self.names)}); --keep-rounding takes {them}"
        )


def plan_report(
    base: Checkpoint, tuned: Checkpoint, out: Path, pairs: Sequence[Pair], choice: RankChoice, dry_run: bool
) -> Report:
    """The report as far as headers can tell it: how many tensors get which treatment, and the most bytes."""
    report = Report("extract", [str(base.path), str(tuned.path)], str(out), dry_run=dry_run)
    counts: Counter[str] = Counter(t.treatment for p in pairs for t in p.tensors)
    matrices = [p for p in pairs if p.treatment in FACTORED]
    upper = sum(p.count * choice.upper(*p.matrix) * sum(p.matrix) for p in matrices)
    report.totals = {"tensors": dict(counts), "parameters_at_most": upper, "model_bytes": base.nbytes}
    if dry_run:
        report.modules = [
            ModuleReport(t.name.removesuffix(".weight"), t.tuned.shape, kind=t.treatment, rank=choice.upper(*p.matrix))
            for p in matrices
            for t in p.tensors
        ]
    report.summary = (
        f"{sum(len(p.tensors) for p in matrices)} matrices to compare, at most {upper:,} parameters in factors; "
        f"{counts['full']} other tensors are stored whole if they changed"
    )
    return report


def summarise(
    report: Report, left_out: Sequence[LeftOut], model_bytes: int, *, unchanged: int, rounding: Rounding
) -> None:
    """Total error and energy over all changed matrices, sizes, and where most of what was lost lies."""
    change, lost = total_error(report)
    error = report.totals["error"]
    report.left_out = [
        ModuleReport(item.pair.name, item.pair.tuned.shape, kind=item.pair.why or "left out", delta_norm=item.norm)
        for item in left_out
    ]
    report.totals |= {
        "unchanged": unchanged, "rounding": rounding.tensors, "full": len(report.full), "left_out": len(left_out),
        "model_bytes": model_bytes, "size_ratio": report.bytes_written / model_bytes if model_bytes else None,
    }  # fmt: skip
    _warn_left_out(report, change)
    if rounding.tensors:
        report.warnings.append(rounding.warning)
    report.summary = (
        f"error {error:.2%}, energy {1 - error**2:.2%} over {len(report.modules)} modules; adapter "
        f"{report.bytes_written / 1e6:.2f} MB, {report.bytes_written / max(model_bytes, 1):.2%} of the model"
        + worst(report.modules, lost)
    )


def warning_of(problem: Problem, base: Checkpoint, out: Path) -> str:
    """What PEFT makes of the adapter otherwise than meant, the tensors by name, and the way out."""
    names = ", ".join(problem.names[:3]) + (f" and {len(problem.names) - 3} more" if len(problem.names) > 3 else "")
    merge = f"`lorasurgery merge {base.path} {out} -o MERGED` applies everything once"
    if problem.kind == "merged wrongly":
        return f"{names} are one tensor, and PEFT adapts each of them: {problem.why}; {merge}" + (
            f", and extract with --full auto --full {problem.full} stores the tensor once" if problem.full else ""
        )
    if problem.kind == "run wrongly":
        return f"{names}: {problem.why}, so PEFT has their update only after merge_and_unload; {merge}"
    verb = "rejects the adapter" if problem.kind == "rejected" else "leaves them out"
    return f"{names}: {problem.why}, so PEFT {verb}; {merge}"


def add_excluded(report: Report, excluded: Sequence[LeftOut], unseen: int) -> None:
    """Say how much of the whole change --target, --exclude and --common leave out, next to what the factors hold.

    Args:
        excluded: What changed of what both sides have.
        unseen: Tensors that can't be compared: one side lacks them or stores them in other numbers.
    """
    unseen += sum(item.norm is None for item in excluded)
    if not excluded and not unseen:
        return
    norm = math.hypot(*(item.norm for item in excluded if item.norm is not None))
    lines = [*report.modules, *report.full, *report.left_out]
    whole = math.hypot(norm, *((m.delta_norm or 0) for m in lines))
    share = (norm / whole) ** 2 if whole else 0.0
    report.totals |= {
        "excluded": len(excluded), "excluded_norm": norm, "excluded_share": share,
        "excluded_unmeasured": unseen,
    }  # fmt: skip
    if excluded:
        report.summary += f"; excluded are {len(excluded)} changed tensors, {percent(share)} of the whole energy"
    if unseen:
        report.summary += f"; {unseen} of the excluded can't be measured"


def _warn_left_out(report: Report, kept: float) -> None:
    if not report.left_out:
        return
    missing = math.hypot(*((m.delta_norm or 0) for m in report.left_out))
    whole = math.hypot(kept, missing, *((m.delta_norm or 0) for m in report.full))
    share = missing / whole if whole else 0.0
    unknown = sum(m.delta_norm is None for m in report.left_out)
    report.totals["left_out_norm"] = missing
    report.totals["left_out_share"] = share
    refused = sorted({m.kind for m in report.left_out if m.kind and " takes no " in m.kind})
    names = ", ".join(m.name for m in report.left_out[:3]) + (" …" if len(report.left_out) > 3 else "")
    report.warnings.append(
        f"{len(report.left_out)} changed tensors are left out ({names}): {share:.2%} of the change's norm is lost"
        + (f", and {unknown} of them are new or resized and can't be measured" if unknown else "")
        + (f"; {', '.join(refused)}" if refused else "; --full auto stores them whole")
    )
