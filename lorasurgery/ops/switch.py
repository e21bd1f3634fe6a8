"""switch: one adapter out of a checkpoint and another one in, in its own files and in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.ops.apply import Recipe, Rounding, plan_files
from lorasurgery.ops.block_weight import weighed_plan
from lorasurgery.ops.merge import check_weights, judge_retention, start_report
from lorasurgery.ops.record import describe
from lorasurgery.ops.references import on_references
from lorasurgery.ops.runtime import Clock, check_device_name, check_memory_limit, resolve_device
from lorasurgery.ops.targets import check_in_place, in_place_call, is_settled, record_file, settled
from lorasurgery.ops.undo import about, adapters_of, before_in_place, begin_record, files_in_place, record_to_undo
from lorasurgery.ops.undo_record import top_record
from lorasurgery.ops.undone import Undone
from lorasurgery.report import Progress, Report


@on_references("to", "from_")
def switch(
    checkpoint: str | Path,
    to: Sequence[str | Path],
    *,
    from_: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    block_weights: Sequence[str] = (),
    rounding: Rounding = "nearest",
    seed: int = 0,
    device: str = "auto",
    allow_loss: bool = False,
    allow_nonfinite: bool = False,
    resume: bool = False,
    memory_limit: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Undo the last merge to the bit and merge other adapters instead, reading and writing what changes once.

    Example:
        switch("llama", ["topic"])

    Args:
        checkpoint: A folder or file that `merge --in-place` or `merge --undo` left with a record; without one this is
            `merge --in-place`.
        to: The adapters to be merged now, with `weights` and `block_weights` as for merge.
        from_: Where the adapters that were merged last are, unless they lie beside the checkpoint or the new ones, in
            the current folder, or in the Hub's cache.

    Raises:
        SurgeryError: as merge and unmerge do.
    """
    clock, path = Clock(), Path(checkpoint)
    strengths = check_weights(weights, len(to))
    check_device_name(device)
    check_memory_limit(memory_limit)
    if is_settled(path, resume=resume, dry_run=dry_run):
        return clock.stamp(settled("switch", str(path)))
    merged, opened = Checkpoint.open(path, unfinished=True), [open_adapter(a) for a in to]
    last = top_record(path)
    places = [path.absolute().parent, *(Path(a).absolute().parent for a in to), Path.cwd()]
    old = [open_adapter(a) for a in adapters_of(last, from_, places)] if last else []
    found = record_to_undo(path, old, None, (), ()) if last else None
    chosen = None if dry_run else resolve_device(device)
    base: Checkpoint = Undone(merged, *found, chosen) if found else merged
    recipe = Recipe(
        base, [a for a, w in zip(opened, strengths, strict=True) if w],
        weighed_plan(base, opened, strengths, block_weights), path, rounding=rounding, seed=seed,
        allow_loss=allow_loss, allow_nonfinite=allow_nonfinite, memory_limit=memory_limit,
        restored=found[0] if found else None,
        undo=begin_record(opened, [str(a) for a in to], strengths, block_weights),
    )  # fmt: skip
    recipe.fallback = base.fallback if isinstance(base, Undone) else recipe.fallback
    plan_files(recipe)
    report = start_report("switch", recipe, [str(checkpoint), *map(str, to)], strengths, dry_run)
    report.totals["from"] = [a.name for a in last.adapters] if last else []
    check_in_place(recipe)
    if chosen is not None:
        from lorasurgery.ops.in_place import run_in_place  # imports torch

        report.device, files = str(chosen), files_in_place(recipe)
        report.sources = [source for item in report.inputs for source in describe(item)]
        assert recipe.undo is not None
        before = recipe.restored.files if recipe.restored else {}
        recipe.undo.files = before_in_place(recipe.base, list(files)) | before
        identity = about(
            in_place_call(report), [*old, *opened], chosen.type, weights=strengths, blocks=list(block_weights),
            rounding=rounding, seed=seed,
        )  # fmt: skip
        run_in_place(recipe, identity, lambda: files | record_file(report), report, chosen, progress, resume=resume)
        report.bytes_read += merged.bytes_read if found else 0
        judge_retention(report, recipe)
        if last:
            report.summary = f"{last.names} is out; {report.summary}"
    return clock.stamp(report)
