"""`lorasurgery rerank`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options, render


@click.command("rerank")
@click.argument("adapter", metavar="ADAPTER")
@options.ranks
@options.familiar
@click.option("--dtype", type=options.DTYPE, help="Dtype of what is written. [default: the adapter's own]")
@options.common
@options.guarded
def command(adapter: str, out: str, as_json: bool, quiet: bool, verbose: bool, **chosen: Any) -> None:
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
    from lorasurgery.ops.rerank import rerank

    choice = options.rank_choice(chosen)
    with render.progress("rerank", quiet=quiet or as_json) as callback:
        report = rerank(adapter, out, choice, progress=callback, **chosen)
    render.show(report, as_json=as_json, quiet=quiet, verbose=verbose)
    render.leave(report)
