"""The last merge taken back to the bit, into a new checkpoint or in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.model_names.naming import BaseNames, module_of
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.output import check_output
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.engine.ranks import ranks
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.asked import Paths, all_paths, merge_options
from lorasurgery.ops.merge import carry_out, identity_of, start_report
from lorasurgery.ops.merging.options import MergeOptions
from lorasurgery.ops.merging.recipe import Recipe, Rounding, plan_files
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.targets import check_in_place, check_target, in_place_call, is_recovered, recovered_report
from lorasurgery.ops.merging.undo.record import UndoRecord
from lorasurgery.ops.merging.undo.select import about, merged_weights, record_to_undo
from lorasurgery.ops.merging.undo.view import UndoView
from lorasurgery.ops.placement.block_weight import weighed_plan
from lorasurgery.ops.placement.edits import Edit, EditPlan, Replacement
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch


def undo_merge(
    merged: Checkpoint, record: UndoRecord, adapters: list[Adapter], out: Path, inputs: list[str], device: str,
    progress: Progress | None, *, max_shard_size: int | None, overwrite: bool, memory_limit: int | None, resume: bool,
    dry_run: bool,
) -> Report:  # fmt: skip
    """Take a merge back to the bit; what is not said here is as for unmerge.

    Args:
        record: Of the last merge.
        adapters: Those of the record, in its order.
        out: The new checkpoint, or the path of the merged one.
    """
    chosen, plan = None if dry_run else resolve_device(device), EditPlan()
    fallback = Fallback()
    view = UndoView(merged, record, adapters, chosen, fallback)
    recipe = Recipe(
        base=view, disk=merged, companion=merged, edits=plan, out=out, overwrite=overwrite, restored=record,
        files=plan_files(merged, view, plan, out, max_shard_size=max_shard_size, dropped=view.added),
        memory_limit=memory_limit,
    )  # fmt: skip
    strengths = [a.weight for a in record.adapters]
    report = start_report("unmerge", recipe, inputs, strengths, dry_run)
    describe_record(record, report)
    in_place = out == merged.path
    if in_place:
        check_in_place(recipe)
    if chosen is not None:
        report.device, state = str(chosen), RunState(chosen, progress, fallback)
        name = record.path.name if record.path else ""
        options: dict[str, Any] = {"record": name, "max_shard_size": max_shard_size}
        if in_place:
            from lorasurgery.ops.merging.in_place import run_in_place  # imports torch

            identity = about(in_place_call(report), adapters, chosen.type, **options)
            run_in_place(recipe, state, identity, dict, report, resume=resume)
        else:
            carry_out(recipe, state, report, options, resume=resume)
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


def unmerge(
    merged: str | Path,
    adapters: Paths,
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    *,
    in_place: bool = False,
    undo: bool | None = None,
    undo_file: str | Path | None = None,
    base: str | Path | None = None,
    weights: float | Sequence[float] = (),
    block_weights: str | Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    device: str = "auto",
    max_shard_size: int | str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    memory_limit: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Take adapters out of a checkpoint again: to the bit where the merge left a record, else subtracted and rounded.

    Examples:
        ```python
        unmerge("merged", ["style"], "restored", weights=[0.7], base="llama")
        unmerge("llama", "style", in_place=True)
        ```

    Args:
        merged: Checkpoint the adapters were merged into, with the same weights as given here.
        adapters: The adapters, or the one.
        out: Where the restored checkpoint goes; None with `in_place`, which needs a record.
        undo: False subtracts and rounds though there is a record. What no record says was merged is subtracted too,
            and named in `totals["unrecorded"]` and the first warning.
        undo_file: The record; None is that of the last merge, beside the checkpoint.
        block_weights: As they were merged.
        base: Where replaced tensors (modules_to_save, biases) are restored from; without it they stay as
            they are and the report names them. Deltas are subtracted either way.
        options: as for merge.
        weights: as for merge.
        dtype: as for merge.
        max_shard_size: as for merge.
        resume: as for merge.
        memory_limit: as for merge.

    Raises:
        SurgeryError: as merge does.
    """
    given = {
        "merged": merged, "adapters": adapters, "out": out, "options": options, "in_place": in_place, "undo": undo,
        "undo_file": undo_file, "base": base, "weights": weights, "block_weights": block_weights, "dtype": dtype,
        "rounding": rounding, "seed": seed, "max_shard_size": max_shard_size, "allow_nonfinite": allow_nonfinite,
        "memory_limit": memory_limit, "device": device, "overwrite": overwrite, "resume": resume,
        "dry_run": dry_run, "progress": progress,
    }  # fmt: skip
    with open_call("unmerge", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "merged", "adapters", "device")
        settings = merge_options(options, given)
        merged, original = call.local(merged), call.local(base)
        sources = call.all_local(all_paths(adapters))
        report = _unmerge(
            merged, sources, out, settings, in_place=in_place, undo=undo, undo_file=undo_file, base=original,
            device=device, overwrite=overwrite, resume=resume, dry_run=dry_run, progress=progress,
        )  # fmt: skip
        if dry_run:
            return call.checked(report)
        # in place the record that the merge found comes back, as part of the change
        return call.named(report) if in_place else call.recorded(report, [merged, *sources, original])


def _unmerge(
    merged: str | Path, adapters: Sequence[str | Path], out: str | Path | None, options: MergeOptions, *,
    in_place: bool, undo: bool | None, undo_file: str | Path | None, base: str | Path | None, device: str,
    overwrite: bool, resume: bool, dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    clock, strengths = Clock(), options.check(len(adapters))
    check_device_name(device)
    target = check_target(merged, out, in_place, options.dtype, options.max_shard_size)
    if in_place and is_recovered(target, resume=resume, dry_run=dry_run):
        return clock.stamp(recovered_report("unmerge", str(merged)))
    checkpoint, opened = Checkpoint.open(merged, unfinished=in_place), [open_adapter(a) for a in adapters]
    original = Checkpoint.open(base) if base is not None else None
    inputs = [str(merged), *map(str, adapters), *([str(base)] if base is not None else [])]
    if not in_place:
        check_output(target, [Path(i) for i in inputs], overwrite, resume=resume)
    found = None
    if undo is not False:
        found = record_to_undo(Path(merged), opened, undo_file, options.weights, options.block_weights)
    if found is not None:
        if options.dtype:
            raise UsageError("--dtype: what comes back to the bit keeps its dtype; --no-undo subtracts and rounds")
        record, ordered = found
        report = undo_merge(
            checkpoint, record, ordered, target, inputs, device, progress, max_shard_size=options.max_shard_size,
            overwrite=overwrite, memory_limit=options.memory_limit, resume=resume, dry_run=dry_run,
        )  # fmt: skip
        return clock.stamp(report)
    if in_place:
        raise MismatchError(
            f"{merged}: has no record of a merge, so nothing would give the bits back; -o OUT subtracts and rounds "
            "into a new checkpoint"
        )
    recipe = _subtraction(checkpoint, opened, strengths, original, target, options, overwrite=overwrite)
    report = start_report("unmerge", recipe, inputs, strengths, dry_run)
    _compare(report, Path(merged), opened, strengths)
    _name_unrestored(report, checkpoint, recipe.edits)
    if not dry_run:
        chosen = resolve_device(device)
        report.device, state = str(chosen), RunState(chosen, progress)
        carry_out(recipe, state, report, identity_of(options), resume=resume)
        if ranks().first:
            _summarise(report)
    return clock.stamp(report)


def _subtraction(
    merged: Checkpoint, adapters: list[Adapter], strengths: list[float], original: Checkpoint | None, out: Path,
    options: MergeOptions, *, overwrite: bool,
) -> Recipe:  # fmt: skip
    """The recipe of an unmerge without a record: the merge with negative weights."""
    plan = weighed_plan(merged, adapters, [-w for w in strengths], options.block_weights, replaces=False)
    plan.untied, dropped = False, frozenset[str]()
    if original is not None:
        dropped = restore_from(original, merged, plan)
    files = plan_files(merged, merged, plan, out, dtype=options.dtype, max_shard_size=options.max_shard_size,
                       dropped=dropped)  # fmt: skip
    return Recipe(
        base=merged, disk=merged, companion=original or merged, edits=plan, out=out, files=files, dtype=options.dtype,
        rounding=options.rounding, seed=options.seed, overwrite=overwrite, memory_limit=options.memory_limit,
        allow_nonfinite=options.allow_nonfinite,
    )  # fmt: skip


def restore_from(original: Checkpoint, merged: Checkpoint, plan: EditPlan) -> frozenset[str]:
    """Turn every replaced tensor into a copy of the original's; returns the tensors the original never had."""
    names = BaseNames(original.tensors, original.config, str(original.path))
    restored: set[str] = set()
    for name in plan.unrestored:
        path, leaf = module_of(name), name[len(module_of(name)) + 1 :]
        found = names.find(path, leaf)
        target = found if found in merged.tensors else None
        if found is not None and target is not None:
            new = Replacement(original, found)
            plan.edits[target] = Edit(target, merged.tensors[target], new.info.shape, replacement=new)
            restored.add(target)
    dropped = frozenset(merged.tensors) - frozenset(original.tensors)
    explained = set(plan.unrestored) | set(plan.edits)
    strange = sorted(dropped - explained)
    if strange:
        raise MismatchError(
            f"{original.path}: has no {strange[0]}, which {merged.path} has and no adapter explains; "
            "is this the base the adapters were merged into?"
        )
    for name in dropped:
        plan.edits.pop(name, None)
    plan.unrestored = [n for n in plan.unrestored if n not in restored | dropped]
    return dropped


def _name_unrestored(report: Report, merged: Checkpoint, plan: EditPlan) -> None:
    for name in plan.unrestored:
        info = merged.tensors.get(name)
        report.left_out.append(ModuleReport(name, info.shape if info else (), kind="replaced"))
    if plan.unrestored:
        first = ", ".join(plan.unrestored[:3])
        report.warnings.append(
            f"{len(plan.unrestored)} tensors that the adapter replaced are left as they are ({first}"
            f"{' …' if len(plan.unrestored) > 3 else ''}): only --base BASE can restore them"
        )


def _compare(report: Report, merged: Path, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Say what is subtracted without a record of its merge, before all else, or with another strength than recorded."""
    notes: list[str] = []
    recorded = merged_weights(merged, adapters, notes)
    report.totals["unrecorded"] = [Path(a.path).name for a, w in zip(adapters, recorded, strict=True) if w is None]
    names = ", ".join(report.totals["unrecorded"])
    if names:
        report.summary = f"{report.totals['tensors_touched']} tensors to subtract from, no record of the merge"
        notes.insert(
            0,
            f"no record says that {names} was ever merged into {merged}: the update is subtracted all the same, and "
            "where it was not in there, the result is no model that anybody had",
        )
    notes += [
        f"{Path(a.path).name} was merged with weight {then:g}, as the record beside {merged} says, but weight {now:g} "
        f"is subtracted; -w {then:g} takes all of it out"
        for a, now, then in zip(adapters, weights, recorded, strict=True)
        if then is not None and now != then
    ]
    report.warnings[:0] = notes


def _summarise(report: Report) -> None:
    totals = report.totals
    unknown = bool(totals["unrecorded"])
    done = "tensors had the update subtracted, rounded" if unknown else "tensors restored up to rounding"
    left = "left as they are" if unknown else "not restored"
    report.summary = (
        f"{totals['tensors_touched']} {done} (noise {totals['noise']:.1%} of the update), "
        f"{totals['tensors_replaced']} copied from the base, {len(report.left_out)} {left}"
    )
