"""A report's tables in the terminal: modules, and sums by layer or kind with bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lorasurgery.errors import plain, size_of
from lorasurgery.report import Comparison, ModuleReport, Report, Spectrum, percent

Columns = dict[str, tuple[str, str | Callable[[float], str]]]

_FEW = 24  # modules that are shown without being asked for
_BAR, _SHORT = 24, 10  # characters of the longest bar, where there is room and where there is little
_COLUMNS: Columns = {
    "state": ("", "{}"), "dtype": ("dtype", "{}"), "bytes": ("bytes", "{:,}"), "file": ("file", "{}"),
    "parameters": ("LoRA", "{:,}"), "share": ("share", "{:.2%}"), "relative": ("‖ΔW‖/‖W‖", percent),
    "norm": ("‖W‖", "{:.4g}"), "largest": ("largest", "{:.2g}"),
    "rank": ("rank", "{}"), "alpha": ("alpha", "{:g}"), "delta_norm": ("‖ΔW‖", "{:.4g}"), "error": ("error", "{:.2%}"),
    "energy": ("energy", "{:.2%}"), "retention": ("kept", "{:.1%}"), "noise": ("noise", "{:.1%}"),
    "effective_rank": ("effective", "{:.1f}"), "stable_rank": ("stable", "{:.1f}"),
    "norm_a": ("‖A‖", "{:.4g}"), "norm_b": ("‖B‖", "{:.4g}"), "norm_ratio": ("B/A", "{:.3g}"),
    "cosine": ("cosine", "{:+.3f}"), "overlap": ("overlap", "{:.1%}"), "chance": ("by chance", "{:.1%}"),
}  # fmt: skip
_LEVELS = "▁▂▃▄▅▆▇█"


def show(report: Report, *, verbose: bool) -> None:
    """The sums where a report has them, and its modules where they are few or asked for."""
    totals = report.totals
    grouped = "by_kind" in totals
    if report.modules and (verbose or (not grouped and len(report.modules) <= _FEW)):
        _modules(report.modules)
    if report.command == "plan":
        _rows(_PLAN, totals["by_kind"], "parameters")
    elif report.command == "diff" and grouped:
        changed = [row for row in totals["by_layer"] if row["changed"]]
        _rows({"layer": ("layer", "{}")} | _CHANGES, changed, "relative") if changed else None
        changed = [row for row in totals["by_kind"] if row["changed"]]
        _rows(
            {"kind": ("kind", "{}")} | _CHANGES, sorted(changed, key=lambda row: -(row["relative"] or 0)), "relative"
        ) if changed else None
    elif grouped:
        kinds = totals["by_kind"]
        _rows(_STORED, kinds if verbose else kinds[:_FEW], "share", more=0 if verbose else len(kinds) - _FEW)


_PLAN: Columns = {
    "kind": ("module", "{}"), "shape": ("shape", "{}"), "modules": ("count", "{:,}"), "each": ("LoRA of one", "{:,}"),
    "each_weight": ("of", "{:,}"), "share": ("share", "{:.2%}"), "times_fewer": ("times fewer", "{:,.0f}"),
    "parameters": ("LoRA of all", "{:,}"),
}  # fmt: skip
_CHANGES: Columns = {
    "tensors": ("tensors", "{:,}"), "changed": ("changed", "{:,}"),
    "delta_norm": ("‖ΔW‖", "{:.4g}"), "norm": ("‖W‖", "{:.4g}"), "relative": ("‖ΔW‖/‖W‖", percent),
}  # fmt: skip
_STORED: Columns = {
    "kind": ("kind", "{}"), "tensors": ("tensors", "{:,}"), "shape": ("shape", "{}"),
    "parameters": ("parameters", "{:,}"), "bytes": ("bytes", "{:,}"), "share": ("share", "{:.1%}"),
}  # fmt: skip


_SPARE = (
    "norm",
    "each_weight",
    "parameters",
    "delta_norm",
    "times_fewer",
    "tensors",
    "shape",
    "modules",
)  # first to go


def _rows(columns: Columns, rows: Sequence[dict[str, Any]], bar: str, *, more: int = 0) -> None:
    """A table of sums, with a bar for one of its columns beside the longest; narrow terminals get fewer columns."""
    from rich.measure import Measurement

    console, length = _console(), _BAR
    unbound = console.options.update(width=1000)
    while True:
        table = _sums(columns, rows, bar, length)
        spare = [name for name in _SPARE if name in columns and name != bar]
        if Measurement.get(console, unbound, table).maximum <= console.width or not (spare or length > _SHORT):
            break
        if length > _SHORT:
            length = _SHORT
        else:
            columns = {name: column for name, column in columns.items() if name != spare[0]}
    if more > 0:
        table.add_row(f"… and {more} smaller")
    console.print(table)


def _sums(columns: Columns, rows: Sequence[dict[str, Any]], bar: str, length: int) -> Any:
    table = _table()
    for i, (title, _) in enumerate(columns.values()):
        table.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    table.add_column("", no_wrap=True)
    longest = max((row[bar] or 0 for row in rows), default=0)
    for row in rows:
        cells = [_cell(text, row.get(name)) for name, (_, text) in columns.items()]
        table.add_row(*cells, _bar((row[bar] or 0) / longest if longest else 0.0, length))
    return table


def _cell(text: str | Callable[[float], str], value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return size_of(value)
    return plain(text(value) if callable(text) else text.format(value))


def _bar(share: float, length: int) -> str:
    """A bar of eighths of a character.

    >>> _bar(0.5, 24), _bar(0.01, 24)
    ('████████████', '▎')
    """
    eighths = max(1, round(share * length * 8)) if share > 0 else 0
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def _table() -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(box=SIMPLE, pad_edge=False)


def _console() -> Any:
    from rich.console import Console

    # names come from files: brackets in them are no markup, and words between colons no pictures
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False, emoji=False)


def _modules(modules: Sequence[ModuleReport]) -> None:
    hidden = {"alpha"} if any(isinstance(m, Spectrum) for m in modules) else set()  # the table is wide enough
    used = [c for c in _COLUMNS if c not in hidden and any(getattr(m, c, None) is not None for m in modules)]
    table = _table()
    table.add_column("module", overflow="fold")
    table.add_column("shape", justify="right")
    for column in used:
        table.add_column(_COLUMNS[column][0], justify="right")
    extra = _extra_columns(modules)
    for name in extra:
        table.add_column(name, justify="left" if name.startswith("σ") else "right", no_wrap=True)
    for i, m in enumerate(modules):
        values = [getattr(m, c, None) for c in used]
        cells = [_cell(_COLUMNS[c][1], v) if v is not None else "" for c, v in zip(used, values, strict=True)]
        table.add_row(plain(m.name), size_of(m.shape), *cells, *(column[i] for column in extra.values()))
    _console().print(table)


def _extra_columns(modules: Sequence[ModuleReport]) -> dict[str, list[str]]:
    """Columns that hold more than a number: energies by rank, singular values as a small picture, angles."""
    found: dict[str, list[str]] = {}
    spectra = [m if isinstance(m, Spectrum) else None for m in modules]
    for rank in sorted({r for m in spectra if m for r in m.energy_at}):
        found[f"e{rank}"] = [f"{m.energy_at[rank]:.0%}" if m and m.energy_at else "" for m in spectra]
    if any(spectra):
        found["σ₁ to σᵣ"] = [_curve(m.singular_values) if m else "" for m in spectra]
    if any(isinstance(m, Comparison) and m.angles for m in modules):
        found["angles"] = [_angles(m.angles) if isinstance(m, Comparison) and m.angles else "" for m in modules]
    return found


def _curve(values: Sequence[float]) -> str:
    """Singular values beside the largest, at most 8 of them, with the ends in numbers."""
    if not values:
        return "zero"
    step = max(1, -(-len(values) // 8))
    marks = "".join(_LEVELS[min(7, int(8 * v / values[0]))] for v in values[::step])
    return f"{values[0]:.2g} {marks} {values[-1]:.2g}"


def _angles(angles: Sequence[float]) -> str:
    return f"{angles[0]:.0f}°–{angles[-1]:.0f}°"
