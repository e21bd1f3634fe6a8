"""`lorasurgery blend`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending
from lorasurgery.linalg.methods import METHODS


@click.command("blend")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("-w", "--weight", "weights", type=float, multiple=True,
              help="Strength; the n-th belongs to the n-th adapter, the rest are 1. May be negative.")  # fmt: skip
@options.BLOCK_WEIGHT
@click.option("--normalize", is_flag=True, help="Divide the weights by their sum.")
@click.option("--method", type=click.Choice(METHODS), default="linear", show_default=True,
              help="linear is the exact weighted sum; see docs/maths.md for the others.")  # fmt: skip
@click.option("--density", type=float,
              help="Share of entries that ties, dare and pruning keep of each update.  [default: 0.5]")  # fmt: skip
@options.ranks
@options.familiar
@options.PLOT
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of dare's masks and of the randomized SVD.")
@click.option("--average-replaced", is_flag=True,
              help="Take the weighted mean of tensors that adapters store whole (modules_to_save) with different "
                   "values; otherwise they are an error.")  # fmt: skip
@click.option("--dtype", type=options.DTYPE,
              help="Dtype of what is written.  [default: the adapters' widest, float32 for an exact sum]")  # fmt: skip
@options.RESUME
@options.common
@options.guarded
def command(
    adapters: tuple[str, ...], out: str, device: str, dry_run: bool, overwrite: bool, resume: bool, **chosen: Any
) -> None:
    """Blend several adapters into one: Σ weight·scale·B·A, or one of its kin.

    Adapters may differ in ranks, scaling (alpha/r, rsLoRA), dtypes and modules; one that lacks a module adds nothing
    to it. linear, cat and knots-ties work on the factors alone. Without an option that chooses ranks, linear
    keeps the minimal exact rank. A --budget given as a share is of the adapters' bytes together.

    \b
    Examples:
      lorasurgery blend style topic -w 0.7 -w 0.3 -o both
      lorasurgery blend style topic -w 1 -w -0.5 -o less-topic --rank 32
      lorasurgery blend a b c --method ties --density 0.2 --rank 64 -o abc
      lorasurgery blend a b c --normalize --budget 100MB -o mean
    """
    from lorasurgery.ops.blend import blend
    from lorasurgery.ops.blending.options import BlendOptions

    ending = Ending.take(chosen, dry_run=dry_run)
    choice = options.rank_choice(chosen)
    with ending.progress("blend") as callback:
        report = blend(
            adapters, out, BlendOptions(choice=choice, **chosen), device=device, overwrite=overwrite, resume=resume,
            dry_run=dry_run, progress=callback,
        )  # fmt: skip
    ending.finish(report)
