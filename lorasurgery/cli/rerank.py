"""`lorasurgery rerank`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("rerank")
@click.argument("adapter", metavar="ADAPTER")
@options.ranks
@options.familiar
@options.PLOT
@click.option("--dtype", type=options.DTYPE, help="Dtype of what is written. [default: the adapter's own]")
@options.RESUME
@options.common
@options.guarded
def command(adapter: str, out: str, dry_run: bool, **chosen: Any) -> None:
    """Change an adapter's ranks: the best approximation of each module (Eckart–Young), from its factors alone.

    Without an option that chooses ranks every module keeps its minimal exact rank; a module that has no more
    directions than asked for keeps its factors as they are. A --budget given as a share is of ADAPTER's bytes.
    A folder of adapters is done one by one, into OUT under the same names.

    \b
    Examples:
      lorasurgery rerank adapter -o smaller --rank 16
      lorasurgery rerank adapter -o smaller --energy 0.95 --max-rank 64
      lorasurgery rerank adapter -o smaller --budget 50MB     # the ranks go where the update is
      lorasurgery rerank adapter -o smaller --sv-fro 0.9 --max-rank 64
      lorasurgery rerank adapter -o portable --uniform-rank   # zero-padded, for servers that take one rank
    """
    from lorasurgery.ops.blend import rerank

    ending = Ending.take(chosen, dry_run=dry_run)
    choice = options.rank_choice(chosen)
    with ending.progress("rerank") as callback:
        report = rerank(adapter, out, choice, dry_run=dry_run, progress=callback, **chosen)
    ending.finish(report)
