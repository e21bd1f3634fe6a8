"""Lays panels out on a sheet of a README's width, so that layers, kinds and letters fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasurgery.errors import UsageError
from lorasurgery.plots.curves import error_by_rank, named_bars, singular_curves, sums_by_kind, sums_by_layer
from lorasurgery.plots.grid import grid_of, kind_labels, shorten, width_of
from lorasurgery.plots.heatmap import cells_of, colour_bar, heat_map, shades_of, special_cells
from lorasurgery.plots.measures import spectra_of, storage
from lorasurgery.plots.plan import Plan, bars_title, heading, map_title, notes, plan
from lorasurgery.plots.style import WIDTH
from lorasurgery.report import Report, Spectrum

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

_ROW, _BAR, _CURVES = 0.23, 0.2, 3.0  # inches of height
_TITLE, _AROUND_MAP, _AROUND_BARS, _EDGE, _LEGEND_LINE = 0.4, 0.7, 0.35, 0.45, 0.2
_LEAST_MAP = 1.2  # the unit beside a colour bar has to fit
_COLOUR_BAR, _SUMS = 0.85, 1.0  # inches of width
_LEGEND_COLUMNS = 3
_NARROWEST = 0.2  # inches of a column, before maps go below each other


def sheet(report: Report) -> Figure:
    """A figure of all that a report has to show.

    Raises:
        UsageError: there is nothing to draw.
    """
    planned = plan(report)
    maps = _Maps(planned)
    heights = [sum(maps.heights) + maps.legend_height, *([_CURVES] if planned.spectra else [])]
    figure = _figure(_TITLE + sum(heights))
    figure.suptitle(heading(report), fontweight="bold")
    if planned.spectra:
        # Figures of their own: long names beside the maps then take no room from the curves.
        upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        maps.paint(upper)
        _curves(lower, report, planned.spectra)
    else:
        maps.paint(figure)
    return figure


def card(report: Report) -> Figure:
    """Two panels: how singular values fall, and error against rank and size.

    Raises:
        UsageError: the report holds no singular values.
    """
    spectra = spectra_of(report)
    if not spectra:
        raise UsageError(
            f"this report of {report.command} has no singular values to draw; inspect --spectrum finds them"
        )
    figure = _figure(_CURVES)
    _curves(figure, report, spectra)
    return figure


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05))


def _curves(figure: FigureBase, report: Report, spectra: Sequence[Spectrum]) -> None:
    left, right = figure.subplots(1, 2)
    singular_curves(left, spectra, grid_of(report.modules))
    error_by_rank(right, spectra, *storage(report))


class _Maps:
    """The heat maps of a plan and the bars below them, on one grid so that their edges line up."""

    def __init__(self, planned: Plan) -> None:
        self.plan = planned
        self.cells = [cells_of(planned.grid, m) for m in planned.measures]
        self.shades = [
            shades_of(m, list(cells.values.values())) for m, cells in zip(planned.measures, self.cells, strict=True)
        ]
        count, columns = len(planned.measures), max(len(planned.grid.columns), 1)
        names = [*kind_labels(planned.grid), *(shorten(m.name) for m in planned.bars)]
        room = WIDTH - max(width_of(n, 8.0) for n in names) - 0.15
        self.single = count == 1
        self.beside = count > 1 and (room / count - _COLOUR_BAR) / columns >= _NARROWEST
        self.width = room / count if self.beside else room - (_SUMS if self.single else 0.0)
        self.inches = (self.width - _COLOUR_BAR) / columns
        self.heights = self._heights()

    def _heights(self) -> list[float]:
        """Inches of each row of the grid."""
        planned, found = self.plan, []
        if planned.grid.columns:
            one = max(len(planned.grid.kinds) * _ROW, _LEAST_MAP) + _AROUND_MAP
            found = [_EDGE, one] if self.single else [one] * (1 if self.beside else len(self.shades))
        return found + ([len(planned.bars) * _BAR + _AROUND_BARS] if planned.bars else [])

    def paint(self, figure: FigureBase) -> None:
        """Fill a figure."""
        across = len(self.shades)
        ratios = [self.width, _SUMS] if self.single else [1.0] * across
        rows = figure.add_gridspec(len(self.heights), len(ratios), height_ratios=self.heights, width_ratios=ratios)
        if self.plan.grid.columns and self.single:
            self._single(figure, [figure.add_subplot(rows[p]) for p in ((0, 0), (1, 0), (1, 1))])
        elif self.plan.grid.columns:
            for i in range(across):
                self._map(figure, figure.add_subplot(rows[0, i] if self.beside else rows[i, :]), i)
        for i, measure in enumerate(self.plan.measures if self.plan.bars else ()):
            ax = figure.add_subplot(rows[-1, i])
            named_bars(ax, self.plan.bars, measure, names=i == 0)
            ax.set_title(bars_title(self.plan, measure))
        self._legend(figure)

    def _single(self, figure: FigureBase, axes: Sequence[Axes]) -> None:
        """One map with sums along its edges."""
        above, ax, right = axes
        heat_map(ax, self.plan.grid, self.cells[0], self.shades[0], self.inches)
        sums_by_layer(above, self.plan.grid, self.plan.measures[0])
        sums_by_kind(right, self.plan.grid, self.plan.measures[0])
        above.set_title(map_title(self.plan, self.plan.measures[0]))
        colour_bar(figure, self.shades[0], [ax, right])

    def _map(self, figure: FigureBase, ax: Axes, i: int) -> None:
        names = i == 0 or not self.beside
        heat_map(ax, self.plan.grid, self.cells[i], self.shades[i], self.inches, names=names)
        ax.set_title(map_title(self.plan, self.plan.measures[i]))
        colour_bar(figure, self.shades[i], [ax])

    def _samples(self) -> dict[str, Artist]:
        found: dict[str, Artist] = {}
        for cells, measure in zip(self.cells, self.plan.measures, strict=True):
            found |= special_cells(cells, measure)
        return found

    @property
    def legend_height(self) -> float:
        """Inches below all rows."""
        said = notes(self.plan)
        lines = (said.count("\n") + 1 if said else 0) + (-(-len(self._samples()) // _LEGEND_COLUMNS))
        return lines * _LEGEND_LINE + (0.1 if lines else 0.0)

    def _legend(self, figure: FigureBase) -> None:
        samples, said = self._samples(), notes(self.plan)
        if samples or said:
            figure.legend(
                list(samples.values()), list(samples), loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False,
                title=said or None, title_fontsize=8.0,
            )  # fmt: skip
