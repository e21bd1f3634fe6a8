"""Heat maps: layers across, kinds of modules down. Cells without a number say which way they have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.plots.grid import Column, Grid, kind_labels, numbered_columns, rows_of_words, stack_names, width_of
from lorasurgery.plots.measures import Measure, pooled
from lorasurgery.plots.style import ABSENT, GREY

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import FigureBase

_LINED = 0.1  # inches; narrower cells have no lines between them
_CELL_TYPE = 7.5
_STACK_TYPE = 8.5
_ZERO: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 2.2, "color": GREY}
_Places = list[tuple[int, int]]


@dataclass
class Cells:
    """The values of a grid by (row, column), and the places that have none.

    Args:
        absent: The layer has no such module.
        unknown: It has one without a finite number.
        zero: Its change is zero, which has no place on a scale of sizes.
    """

    values: dict[tuple[int, int], float] = field(default_factory=dict)
    absent: _Places = field(default_factory=list)
    unknown: _Places = field(default_factory=list)
    zero: _Places = field(default_factory=list)


def cells_of(grid: Grid, measure: Measure) -> Cells:
    """Each cell's number, pooled where it holds several modules."""
    cells = Cells()
    for r, kind in enumerate(grid.kinds):
        for c, column in enumerate(grid.columns):
            held = grid.cells.get((kind, column))
            number = pooled(held, measure) if held else None
            if held is None:
                cells.absent.append((r, c))
            elif number is None:
                cells.unknown.append((r, c))
            elif number == 0 and measure.scale == "size":
                cells.zero.append((r, c))
            else:
                cells.values[r, c] = number
    return cells


def heat_map(ax: Axes, grid: Grid, cells: Cells, shades: Shades, inches: float, *, names: bool = True) -> None:
    """Draw one heat map.

    Args:
        inches: The width of a column, to choose the numbers and letters that fit.
        names: Whether rows are named here, or by the map to the left of it.
    """
    rows, columns = len(grid.kinds), len(grid.columns)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    lines: dict[str, Any] = (
        {"edgecolor": "white", "linewidth": 0.8} if inches >= _LINED else {"edgecolor": "face", "linewidth": 0.2}
    )
    faces = {place: shades.of(v) for place, v in cells.values.items()}
    _paint(ax, faces | dict.fromkeys(cells.absent, ABSENT), **lines)
    _paint(ax, dict.fromkeys(cells.unknown, "white"), edgecolor=GREY, linewidth=0, hatch="//////")
    ax.plot([c + 0.5 for _, c in cells.zero], [r + 0.5 for r, _ in cells.zero], **_ZERO)
    _write_values(ax, cells, shades, inches)
    _name_axes(ax, grid, inches, names)


def special_cells(cells: Cells, measure: Measure) -> dict[str, Artist]:
    """What a legend has to explain: word -> sample."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found: dict[str, Artist] = {}
    if cells.absent:
        found["no such module in the layer"] = Patch(facecolor=ABSENT)
    if cells.unknown:
        found[measure.missing] = Patch(facecolor="white", edgecolor=GREY, linewidth=0, hatch="//////")
    if cells.zero:
        found["not changed"] = Line2D([], [], **_ZERO)
    return found


def _paint(ax: Axes, faces: dict[tuple[int, int], Any], **how: Any) -> None:
    from matplotlib.collections import PolyCollection

    if faces:
        squares = [[(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1)] for r, c in faces]
        ax.add_collection(PolyCollection(squares, facecolors=list(faces.values()), **how), autolim=False)


def _write_values(ax: Axes, cells: Cells, shades: Shades, inches: float) -> None:
    """Numbers in the cells, where the widest fits."""
    texts = {place: shades.measure.text(v) for place, v in cells.values.items()}
    if max((width_of(t, _CELL_TYPE) for t in texts.values()), default=0.0) > inches - 0.06:
        return
    for (r, c), text in texts.items():
        red, green, blue = shades.of(cells.values[r, c])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(
            c + 0.5, r + 0.5, text, ha="center", va="center_baseline", fontsize=_CELL_TYPE,
            color="white" if dark else "black", in_layout=False,  # it fits its cell
        )  # fmt: skip


def _name_axes(ax: Axes, grid: Grid, inches: float, names: bool) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks([r + 0.5 for r in range(len(grid.kinds))], kind_labels(grid) if names else [])
    shown = numbered_columns(grid.columns, inches)
    ax.set_xticks([c + 0.5 for c in shown], [grid.columns[c].label for c in shown])
    _name_stacks(ax, grid.columns, inches)


def _name_stacks(ax: Axes, columns: list[Column], inches: float) -> None:
    """The stacks' names under their layers, on as many lines as it takes, and a line between stacks."""
    starts = [i for i, c in enumerate(columns) if i == 0 or columns[i - 1].stack != c.stack]
    ends = [*starts[1:], len(columns)]
    words = stack_names([columns[i].stack for i in starts])
    middles = [(a + b) / 2 for a, b in zip(starts, ends, strict=True)]
    if len(starts) == 1:
        ax.set_xlabel("layer")
        return
    for edge in starts[1:]:
        ax.axvline(edge, color="black", linewidth=1.2)
    lines = rows_of_words([(m * inches, w) for m, w in zip(middles, words, strict=True)], _STACK_TYPE)
    for middle, word, line in zip(middles, words, lines, strict=True):
        ax.annotate(
            word, (middle, 0), (0, -17 - 12 * line), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="top", fontsize=_STACK_TYPE, annotation_clip=False,
        )  # fmt: skip


_SPREAD = 20.0  # between the largest and the smallest change: beyond, only a logarithm shows both
_ALIKE = 1e-3
_LEAST_SHARE = 0.05  # from the darkest to the brightest: less is not a difference worth a colour
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
