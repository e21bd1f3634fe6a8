"""What was lost over all modules of a result: its totals, the rule that does not hold, and where most of it lies."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from lorasurgery.linalg.rank import RankChoice
from lorasurgery.report import ModuleReport, Report


def total_error(report: Report) -> tuple[float, float]:
    """(‖ΔW‖, what of it was lost) over all modules; the totals get error, energy and the range of ranks."""
    change = math.hypot(*((m.delta_norm or 0) for m in report.modules))  # squares might overflow
    lost = math.hypot(*((m.error or 0) * (m.delta_norm or 0) for m in report.modules))
    error = lost / change if change else 0.0
    ranks = [m.rank or 0 for m in report.modules]
    report.totals |= {
        "modules": len(report.modules), "delta_norm": change, "error": error, "energy": 1 - error**2,
        "rank_min": min(ranks, default=0), "rank_max": max(ranks, default=0), "adapter_bytes": report.bytes_written,
    }  # fmt: skip
    return change, lost


def rule_warning(modules: Sequence[ModuleReport], choice: RankChoice | None, dtypes: Collection[str]) -> list[str]:
    """What is said where energy or tolerance do not hold for the factors as they are written; nothing where they do.

    >>> found = [ModuleReport("q_proj", (4, 4), rank=2, error=0.3, energy=0.91)]
    >>> rule_warning(found, RankChoice(tolerance=0.2, max_rank=2), ["float32"])
    ['--tolerance 0.2 does not hold in 1 module (q_proj: error 0.3): --max-rank 2 allows no more directions']

    Args:
        modules: The lines of the report.
        dtypes: What factors are written in.
    """
    beyond = [m for m in modules if choice and not choice.holds(m.error or 0.0)]
    if choice is None or not beyond:
        return []
    worst = max(beyond, key=lambda m: m.error or 0.0)
    cap = choice.max_rank
    why = "no more directions stand above the rounding of float32"
    if cap is not None and all((m.rank or 0) >= cap for m in beyond):
        why = f"--max-rank {cap} allows no more directions"
    elif set(dtypes) - {"float32", "float64"}:
        why = f"rounding to {' and '.join(sorted(dtypes))} alone loses that much; --dtype float32 loses less"
    elif worst.kind == "experts":
        why = "it holds for the experts' matrices as PEFT joins them, not for each tensor they are made of"
    asked = f"--energy {choice.energy}" if choice.energy is not None else f"--tolerance {choice.tolerance}"
    reached = f"energy {1 - (worst.error or 0.0) ** 2:.12g}" if choice.energy else f"error {worst.error:.4g}"
    count = f"{len(beyond)} module{'s' if len(beyond) > 1 else ''}"
    return [f"{asked} does not hold in {count} ({worst.name}: {reached}): {why}"]


def worst(modules: Sequence[ModuleReport], lost: float) -> str:
    """Name the modules that hold most of the squared error, with their share: where more rank would help.

    Args:
        lost: ‖ΔW − BA‖ of all together.
    """
    if lost <= 0:
        return ""
    shares = sorted(((((m.error or 0) * (m.delta_norm or 0)) / lost) ** 2, m.name) for m in modules)[::-1]
    return "; most was lost in " + ", ".join(f"{name} ({share:.0%})" for share, name in shares[:3])
