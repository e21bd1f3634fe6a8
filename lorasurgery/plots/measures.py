"""What can be drawn of a module: a title, a unit and a scale; its spectrum, and how several modules become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lorasurgery.report import Change, Comparison, ModuleReport, Report, Spectrum

Scale = Literal["size", "share", "signed", "whole"]


@dataclass(frozen=True)
class Measure:
    """One number of a module, and how it is shown.

    Args:
        field: The attribute of a module's report.
        title: In plain words, for above a map.
        noun: One word, where the title is known already.
        unit: For beside a colour bar; short, because a map of few kinds is low.
        scale: `size` is logarithmic where values lie far apart, and 0 means no change; `share` is a share of 1,
            `signed` lies around 0; `whole` is a count.
        colours: matplotlib's name of a colour map that the colour-blind can read.
        missing: What it means that a module has no number.
    """

    field: str
    title: str
    noun: str
    unit: str
    scale: Scale
    colours: str
    missing: str = "no number"

    @property
    def percent(self) -> bool:
        """Whether values are written as percents."""
        return self.scale == "share" or self.field == "relative"

    def text(self, value: float) -> str:
        """A value in at most two or three digits.

        >>> RELATIVE.text(0.0123), DELTA_NORM.text(0.000123), COSINE.text(-0.5)
        ('1.2%', '0.00012', '−0.50')
        """
        if self.scale == "signed":
            return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"
        if self.scale == "whole":
            return f"{value:.0f}"
        least = 0 if self.scale == "share" else 10
        number, sign = (100 * value, "%") if self.percent else (value, "")
        return (f"{number:.0f}" if least <= number < 1e5 else f"{number:#.2g}") + sign


RELATIVE = Measure("relative", "How much each tensor changed", "relative change", "‖ΔW‖ / ‖W‖", "size", "viridis",
                   "not in both, of another shape, or zero before")  # fmt: skip
COSINE = Measure("cosine", "Together (+) or against each other (−)", "cosine", "cosine of the ΔW", "signed", "PuOr",
                 "not in both")  # fmt: skip
OVERLAP = Measure("overlap", "Column space in common", "overlap", "mean cos² of angles", "share", "cividis",
                  "not in both")  # fmt: skip
DELTA_NORM = Measure("delta_norm", "Size of the change", "size", "‖ΔW‖ (Frobenius)", "size", "viridis")
ERROR = Measure("error", "Error of the adapter", "error", "‖ΔW−BA‖ / ‖ΔW‖", "share", "cividis")
RETENTION = Measure("retention", "Kept after rounding", "kept", "share of the update", "share", "cividis")
RANK = Measure("rank", "Rank", "rank", "rank", "whole", "viridis")

_PANELS: tuple[tuple[type[ModuleReport], tuple[Measure, ...]], ...] = (
    (Change, (RELATIVE,)),
    (Comparison, (COSINE, OVERLAP)),
    (Spectrum, (DELTA_NORM,)),
    (ModuleReport, (DELTA_NORM, ERROR, RETENTION, RANK)),
)


def measures_of(report: Report) -> list[Measure]:
    """The measures that a report has numbers for; ranks alone are no picture."""
    wanted = next((ms for kind, ms in _PANELS if any(isinstance(m, kind) for m in report.modules)), ())
    found = [x for x in wanted if any(value(m, x) is not None for m in report.modules)]
    return [] if found == [RANK] else found


def value(module: ModuleReport, measure: Measure) -> float | None:
    """A module's number; None where it has none or none that is finite."""
    return _finite(getattr(module, measure.field, None))


def pooled(modules: Sequence[ModuleReport], measure: Measure) -> float | None:
    """One number for several modules, of those that have one: as if they were one long vector.

    Norms are added in squares; an error or a relative change is that of all of them together where their norms are
    known. Anything else, and ratios without norms, is the mean.

    >>> pooled([ModuleReport("a", (2, 2), delta_norm=3.0), ModuleReport("b", (2, 2), delta_norm=4.0)], DELTA_NORM)
    5.0
    """
    known = [(m, v) for m in modules if (v := value(m, measure)) is not None]
    if not known:
        return None
    values = [v for _, v in known]
    if measure is DELTA_NORM:
        return math.hypot(*values)
    weights = [_finite(m.delta_norm if measure is ERROR else getattr(m, "norm", None)) for m, _ in known]
    whole = math.hypot(*(w for w in weights if w))
    if measure in (ERROR, RELATIVE) and None not in weights and 0 < whole < math.inf:
        return math.hypot(*(v * ((w or 0.0) / whole) for v, w in zip(values, weights, strict=True)))
    return math.fsum(v / len(values) for v in values)


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def largest_first(modules: Sequence[ModuleReport], measure: Measure) -> list[ModuleReport]:
    """Sorted by size, those without a number last."""
    return sorted(modules, key=lambda m: -abs(v) if (v := value(m, measure)) is not None else 1.0)


_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def spectra_of(report: Report) -> list[Spectrum]:
    """The modules whose singular values are known, finite, and not all zero."""
    return [m for m in report.modules if isinstance(m, Spectrum) and falling(m)]


def falling(module: Spectrum) -> list[float]:
    """σᵢ/σ₁ of a module while it is above zero; nothing for zero updates and for values that are not numbers.

    >>> falling(Spectrum("m", (4, 4), singular_values=[2.0, 1.0, 0.0]))
    [1.0, 0.5]
    """
    values = module.singular_values
    if not all(map(math.isfinite, values)) or not values or values[0] <= 0:
        return []
    return [v / values[0] for v in values if v > 0]


def median_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median of each σᵢ/σ₁ over modules, with zero for those of lower rank, while it is above zero.

    >>> median_curve([[1.0, 0.5], [1.0, 0.3], [1.0]])
    [1.0, 0.3]
    """
    found = []
    for i in range(max(map(len, curves), default=0)):
        middle = median(c[i] if i < len(c) else 0.0 for c in curves)
        if middle <= 0:
            break
        found.append(middle)
    return found


def error_curve(modules: Sequence[Spectrum]) -> list[float]:
    """What is lost when every module keeps its r largest directions, for r = 0, 1, …: √(Σ_{i>r} σᵢ² / Σ σᵢ²).

    >>> [round(e, 3) for e in error_curve([Spectrum("m", (4, 4), singular_values=[4.0, 3.0])])]
    [1.0, 0.6, 0.0]
    """
    most = max((len(m.singular_values) for m in modules), default=0)
    largest = max((m.singular_values[0] for m in modules if m.singular_values), default=0.0) or 1.0
    energies = [0.0] * most  # of the i-th directions of all modules
    for module in modules:
        for i, v in enumerate(module.singular_values):
            energies[i] += (v / largest) ** 2
    tails = [0.0]  # summed from the small end, where a difference from the whole would leave only rounding
    for energy in reversed(energies):
        tails.append(tails[-1] + energy)
    whole = tails[-1] or 1.0
    return [math.sqrt(t / whole) for t in reversed(tails)]


def size_at(modules: Sequence[Spectrum], rank: int, nbytes: int) -> int:
    """Bytes of factors of this rank, lower where a module has fewer directions: Σ min(r, rᵢ)·(mᵢ+nᵢ)·bytes.

    >>> size_at([Spectrum("m", (4, 6), singular_values=[2.0, 1.0, 0.5])], 2, 4)
    80
    """
    return sum(min(rank, len(m.singular_values)) * (m.shape[0] + math.prod(m.shape[1:])) * nbytes for m in modules)


def storage(report: Report) -> tuple[str, int]:
    """The type an adapter is stored in and its bytes; the widest of several, bfloat16 when the report doesn't say."""
    known = [(_BYTES[d], d) for d in report.totals.get("dtypes", ()) if d in _BYTES]
    nbytes, name = max(known, default=(2, "BF16"))
    return name, nbytes


def doublings(most: int) -> list[int]:
    """1, 2, 4, … up to a rank.

    >>> doublings(20)
    [1, 2, 4, 8, 16]
    """
    return [1 << i for i in range(max(most, 1).bit_length())]


def thinned(count: int, most: int) -> list[int]:
    """At most so many of `count` positions, evenly chosen, both ends among them.

    >>> thinned(5, 10), thinned(101, 3)
    ([0, 1, 2, 3, 4], [0, 50, 100])
    """
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]
