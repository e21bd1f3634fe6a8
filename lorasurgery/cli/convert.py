"""`lorasurgery convert`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending


@click.command("convert")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--to", required=True, type=click.Choice(["peft", "kohya", "diffusers", "comfyui"]),
              help="A PEFT folder, or a file with the names of kohya's sd-scripts, diffusers or ComfyUI.")  # fmt: skip
@click.option("--base", metavar="BASE",
              help="The adapter's model: tells where the dots were that became underscores, and every tensor must "
                   "match it.")  # fmt: skip
@click.option(
    "--portable",
    is_flag=True,
    help="One rank for all (zero-padded), alpha = r, the scale in the factors: what every reader takes.",
)
@click.option(
    "--rank",
    type=int,
    help="Rank of what has no LoRA factors of its own. [default: all that LoHa, LoKr and differences have]",
)
@click.option("--dtype", type=options.DTYPE, help="Dtype of what is written. [default: the adapter's own]")
@options.common
@options.guarded
def command(
    adapter: str, to: str, base: str | None, portable: bool, dtype: str | None, rank: int | None, out: str,
    device: str, dry_run: bool, overwrite: bool, **told: Any,
) -> None:  # fmt: skip
    """Write an adapter in another format, bit for bit wherever both formats can say it.

    Names, alpha (a tensor here, a word in the config there), split and fused modules are translated and the header's
    metadata goes along. LoHa, LoKr, LoCon's core and whole differences become plain LoRA, with the measured error, and
    so does DoRA with --portable and --base. An image model's adapter becomes a PEFT folder for each of its parts (the
    folder itself for a denoiser alone). A folder of adapters is done one by one, into OUT under the same names.

    \b
    Examples:
      lorasurgery convert style.safetensors --to peft --base sdxl -o style
      lorasurgery convert style --to kohya --base sdxl -o style.safetensors
      lorasurgery convert flux.safetensors --to diffusers --base flux -o flux-diffusers.safetensors
      lorasurgery convert adapter --to peft --portable -o portable       # for any server
      lorasurgery convert dora --to peft --portable --base llama --rank 64 -o plain
    """
    from lorasurgery.ops.conversion.options import ConvertOptions
    from lorasurgery.ops.convert import convert

    chosen = ConvertOptions(to, portable, dtype, rank)  # type: ignore[arg-type]
    ending = Ending.take(told, dry_run=dry_run)
    with ending.progress("convert") as callback:
        report = convert(adapter, out, chosen, base=base, device=device, overwrite=overwrite, dry_run=dry_run,
                         progress=callback)  # fmt: skip
    ending.finish(report)
