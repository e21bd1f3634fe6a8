"""Progress and reports, for people and for programs. Only this file and tables.py know rich."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from lorasurgery.cli import tables
from lorasurgery.errors import plain
from lorasurgery.report import Progress, Report

_PLAIN_STEPS = 10  # lines of progress when stderr is not a terminal


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
               TimeRemainingColumn(), TextColumn("{task.fields[tensor]}", style="dim", markup=False))  # fmt: skip
    console = Console(stderr=True)
    room = min(40, max(8, console.width - 85))  # what the bar and its numbers leave on the line
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(command, tensor="")

        def callback(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=plain(name)[-room:])

        yield callback


def _plain(command: str) -> Progress:
    shown, whole = 0, 0

    def callback(name: str, done: int, total: int) -> None:
        nonlocal shown, whole
        if total != whole:  # another part of the work: what was fetched is now computed with
            shown, whole = 0, total
        step = done * _PLAIN_STEPS // total if total else _PLAIN_STEPS
        if step > shown:
            shown = step
            say(f"{command}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB ({name})", err=True)

    return callback


def show(report: Report, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print a report: JSON and nothing else, or a table and the summary line; warnings and failures go to stderr."""
    if report.adapters is not None:
        _show_each(report, report.adapters, as_json=as_json, quiet=quiet, verbose=verbose)
        return
    for warning in report.warnings:
        say(f"warning: {plain(warning)}", err=True)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    elif not quiet:
        tables.show(report, verbose=verbose)
        say(f"{'plan: ' if report.dry_run else ''}{report.summary}")
        for sentence in report.totals.get("odd", ()):
            say(f"odd: {plain(sentence)}")
        if report.output and not report.dry_run and report.command != "push":
            say(
                f"{report.output}: {report.bytes_written / 1e6:,.1f} MB written, "
                f"{report.bytes_read / 1e6:,.1f} MB read, "
                f"{report.seconds:.1f} s on {report.device}, {report.peak_memory_bytes / 1e6:,.0f} MB of memory at most"
            )


def _show_each(report: Report, adapters: list[Report], *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """A folder of adapters: each one's report under its name, then the sum, then those that failed."""
    for one in adapters if not as_json else ():
        if not one.error:
            say(f"{one.inputs[0]}:") if not quiet else None
            show(one, as_json=False, quiet=quiet, verbose=verbose)
    if as_json:
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    elif not quiet:
        say(f"{'plan: ' if report.dry_run else ''}{report.summary}")
    for one in adapters:
        if one.error:
            say(f"lorasurgery: {one.error}", err=True)


def say(text: str, *, err: bool = False) -> None:
    """A line or more for a person; what names from files hold of a terminal's control characters is escaped."""
    for line in text.split("\n"):
        click.echo(plain(line), err=err)


def leave(report: Report) -> None:
    """End with status 1 when an adapter of a folder failed."""
    if any(one.error for one in report.adapters or ()):
        sys.exit(1)
