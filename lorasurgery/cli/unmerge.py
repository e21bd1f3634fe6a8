"""`lorasurgery unmerge`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("unmerge")
@click.argument("merged", metavar="MERGED")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="Restore replaced tensors, config and tokenizer from this checkpoint.")
@click.option("--undo-file", metavar="FILE", help="The record of the merge.  [default: the last one beside MERGED]")
@click.option(
    "--no-undo", "undo", flag_value=False, default=None, type=bool, help="Subtract and round, though there is a record."
)
@options.checkpoint
@options.large
@options.placed
@options.guarded
def command(merged: str, adapters: tuple[str, ...], out: str | None, dry_run: bool, **chosen: Any) -> None:
    """Take adapters out of a checkpoint again: to the bit where the merge left a record (merge --undo, --in-place).

    Without a record it is W = round(W' − Σ weight·scale·B·A): what you name is subtracted, whether it was merged or
    not, and a warning says so where lorasurgery.json does not know of it. Give the weights that were merged. Tensors an
    adapter replaced whole (modules_to_save, biases) come back only from the record or --base; without them they are
    named and left as they are.

    \b
    Examples:
      lorasurgery unmerge merged style -o restored
      lorasurgery unmerge llama style --in-place
      lorasurgery unmerge merged style topic -w 0.7 -w -0.3 -o restored --base llama
    """
    from lorasurgery.ops.unmerge import unmerge

    ending = Ending.take(chosen, dry_run=dry_run)
    with ending.progress("unmerge") as callback:
        report = unmerge(merged, adapters, out, dry_run=dry_run, progress=callback, **chosen)
    ending.finish(report)
