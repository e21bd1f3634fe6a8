"""`lorasurgery verify`."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("verify")
@click.argument("path", metavar="PATH")
@click.option("--against", metavar="BASE", help="The checkpoint that it was made from, or that an adapter is for.")
@click.option("--adapter", "adapters", metavar="ADAPTER", multiple=True,
              help="With --against: what was merged into BASE to give PATH. Repeatable.")  # fmt: skip
@click.option("-w", "--weight", "weights", type=float, multiple=True,
              help="Strength it was merged with; the n-th belongs to the n-th adapter.")  # fmt: skip
@options.BLOCK_WEIGHT
@options.reading
@options.guarded
def command(path: str, **chosen: Any) -> None:
    """Read everything once: is PATH whole, finite, and consistent with its index and config?

    With --against, is it BASE plus the adapters? Every value must be within one step of rounding, and where the merge
    left an undo record its hashes tell whether it is so to the bit; without --adapter every byte must be BASE's. An
    adapter must match BASE tensor by tensor. Exit status 1 when something does not hold.

    \b
    Examples:
      lorasurgery verify llama
      lorasurgery verify merged --against llama --adapter style -w 0.7
      lorasurgery verify restored --against llama
      lorasurgery verify adapter --against llama --json
    """
    from lorasurgery.ops.verify import verify

    ending = Ending.take(chosen)
    with ending.progress("verify") as callback:
        report = verify(path, progress=callback, **chosen)
    ending.finish(report)
    sys.exit(0 if report.totals["holds"] else 1)
