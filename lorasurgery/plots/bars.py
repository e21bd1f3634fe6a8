"""Bars: modules outside of layers by name, and sums along the edges of a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasurgery.plots.grid import Grid
from lorasurgery.plots.labels import shorten
from lorasurgery.plots.measures import Measure, pooled, value
from lorasurgery.plots.style import ACCENT, AGAINST, TOGETHER
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM = 1.3  # of the longest bar: the number stands after its end


def largest_first(modules: Sequence[ModuleReport], measure: Measure) -> list[ModuleReport]:
    """Sorted by size, those without a number last."""
    return sorted(modules, key=lambda m: -abs(v) if (v := value(m, measure)) is not None else 1.0)


def named_bars(ax: Axes, modules: Sequence[ModuleReport], measure: Measure, *, names: bool = True) -> None:
    """One bar for each module, its number written after it."""
    numbers = [value(m, measure) for m in modules]
    known = [v for v in numbers if v is not None]
    top, low = max(map(abs, known), default=0.0) or 1.0, min([0.0, *known])
    colour = TOGETHER if measure.scale == "signed" else ACCENT
    for y, number in enumerate(numbers):
        length = number or 0.0
        ax.barh(y, length, height=0.7, color=colour if length >= 0 else AGAINST)
        text = "no number" if number is None else measure.text(number) if number else "0"
        ax.annotate(text, (max(length, 0.0), y), (3, 0), textcoords="offset points", va="center_baseline", fontsize=7.5)
    ax.set(xlim=(-top if low < 0 else 0.0, top * _ROOM), ylim=(len(modules) - 0.4, -0.6))
    ax.set_yticks(range(len(modules)), [shorten(m.name) for m in modules] if names else [])
    ax.tick_params(length=0)
    ax.set_xticks([])
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.axvline(0, color="black", linewidth=0.8)


def sums_by_kind(ax: Axes, grid: Grid, measure: Measure) -> None:
    """Bars at the right edge of a heat map: each kind over all layers."""
    _edge(ax, [pooled(grid.row(k), measure) for k in grid.kinds], measure, along="y")
    ax.set_xlabel("all layers", fontsize=8.0)


def sums_by_layer(ax: Axes, grid: Grid, measure: Measure) -> None:
    """Bars along the top edge: each layer over all kinds."""
    _edge(ax, [pooled(grid.layer(c), measure) for c in grid.columns], measure, along="x")
    ax.set_ylabel("all kinds", rotation=0, ha="right", va="center", fontsize=8.0)


def _edge(ax: Axes, numbers: Sequence[float | None], measure: Measure, *, along: str) -> None:
    top = max((v for v in numbers if v), default=0.0)
    places, lengths = [i + 0.5 for i in range(len(numbers))], [v or 0.0 for v in numbers]
    ticks, words = ([0.0, top], ["0", measure.text(top)]) if top else ([0.0], ["0"])
    if along == "y":
        ax.barh(places, lengths, height=0.7, color=ACCENT)
        ax.set(xlim=(0, top * 1.05 or 1.0), ylim=(len(numbers), 0), yticks=[])
        ax.set_xticks(ticks, words)
    else:
        ax.bar(places, lengths, width=0.7, color=ACCENT)
        ax.set(ylim=(0, top * 1.05 or 1.0), xlim=(0, len(numbers)), xticks=[])
        ax.set_yticks(ticks, words)
    ax.tick_params(length=2)
