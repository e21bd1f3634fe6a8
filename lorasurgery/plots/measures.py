"""What can be drawn of a module: a title in plain words, unit and scale, and how several modules become one cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
