"""`lorasurgery merge`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("merge")
@click.argument("base", metavar="BASE")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option(
    "--undo/--no-undo",
    default=None,
    help="Keep beside the result what it takes to undo the merge to the bit.  [default: with --in-place]",
)
@options.ALLOW_LOSS
@options.checkpoint
@options.large
@options.placed
@options.guarded
def command(base: str, adapters: tuple[str, ...], out: str | None, dry_run: bool, **chosen: Any) -> None:
    """Merge adapters into a checkpoint: W' = round(W + Σ weight·scale·B·A), one rounding from float32.

    BASE is a checkpoint folder or .safetensors file; each ADAPTER is a folder or file of any format. Untouched tensors,
    config and tokenizer files are copied byte for byte.

    \b
    Examples:
      lorasurgery merge llama style -o merged
      lorasurgery merge llama style topic -w 0.7 -w -0.3 -o merged
      lorasurgery merge sdxl style.safetensors -o merged --block-weight OUTALL --block-weight "lora_te*=0.5"
      lorasurgery merge llama style -o merged --dtype float32      # when rounding would swallow the update
      lorasurgery merge llama style -o merged --max-shard-size 5GB
      lorasurgery merge llama style --in-place                     # `unmerge --in-place` gives every bit back
    """
    from lorasurgery.ops.merge import merge

    ending = Ending.take(chosen, dry_run=dry_run)
    with ending.progress("merge") as callback:
        report = merge(base, adapters, out, dry_run=dry_run, progress=callback, **chosen)
    ending.finish(report)
