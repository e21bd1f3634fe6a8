"""Which colour a number has, and the bar that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.plots.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import FigureBase

_SPREAD = 20.0  # between the largest and the smallest change: beyond, only a logarithm shows both
_ALIKE = 1e-3
_LEAST_SHARE = 0.05  # from the darkest to the brightest: less is no difference worth a colour
_STEPS, _MOST_TICKS = ((1, 2, 5), (1, 3), (1,)), 7


@dataclass(frozen=True)
class Shades:
    """The colours of one measure, the same in its map and its bars."""

    measure: Measure
    mappable: ScalarMappable

    def of(self, value: float) -> tuple[float, float, float]:
        """Red, green and blue of a value."""
        import numpy as np

        red, green, blue, _ = self.mappable.to_rgba(np.array([value]))[0]
        return float(red), float(green), float(blue)


def shades_of(measure: Measure, values: Sequence[float]) -> Shades:
    """The colours for these values, from the least to the greatest of them."""
    from matplotlib.cm import ScalarMappable

    return Shades(measure, ScalarMappable(_norm(measure, values), measure.colours))


def _norm(measure: Measure, values: Sequence[float]) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(values, default=0.0), max(values, default=0.0)
    if measure.scale == "signed":
        reach = max(abs(low), abs(high)) or 1.0
        return Normalize(-reach, reach)
    if measure.scale == "size":
        low = min((v for v in values if v > 0), default=0.0)
        if low and high / low > _SPREAD:
            return LogNorm(low, high)
    if high - low <= _ALIKE * abs(high):  # no colour may claim a difference
        return Normalize(0.0, high or 1.0)
    if measure.scale == "share":
        low = max(0.0, min(low, high - _LEAST_SHARE))
    return Normalize(low, high)


def colour_bar(figure: FigureBase, shades: Shades, beside: Sequence[Axes]) -> None:
    """Draw the bar at the right of these axes, with its unit, its numbers written out."""
    bar = figure.colorbar(shades.mappable, ax=list(beside), pad=0.015, fraction=0.05, aspect=22)
    bar.set_label(shades.measure.unit)
    bar.outline.set_visible(False)
    ticks = _ticks(shades)
    bar.set_ticks(ticks, labels=[_number(shades.measure, t) for t in ticks])
    bar.minorticks_off()


def _ticks(shades: Shades) -> list[float]:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    low, high = shades.mappable.get_clim()
    if not isinstance(shades.mappable.norm, LogNorm):
        even = MaxNLocator(5, integer=shades.measure.scale == "whole").tick_values(low, high)
        return [float(t) for t in even if low <= t <= high]
    tens = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found = [[m * ten for ten in tens for m in steps if low <= m * ten <= high] for steps in _STEPS]
    return next(
        (ticks for ticks in found if len(ticks) <= _MOST_TICKS), found[-1][:: -(-len(found[-1]) // _MOST_TICKS)]
    )


def _number(measure: Measure, value: float) -> str:
    return f"{100 * value:.3g}%" if measure.percent else f"{value:.3g}".replace("-", "−")
