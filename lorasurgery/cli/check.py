"""`lorasurgery check`."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("check")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--for", "server", default="peft", show_default=True, help="Where it is to be served.",
              type=click.Choice(["peft", "vllm", "sglang", "llama.cpp", "diffusers", "comfyui"]))  # fmt: skip
@click.option("--base", metavar="BASE", help="Every tensor of the adapter must match this checkpoint.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), help="vLLM's setting.  [default: 16, as vLLM's]")
@options.telling
@options.guarded
def command(adapter: str, server: str, base: str | None, max_lora_rank: int | None, **chosen: Any) -> None:
    """Say what a server would reject, get wrong or silently drop, and the command that fixes it.

    Exit status 1 when the adapter would not be served as it is meant. Only headers and the config are read.
    A folder of adapters is done one by one.

    \b
    Examples:
      lorasurgery check adapter --for vllm --base llama
      lorasurgery check adapter --for sglang --json
    """
    from lorasurgery.ops.check import check

    report = check(adapter, server, base=base, max_lora_rank=max_lora_rank)
    Ending.take(chosen).finish(report)
    sys.exit(0 if report.totals["serves"] else 1)
