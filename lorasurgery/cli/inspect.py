"""`lorasurgery inspect`."""

from __future__ import annotations

import sys

import click

from lorasurgery.cli import options, render


@click.command("inspect")
@click.argument("path", metavar="ADAPTER")
@click.option("--spectrum", is_flag=True,
              help="Read the factors: singular values of each ΔW, effective rank (by entropy) and stable rank, and the "
                   "energy kept at ranks 4, 8, 16, 32 and 64 (e4 … e64).")  # fmt: skip
@options.reading
@options.guarded
def command(path: str, as_json: bool, quiet: bool, verbose: bool, spectrum: bool, device: str) -> None:
    """Say what an adapter holds: modules, ranks, scaling, dtypes, sizes; with --spectrum, where its update lies.

    A folder of adapters is done one by one.

    \b
    Examples:
      lorasurgery inspect adapter
      lorasurgery inspect adapter --spectrum        # which rank would do?
      lorasurgery inspect adapter --spectrum --json
    """
    from lorasurgery.ops.inspect import inspect

    with render.progress("inspect", quiet=quiet or as_json or not sys.stderr.isatty()) as callback:
        report = inspect(path, spectrum=spectrum, device=device, progress=callback)
    render.show(report, as_json=as_json, quiet=quiet, verbose=verbose or spectrum)
    render.leave(report)
