"""Progress and reports for people and for programs. The only file that knows rich."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from lorasurgery.report import Comparison, ModuleReport, Progress, Report, Spectrum

_PLAIN_STEPS = 10  # lines of progress when stderr is no terminal


@contextmanager
def progress(command: str, *, quiet: bool) -> Iterator[Progress | None]:
    """A progress callback: a bar with bytes, rate and time left on a terminal, plain lines elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(command) as callback:
            yield callback
    else:
        yield _plain(command)


@contextmanager
def _bar(command: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[tensor]}", style="dim"))  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(command, tensor="")

        def callback(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=name[-40:])

        yield callback


def _plain(command: str) -> Progress:
    shown = 0

    def callback(name: str, done: int, total: int) -> None:
        nonlocal shown
        step = done * _PLAIN_STEPS // total if total else _PLAIN_STEPS
        if step > shown:
            shown = step
            click.echo(f"{command}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB ({name})", err=True)

    return callback


def show(report: Report, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print a report: JSON and nothing else, or a table and the summary line; warnings and failures go to stderr."""
    if report.adapters is not None:
        _show_each(report, report.adapters, as_json=as_json, quiet=quiet, verbose=verbose)
        return
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    elif not quiet:
        if report.modules and (verbose or len(report.modules) <= 24):
            _table(report.modules)
        click.echo(f"{'plan: ' if report.dry_run else ''}{report.summary}")
        if report.output and not report.dry_run:
            click.echo(
                f"{report.output}: {report.bytes_written / 1e6:,.1f} MB written, "
                f"{report.bytes_read / 1e6:,.1f} MB read, "
                f"{report.seconds:.1f} s on {report.device}, {report.peak_memory_bytes / 1e6:,.0f} MB of memory at most"
            )


def _show_each(report: Report, adapters: list[Report], *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """A folder of adapters: each one's report under its name, then the sum, then those that failed."""
    for one in adapters if not as_json else ():
        if not one.error:
            click.echo(f"{one.inputs[0]}:") if not quiet else None
            show(one, as_json=False, quiet=quiet, verbose=verbose)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    elif not quiet:
        click.echo(f"{'plan: ' if report.dry_run else ''}{report.summary}")
    for one in adapters:
        if one.error:
            click.echo(f"lorasurgery: {one.error}", err=True)


def leave(report: Report) -> None:
    """End with status 1 when an adapter of a folder failed."""
    if any(one.error for one in report.adapters or ()):
        sys.exit(1)


_COLUMNS = {
    "rank": ("rank", "{}"), "alpha": ("alpha", "{:g}"), "delta_norm": ("‖ΔW‖", "{:.4g}"), "error": ("error", "{:.2%}"),
    "energy": ("energy", "{:.2%}"), "retention": ("kept", "{:.1%}"), "noise": ("noise", "{:.1%}"),
    "effective_rank": ("effective", "{:.1f}"), "stable_rank": ("stable", "{:.1f}"),
    "norm_a": ("‖A‖", "{:.4g}"), "norm_b": ("‖B‖", "{:.4g}"), "norm_ratio": ("B/A", "{:.3g}"),
    "cosine": ("cosine", "{:+.3f}"), "overlap": ("overlap", "{:.1%}"), "chance": ("by chance", "{:.1%}"),
}  # fmt: skip
_LEVELS = "▁▂▃▄▅▆▇█"


def _table(modules: Sequence[ModuleReport]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    hidden = {"alpha"} if any(isinstance(m, Spectrum) for m in modules) else set()  # the table is wide enough
    used = [c for c in _COLUMNS if c not in hidden and any(getattr(m, c, None) is not None for m in modules)]
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("shape", justify="right")
    for column in used:
        table.add_column(_COLUMNS[column][0], justify="right")
    extra = _extra_columns(modules)
    for name in extra:
        table.add_column(name, justify="left" if name.startswith("σ") else "right", no_wrap=True)
    for i, m in enumerate(modules):
        values = [getattr(m, c, None) for c in used]
        cells = [_COLUMNS[c][1].format(v) if v is not None else "" for c, v in zip(used, values, strict=True)]
        table.add_row(m.name, "×".join(map(str, m.shape)), *cells, *(column[i] for column in extra.values()))
    width = None if sys.stdout.isatty() else 150
    Console(width=width, highlight=False).print(table)


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
