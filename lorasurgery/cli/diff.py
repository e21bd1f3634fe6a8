"""`lorasurgery diff`."""

from __future__ import annotations

import sys

import click

from lorasurgery.cli import options, render


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@options.reading
@options.guarded
def command(a: str, b: str, as_json: bool, quiet: bool, verbose: bool, device: str) -> None:
    """Compare two adapters for one base: do they agree, or fight?

    For each module: the cosine of the two updates (−1: one undoes the other, 0: nothing in common), the ratio of their
    norms, and how far their column spaces overlap (beside what random spaces would have), with the smallest and largest
    principal angle.

    \b
    Examples:
      lorasurgery diff style topic
      lorasurgery diff style topic --json
    """
    from lorasurgery.ops.diff import diff

    with render.progress("diff", quiet=quiet or as_json or not sys.stderr.isatty()) as callback:
        report = diff(a, b, device=device, progress=callback)
    render.show(report, as_json=as_json, quiet=quiet, verbose=True)
