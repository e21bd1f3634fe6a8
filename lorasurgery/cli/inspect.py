"""`lorasurgery inspect`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("inspect")
@click.argument("path", metavar="PATH")
@click.option("--spectrum", is_flag=True,
              help="Read the factors: singular values of each ΔW, effective rank (by entropy) and stable rank, and the "
                   "energy kept at ranks 4, 8, 16, 32 and 64 (e4 … e64).")  # fmt: skip
@click.option("--base", metavar="BASE", help="The adapter's model: sizes beside it, and every tensor must match it.")
@options.PLOT
@options.reading
@options.guarded
def command(path: str, spectrum: bool, base: str | None, device: str, **chosen: Any) -> None:
    """Say what an adapter or checkpoint is: format, modules, ranks, scaling, dtypes, sizes, and anything odd about it.

    Without --spectrum only headers are read, and only they are fetched from the Hub. --plot draws an adapter's
    spectrum: ‖ΔW‖ by layer and module, singular values, error against rank and size. A folder of adapters is done
    one by one.

    \b
    Examples:
      lorasurgery inspect adapter
      lorasurgery inspect adapter --spectrum        # which rank would do?
      lorasurgery inspect adapter --base llama --plot spectrum.svg
      lorasurgery inspect llama -v                  # every tensor
      lorasurgery inspect org/name@v1 --json
    """
    from lorasurgery.ops.inspect import inspect

    ending = Ending.take(chosen)
    with ending.progress("inspect", slow=False) as callback:
        report = inspect(path, spectrum=spectrum or bool(ending.plot), base=base, device=device, progress=callback)
    ending.finish(report, verbose=spectrum)
