"""`lorasurgery diff`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@options.PLOT
@options.reading
@options.guarded
def command(a: str, b: str, device: str, **chosen: Any) -> None:
    """Compare two checkpoints (where and by how much do they differ?) or two adapters (do they agree, or fight?).

    Of checkpoints: which tensors differ, and ‖ΔW‖/‖W‖ by layer and by kind of module; -v shows every tensor.
    Of adapters for one base, module by module: the cosine of the two updates (−1: one undoes the other, 0: nothing in
    common), the ratio of their norms, and how far their column spaces overlap (beside what random spaces would have),
    with the smallest and largest principal angle.

    \b
    Examples:
      lorasurgery diff llama llama-chat
      lorasurgery diff llama llama-chat --plot change.svg
      lorasurgery diff style topic --json
    """
    from lorasurgery.ops.diff import diff

    ending = Ending.take(chosen)
    with ending.progress("diff", slow=False) as callback:
        report = diff(a, b, device=device, progress=callback)
    ending.finish(report, verbose=report.totals["what"] == "adapters")
