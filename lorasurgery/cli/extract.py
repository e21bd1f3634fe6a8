"""`lorasurgery extract`."""

from __future__ import annotations

from typing import Any

import click

from lorasurgery.cli import options
from lorasurgery.cli.ending import Ending
from lorasurgery.clients.client import CLIENTS


@click.command("extract")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@options.ranks
@click.option("--target", metavar="PAT", multiple=True,
              help="Only these modules: a suffix (q_proj), a regular expression on the whole path, or attention, "
                   "mlp, all-linear. Repeatable.")  # fmt: skip
@click.option("--exclude", metavar="PAT", multiple=True, help="Not these modules; patterns as for --target.")
@click.option(
    "--common",
    is_flag=True,
    help="Take what both models have in one shape, and say what is left out, instead of stopping at it.",
)
@click.option("--full", metavar="auto|none|PAT", multiple=True, default=["auto"], show_default=True,
              help="What is stored whole beside the factors: what changed and is not a matrix (nor an image model's "
                   "convolution) or has another shape (auto), nothing (none), or what patterns mean.")  # fmt: skip
@click.option("--for", "client", default="peft", show_default=True,
              type=click.Choice(list(CLIENTS)),
              help="What the adapter is for: only what that program takes is kept, and image tools get their one "
                   ".safetensors file.")  # fmt: skip
@click.option("--alpha", type=float, help="lora_alpha to write; the factors make up for it. [default: scale 1]")
@click.option("--rslora", is_flag=True, help="Scale by alpha/√r instead of alpha/r.")
@click.option("--svd", type=click.Choice(["auto", "randomized", "exact"]), default="auto", show_default=True,
              help="exact is LAPACK/cuSOLVER on the whole matrix; auto may sketch in bfloat16 for a --rank, "
                   "randomized never does.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the randomized SVD.")
@click.option("--dtype", type=options.DTYPE, help="Dtype of what is written. [default: the tuned weights' own]")
@click.option("--keep-rounding", is_flag=True,
              help="Take tensors too that differ by no more than the rounding of one side's dtype, where base and "
                   "tuned are stored in different ones.")  # fmt: skip
@options.ALLOW_NONFINITE
@options.PLOT
@options.large
@options.common
@options.guarded
def command(
    base: str, tuned: str, out: str, device: str, dry_run: bool, overwrite: bool, resume: bool,
    memory_limit: int | None, **chosen: Any,
) -> None:  # fmt: skip
    """Extract a LoRA from a fine-tuned model: ΔW = W_tuned − W_base ≈ B·A, by truncated SVD.

    Writes a PEFT adapter folder. Tensors that are equal are skipped; the stated error is measured on the factors
    as they are written. The rank is 16 unless one of the options says otherwise; a --budget given as a share is of
    the base's bytes.

    \b
    Examples:
      lorasurgery extract llama llama-chat -o adapter --rank 64
      lorasurgery extract llama llama-chat -o adapter --energy 0.9 --max-rank 128
      lorasurgery extract llama llama-chat -o adapter --budget 100MB
      lorasurgery extract llama llama-chat -o adapter --target attention --exclude o_proj
      lorasurgery extract llama llama-chat -o adapter --for vllm
      lorasurgery extract sdxl dreambooth -o style.safetensors --for comfyui
      lorasurgery extract llama llama-chat -o adapter --dry-run --json
    """
    from lorasurgery.ops.extract import extract

    ending = Ending.take(chosen, dry_run=dry_run)
    choice = _options(**chosen)
    with ending.progress("extract") as callback:
        report = extract(
            base, tuned, out, choice, device=device, overwrite=overwrite, resume=resume, memory_limit=memory_limit,
            dry_run=dry_run, progress=callback,
        )  # fmt: skip
    ending.finish(report)


def _options(
    target: tuple[str, ...], exclude: tuple[str, ...], full: tuple[str, ...], common: bool, **rest: Any
) -> Any:
    from lorasurgery.ops.extraction.options import DEFAULT_RANK, ExtractOptions, Selection

    choice = options.rank_choice(rest, DEFAULT_RANK)
    assert choice is not None
    return ExtractOptions(choice, Selection(target, exclude, full, common), **rest)
