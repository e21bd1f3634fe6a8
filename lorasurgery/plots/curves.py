"""Curves and bars: how singular values fall, what each rank would lose and weigh, and sums by layer and kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorasurgery.plots.grid import Grid, kind_labels, shorten
from lorasurgery.plots.measures import (
    Measure,
    doublings,
    error_curve,
    falling,
    median_curve,
    pooled,
    size_at,
    thinned,
    value,
)
from lorasurgery.plots.style import ACCENT, AGAINST, GREY, LINES, TOGETHER
from lorasurgery.report import ModuleReport, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES, _MOST_POINTS = 400, 200  # more of either can't be told apart, and an SVG would grow to megabytes
_FLOOR = 1e-5  # below lie the zeros of float32
_OUTSIDE = "outside the layers"


def singular_curves(ax: Axes, modules: Sequence[Spectrum], grid: Grid) -> None:
    """σᵢ/σ₁ against i: a faint line for each module, coloured by kind where these are few, else by layer."""
    shown = [modules[i] for i in thinned(len(modules), _MOST_LINES)]
    _faint_lines(ax, shown, grid)
    _median(ax, modules)
    _falling_axis(ax, min(falling(m)[-1] for m in shown))
    _rank_axis(ax, max(len(m.singular_values) for m in modules))
    more = f" ({len(shown)} of {len(modules):,} modules)" if len(shown) < len(modules) else ""
    ax.set(xlabel="i", ylabel="σᵢ / σ₁", title="How singular values fall" + more)
    if len(modules) > 1:
        ax.legend(loc="lower left", handlelength=1.2, labelspacing=0.25, edgecolor="none", framealpha=0.7)


def _median(ax: Axes, modules: Sequence[Spectrum]) -> None:
    from matplotlib.patheffects import Normal, Stroke

    middle = _points(median_curve([falling(m) for m in modules]))
    ax.plot(
        *zip(*middle, strict=True), color="black", linewidth=2, marker="o" if len(middle) == 1 else "",
        label="median",
        path_effects=[Stroke(linewidth=4, foreground="white"), Normal()],  # it runs among hundreds of lines
    )  # fmt: skip


def _falling_axis(ax: Axes, lowest: float) -> None:
    from matplotlib.ticker import NullFormatter

    ax.set_yscale("log")
    ax.set_ylim(max(_FLOOR, min(lowest * 0.8, 0.1)), 1.25)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _faint_lines(ax: Axes, modules: Sequence[Spectrum], grid: Grid) -> None:
    from matplotlib.collections import LineCollection

    alpha = min(0.5, max(0.12, 40 / len(modules)))
    for label, colour, group in _coloured(modules, grid):
        lines = [_points(falling(m)) for m in group]
        ax.add_collection(LineCollection(lines, colors=[colour], alpha=alpha, linewidths=0.9), autolim=False)
        if label:
            ax.plot([], [], color=colour, linewidth=2, label=label)


def _coloured(modules: Sequence[Spectrum], grid: Grid) -> Iterator[tuple[str, Any, list[Spectrum]]]:
    """(label, colour, modules): by kind while there are colours for them, else by layer from dark to bright."""
    place = {id(m): key for key, held in grid.cells.items() for m in held}
    kinds = dict(zip(grid.kinds, kind_labels(grid), strict=True))
    if len(kinds) <= len(LINES):
        for (kind, label), colour in zip(kinds.items(), LINES, strict=False):
            yield label, colour, [m for m in modules if id(m) in place and place[id(m)][0] == kind]
    else:
        last = max(len(grid.columns) - 1, 1)
        for i, column in enumerate(grid.columns):
            label = {0: "first layer", last: "last layer"}.get(i, "")
            yield label, _shade(i / last), [m for m in modules if id(m) in place and place[id(m)][1] == column]
    outside = [m for m in modules if id(m) not in place]
    if outside:
        yield (_OUTSIDE if kinds else ""), GREY, outside


def _shade(where: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["plasma"](0.9 * where)  # its brightest end is too pale for a line


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(i + 1.0, values[i]) for i in thinned(len(values), _MOST_POINTS)]


def error_by_rank(ax: Axes, modules: Sequence[Spectrum], stored: str, nbytes: int) -> None:
    """Error against rank, and above the picture the size of such an adapter."""
    errors = error_curve(modules)
    most = len(errors) - 1
    ranks = [r + 1 for r in thinned(most, _MOST_POINTS)]
    ax.plot(ranks, [errors[r] for r in ranks], color=ACCENT, linewidth=2, marker="o" if most == 1 else "")
    marked = doublings(most)
    ax.plot(marked, [errors[r] for r in marked], "o", color=ACCENT, markersize=4, clip_on=False)
    sizes = [size_at(modules, r, nbytes) for r in _ticks(most)]
    _rank_axis(ax, most, [f"\n{_megabytes(s)}" for s in sizes])
    ax.set(ylim=(0, max(errors[1:]) * 1.12 or 1.0), ylabel="error ‖ΔW−BA‖ / ‖ΔW‖")
    ax.set_xlabel(f"rank, and size of the factors in MB ({stored})")
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g}%")
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_title("What each rank would lose, and weigh")


def _rank_axis(ax: Axes, most: int, below: Sequence[str] | None = None) -> None:
    """A scale of doublings: half of what a spectrum tells lies in its first few directions."""
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log", base=2)
    ax.set_xlim(0.9, max(most * 1.1, 2.2))
    ticks = _ticks(most)
    ax.set_xticks(ticks, [f"{r}{more}" for r, more in zip(ticks, below or [""] * len(ticks), strict=True)])
    ax.xaxis.set_minor_locator(NullLocator())


def _ticks(most: int) -> list[int]:
    ranks = doublings(most)
    return ranks[:: -(-len(ranks) // 9)]


def _megabytes(nbytes: int) -> str:
    """Two digits of megabytes.

    >>> _megabytes(18_870_000), _megabytes(590_000), _megabytes(2_345_000_000)
    ('19', '0.59', '2345')
    """
    return f"{nbytes / 1e6:.0f}" if nbytes >= 1e7 else f"{nbytes / 1e6:.2g}"


_ROOM = 1.3  # of the longest bar: the number stands after its end


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
