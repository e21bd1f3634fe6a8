"""`lorasurgery plan`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("plan")
@click.argument("model", metavar="MODEL")
@click.option("--rank", type=int, default=16, show_default=True, help="r of every module.")
@click.option("--target", metavar="PAT", multiple=True,
              help="These modules: a suffix (q_proj), a regular expression on the whole path, or attention, mlp, "
                   "all-linear. Repeatable.  [default: all-linear]")  # fmt: skip
@click.option("--exclude", metavar="PAT", multiple=True, help="Not these modules; patterns as for --target.")
@click.option("--dtype", type=options.DTYPE, help="What the factors would be stored in.  [default: the model's own]")
@options.telling
@options.guarded
def command(model: str, rank: int, target: tuple[str, ...], exclude: tuple[str, ...], dtype: str | None,
            **chosen: Any) -> None:  # fmt: skip
    """Say what a LoRA would take on a model: r(d + k) parameters for a d×k matrix instead of d·k.

    Only headers are read; of a model on the Hub only they are fetched.

    \b
    Examples:
      lorasurgery plan llama-2-7b --rank 8 --target q_proj --target v_proj
      lorasurgery plan meta-llama/Llama-3.1-70B --rank 16
      lorasurgery plan llama --rank 32 --target attention --json
    """
    from lorasurgery.ops.plan import TARGET, plan

    ending = Ending.take(chosen)
    ending.finish(plan(model, rank, target=target or TARGET, exclude=exclude, dtype=dtype))
