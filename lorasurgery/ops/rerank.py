"""rerank: the same update at another rank, optimal by Eckart–Young and never formed as a matrix."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.errors import UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.batch import find_adapters, run_each
from lorasurgery.ops.blend import BlendOptions, blend
from lorasurgery.ops.references import on_references
from lorasurgery.ranks import ranks
from lorasurgery.report import Progress, Report


@on_references("adapter")
def rerank(
    adapter: str | Path,
    out: str | Path,
    choice: RankChoice | None = None,
    *,
    uniform_rank: bool = False,
    dtype: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Change an adapter's ranks: scale·B·A of each module becomes its best approximation, or itself.

    Example:
        rerank("adapter", "smaller", RankChoice(energy=0.95, max_rank=32))

    Args:
        adapter: Adapter folder or file, or a folder of several.
        out: Folder or file for the new adapter, in the format of the old one.
        choice: Rank by number, energy, tolerance or budget; None keeps the minimal exact rank. A module that has no
            more directions than asked for keeps its factors as they are.
        uniform_rank: Zero-pad all factors to one rank: the form every server takes.
        dtype: safetensors name of what is written; None keeps the adapter's own.
        resume: Go on with what an interrupted run of the same inputs and options left; the result is the same.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    options = BlendOptions(choice=choice, uniform_rank=uniform_rank, dtype=dtype, command="rerank")

    def one(source: str | Path, target: str | Path) -> Report:
        return blend(
            [source], target, options, device=device, overwrite=overwrite, resume=resume, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip

    several = find_adapters(adapter)
    if several and ranks().size > 1:
        raise UsageError(f"{adapter}: a folder of adapters is not shared out over ranks; run it without torchrun")
    if several:
        return run_each("rerank", adapter, several, one, out, overwrite=overwrite, dry_run=dry_run)
    return one(adapter, out)
