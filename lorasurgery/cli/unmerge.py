"""`lorasurgery unmerge`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options, render


@click.command("unmerge")
@click.argument("merged", metavar="MERGED")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="Restore replaced tensors, config and tokenizer from this checkpoint.")
@options.checkpoint
@options.common
@options.guarded
def command(
    merged: str, adapters: tuple[str, ...], out: str, as_json: bool, quiet: bool, verbose: bool, **chosen: Any
) -> None:
    """Take adapters out of a checkpoint again: W = round(W' − Σ weight·scale·B·A).

    The inverse of merge up to rounding; give the weights that were merged. Tensors an adapter replaced whole
    (modules_to_save, biases) come back only from --base; without it they are named and left as they are.

    \b
    Examples:
      lorasurgery unmerge merged style -o restored
      lorasurgery unmerge merged style topic -w 0.7 -w -0.3 -o restored --base llama
    """
    from lorasurgery.ops.unmerge import unmerge

    with render.progress("unmerge", quiet=quiet or as_json) as callback:
        report = unmerge(merged, adapters, out, progress=callback, **chosen)
    render.show(report, as_json=as_json, quiet=quiet, verbose=verbose)
