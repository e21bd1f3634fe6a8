"""What goes into a picture: which panels a report has numbers for, and in what words. Nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from lorasurgery.errors import UsageError
from lorasurgery.plots.grid import Grid, grid_of, keep_largest, shorten
from lorasurgery.plots.measures import RANK, Measure, largest_first, measures_of, pooled, spectra_of
from lorasurgery.report import Comparison, ModuleReport, Report, Spectrum

_MOST_KINDS, _MOST_BARS = 24, 12
_FEW_MODULES = 4  # are clearer as bars than as a map
_JOIN = {"blend": " + ", "merge": " + ", "unmerge": " − "}


@dataclass
class Plan:
    """What will be drawn.

    Args:
        grid: Without columns when there are too few modules for a map.
        bars: Modules outside of layers, largest first; `left_out` more have no room.
        spectra: Modules with singular values.
    """

    report: Report
    measures: list[Measure]
    grid: Grid
    bars: list[ModuleReport]
    left_out: int
    spectra: list[Spectrum]


def plan(report: Report) -> Plan:
    """Choose what to draw of a report.

    Raises:
        UsageError: there is nothing to draw.
    """
    measures, spectra = measures_of(report), spectra_of(report)
    if not measures:
        raise UsageError(_why_nothing(report))
    first, grid = measures[0], grid_of(report.modules)
    bars, most = grid.outside, _MOST_BARS
    if len(grid.columns) < 2 or len(report.modules) < _FEW_MODULES:
        grid, bars, most = Grid(), report.modules, 2 * _MOST_BARS
    compared = bars if not grid.columns else [m for held in grid.cells.values() for m in held]
    if len({m.rank for m in compared}) == 1:
        measures = [m for m in measures if m is not RANK]
    ordered = largest_first(bars, first)
    grid = keep_largest(grid, _MOST_KINDS, lambda held: pooled(held, first))
    return Plan(report, measures, grid, ordered[:most], max(0, len(bars) - most), spectra)


def _why_nothing(report: Report) -> str:
    if report.adapters is not None:
        return f"a picture shows one adapter, and {report.inputs[0]} holds {len(report.adapters)}; name one of them"
    if report.dry_run:
        return "--dry-run reads headers only, and there is nothing in them to draw; leave one of the two out"
    if report.command == "inspect" and report.modules:
        return "there is nothing to draw in what headers say; --spectrum reads the factors"
    if not report.modules:
        return f"{report.command} found no modules, so there is nothing to draw"
    return f"no module of this {report.command} has a finite number to draw"


def heading(report: Report) -> str:
    """The first line: the command, its inputs, and the total where there is one.

    >>> heading(Report("extract", ["models/base", "models/tuned"], "out", totals={"error": 0.25}))
    'extract: base → tuned, error 25.0%'
    """
    names = [shorten(PurePath(i).name or i, 28) for i in report.inputs]
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} more"]
    compared = any(isinstance(m, Comparison) for m in report.modules)
    text = f"{report.command}: " + (" and " if compared else _JOIN.get(report.command, " → ")).join(names)
    if report.totals.get("error") is not None:
        text += f", error {report.totals['error']:.1%}"
        if report.totals.get("adapter_bytes"):
            text += f" in {report.totals['adapter_bytes'] / 1e6:,.1f} MB"
    return text


def map_title(planned: Plan, measure: Measure) -> str:
    """What a heat map shows."""
    chance = planned.report.totals.get("chance")
    by_chance = f" ({chance:.0%} by chance)" if measure.field == "overlap" and chance is not None else ""
    return measure.title + by_chance


def bars_title(planned: Plan, measure: Measure) -> str:
    """What bars show."""
    return f"Outside the layers: {measure.noun}" if planned.grid.columns else map_title(planned, measure)


def notes(planned: Plan) -> str:
    """How several modules became one cell, and what was left out; empty when there is nothing to say."""
    grid, found = planned.grid, []
    if any(grid.crowd(kind)[1] > 1 for kind in grid.kinds):
        found.append("×n: n modules in one cell, " + ", ".join(dict.fromkeys(_way(m) for m in planned.measures)))
    if grid.dropped:
        found.append(f"the map shows the {len(grid.kinds)} largest of {len(grid.kinds) + grid.dropped} kinds")
    if planned.left_out:
        shown = len(planned.bars)
        found.append(f"the bars show the {shown} largest of {shown + planned.left_out} modules")
    whole = len(planned.report.full)
    if whole:
        found.append(f"not shown: {whole:,} tensor{'s' if whole > 1 else ''} stored whole")
    return "\n".join(found)


def _way(measure: Measure) -> str:
    if measure.field == "delta_norm":
        return "their ‖ΔW‖ added in squares"
    if measure.field in ("error", "relative"):
        return f"the {measure.noun} of all of them together"
    return f"the mean of their {measure.noun}s" if measure.field == "rank" else f"the mean {measure.noun}"
