"""The last merge taken back to the bit, into a new checkpoint or in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.ops.apply import Recipe, plan_files
from lorasurgery.ops.merge import carry_out, start_report
from lorasurgery.ops.runtime import resolve_device
from lorasurgery.ops.targets import check_in_place, in_place_call
from lorasurgery.ops.undo import about
from lorasurgery.ops.undo_record import UndoRecord
from lorasurgery.ops.undone import Undone
from lorasurgery.report import ModuleReport, Progress, Report


def undo_merge(
    recipe: Recipe, adapters: list[Adapter], inputs: list[str], device: str, progress: Progress | None, *,
    resume: bool, dry_run: bool,
) -> Report:  # fmt: skip
    """Take back what `recipe.restored` is the record of; the arguments and what can go wrong are unmerge's.

    Args:
        recipe: Whose base is the merged checkpoint, without edits.
        adapters: Those of the record, in its order.
    """
    assert recipe.restored is not None
    record, merged = recipe.restored, recipe.base
    chosen = None if dry_run else resolve_device(device)
    undone = Undone(merged, record, adapters, chosen)
    recipe.base, recipe.dropped, recipe.fallback = undone, undone.added, undone.fallback
    plan_files(recipe)
    strengths = [a.weight for a in record.adapters]
    report = start_report("unmerge", recipe, inputs, strengths, dry_run)
    describe_record(record, report)
    in_place = recipe.out == merged.path
    if in_place:
        check_in_place(recipe)
    if chosen is not None:
        report.device = str(chosen)
        name = record.path.name if record.path else ""
        options: dict[str, Any] = {"record": name, "max_shard_size": recipe.max_shard_size}
        if in_place:
            from lorasurgery.ops.in_place import run_in_place  # imports torch

            report.sources = []
            identity = about(in_place_call(report), adapters, chosen.type, **options)
            run_in_place(recipe, identity, dict, report, chosen, progress, resume=resume)
        else:
            carry_out(recipe, report, options, chosen, progress, resume=resume)
        report.bytes_read = merged.bytes_read + sum(a.weights.bytes_read for a in adapters)
        count = len(record.tensors)
        report.summary = f"{count} tensors are to the bit what they were before {record.names} was merged"
    return report


def describe_record(record: UndoRecord, report: Report) -> None:
    """Say which tensors a record is of, and how each is kept."""
    report.totals |= {
        "what": "undone", "exact": True, "undo_file": Path(record.path).name if record.path else "",
        "tensors_touched": len(record.tensors), "adapter_tensors_matched": len(record.tensors),
    }  # fmt: skip
    report.modules = [
        ModuleReport(name.removesuffix(".weight"), kept.shape, kind=kept.kind) for name, kept in record.tensors.items()
    ]
    report.summary = f"{len(record.tensors)} tensors to restore to the bit"
