"""`lorasurgery switch`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("switch")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--to", "to", metavar="ADAPTER", multiple=True, required=True, help="What is merged now. Repeatable.")
@click.option("--from", "from_", metavar="ADAPTER", multiple=True,
              help="Where what was merged last is, if neither beside CHECKPOINT, nor beside what is merged now, nor "
              "here. Repeatable.")  # fmt: skip
@click.option("--add", is_flag=True, help="Take nothing out: put --to on top of whatever is there.")
@click.option("--base", metavar="BASE", help="Begin from this checkpoint, where no record of the last merge is kept.")
@options.ALLOW_LOSS
@options.ALLOW_NONFINITE
@options.strengths
@options.large
@options.inside
@options.guarded
def command(checkpoint: str, to: tuple[str, ...], dry_run: bool, **chosen: Any) -> None:
    """Take the adapter that was merged last out of a checkpoint, to the bit, and merge another one, in place.

    CHECKPOINT is a folder or file that was merged with --in-place or --undo. Without the record of a merge nothing can
    be taken out, and the command stops: --base says where to begin instead, --add that nothing is to come out. Only the
    tensors that change are written, and a kill loses nothing: the same command with --resume finishes it. However often
    adapters are switched, `unmerge --in-place` gives the base back.

    \b
    Examples:
      lorasurgery merge llama style --in-place
      lorasurgery switch llama --to topic
      lorasurgery switch llama --to style --to topic -w 0.7 -w 0.3
      lorasurgery unmerge llama style topic --in-place
    """
    from lorasurgery.ops.switch import switch

    ending = Ending.take(chosen, dry_run=dry_run)
    with ending.progress("switch") as callback:
        report = switch(checkpoint, to, dry_run=dry_run, progress=callback, **chosen)
    ending.finish(report)
