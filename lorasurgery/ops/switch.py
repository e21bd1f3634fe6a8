"""switch: one adapter out of a checkpoint and another one in, in its own files and in one pass."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.arguments import PATHS, check_kinds
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import MismatchError, UsageError, some
from lorasurgery.ops.asked import Paths, all_paths, merge_options
from lorasurgery.ops.merge import judge_retention, start_report
from lorasurgery.ops.merging.options import MergeOptions
from lorasurgery.ops.merging.recipe import Recipe, Rounding, plan_files
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.targets import (
    check_in_place,
    check_same_tensors,
    files_of_origin,
    in_place_call,
    is_recovered,
    put_back,
    record_file,
    recovered_report,
)
from lorasurgery.ops.merging.undo.record import UndoRecord, top_record
from lorasurgery.ops.merging.undo.select import (
    about,
    adapters_of,
    before_in_place,
    begin_record,
    files_in_place,
    merged_names,
    record_to_undo,
)
from lorasurgery.ops.merging.undo.view import UndoView
from lorasurgery.ops.placement.block_weight import weighed_plan
from lorasurgery.ops.provenance.record import describe
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import RECORD_NAME, Progress, Report


def switch(
    checkpoint: str | Path,
    to: Paths,
    options: MergeOptions | None = None,
    *,
    from_: Paths = (),
    add: bool = False,
    base: str | Path | None = None,
    weights: float | Sequence[float] = (),
    block_weights: str | Sequence[str] = (),
    rounding: Rounding = "nearest",
    seed: int = 0,
    device: str = "auto",
    allow_loss: bool = False,
    allow_nonfinite: bool = False,
    resume: bool = False,
    memory_limit: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Undo the last merge to the bit and merge other adapters instead, reading and writing what changes once.

    Examples:
        ```python
        switch("llama", "topic")
        ```

    Args:
        checkpoint: A folder or file that `merge --in-place` or `merge --undo` left with a record.
        to: The adapters to be merged now, or the one, with `weights` and `block_weights` as for merge.
        options: As for merge; files keep their dtypes and shards, so that those two must not be in it.
        from_: Where the adapters that were merged last are, unless they lie beside the checkpoint or the new ones, in
            the current folder, or in the Hub's cache.
        add: Take nothing out: put `to` on top of whatever is there, as `merge --in-place` does.
        base: Begin from this checkpoint instead of a record: every tensor that differs from it is put back.

    Raises:
        MismatchError: no record says what is to come out, and neither `add` nor `base` was given.
        SurgeryError: as merge and unmerge do.
    """
    given = {
        "checkpoint": checkpoint, "to": to, "options": options, "from_": from_, "add": add, "base": base,
        "weights": weights, "block_weights": block_weights, "rounding": rounding, "seed": seed,
        "allow_loss": allow_loss, "allow_nonfinite": allow_nonfinite, "memory_limit": memory_limit,
        "device": device, "resume": resume, "dry_run": dry_run, "progress": progress,
    }  # fmt: skip
    with open_call("switch", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "checkpoint", "to", "device", to=PATHS)
        settings = merge_options(options, given)
        new, old = call.all_local(all_paths(to)), call.all_local(all_paths(from_))
        report = _switch(
            checkpoint, new, old, call.local(base), settings, add=add, device=device, resume=resume, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
        return call.checked(report) if dry_run else call.named(report)  # the record is part of the change


def _switch(
    checkpoint: str | Path, to: Sequence[str | Path], from_: Sequence[str | Path], base: str | Path | None,
    options: MergeOptions, *, add: bool, device: str, resume: bool, dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    clock, path, strengths = Clock(), Path(checkpoint), options.check(len(to))
    check_device_name(device)
    _check_ways(from_, add=add, base=base)
    if options.dtype or options.max_shard_size:
        raise UsageError("switch: dtypes and shards stay as they are; leave --dtype and --max-shard-size out")
    if is_recovered(path, resume=resume, dry_run=dry_run):
        return clock.stamp(recovered_report("switch", str(path)))
    merged, opened = Checkpoint.open(path, unfinished=True), [open_adapter(a) for a in to]
    last = None if add else top_record(path)
    if last is not None and base is not None:
        raise UsageError(f"--base: an undo record takes {last.names} out to the bit; omit --base")
    if last is None and not add and base is None:
        raise MismatchError(_nothing_to_take_out(path, to))
    places = [path.absolute().parent, *(Path(a).absolute().parent for a in to), Path.cwd()]
    old = [open_adapter(a) for a in adapters_of(last, from_, places)] if last else []
    found = record_to_undo(path, old, None, (), ()) if last else None
    chosen = None if dry_run else resolve_device(device)
    fallback = Fallback()
    origin = Checkpoint.open(base) if base is not None else None
    start: Checkpoint | UndoView = origin or (UndoView(merged, *found, chosen, fallback) if found else merged)
    if origin is not None:
        check_same_tensors(merged, origin)
    plan = weighed_plan(start, opened, strengths, options.block_weights)
    used = [a for a, w in zip(opened, strengths, strict=True) if w]
    if origin is not None and not dry_run:
        put_back(plan, merged, origin)
    files, before = ({}, {}) if dry_run else _small_files(merged, origin, used, found[0] if found else None)
    recipe = Recipe(
        base=start, disk=merged, companion=merged, adapters=used, edits=plan, out=path,
        files=plan_files(merged, start, plan, path), rounding=options.rounding, seed=options.seed,
        allow_loss=options.allow_loss, allow_nonfinite=options.allow_nonfinite, memory_limit=options.memory_limit,
        restored=found[0] if found else None,
        undo=begin_record(opened, [str(a) for a in to], strengths, options.block_weights, before),
    )  # fmt: skip
    inputs = [str(checkpoint), *([str(base)] if base is not None else []), *map(str, to)]
    report = start_report("switch", recipe, inputs, strengths, dry_run)
    report.totals["from"] = [a.name for a in last.adapters] if last else []
    check_in_place(recipe)
    if chosen is not None:
        report.device, state = str(chosen), RunState(chosen, progress, fallback)
        about_it: dict[str, object] = {"weights": strengths, "blocks": list(options.block_weights),
                                       "rounding": options.rounding, "seed": options.seed}  # fmt: skip
        _carry_out(
            recipe, state, report, [*old, *opened], files, about_it, add=add, rebased=origin is not None, resume=resume
        )
        judge_retention(report, recipe)
        what = f"{last.names} is out" if last else f"begun from {base}" if base is not None else "nothing is taken out"
        report.summary = f"{what}; {report.summary}"
    return clock.stamp(report)


def _check_ways(from_: Sequence[str | Path], *, add: bool, base: str | Path | None) -> None:
    given = [name for name, there in (("--add", add), ("--base", base is not None), ("--from", bool(from_))) if there]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: say one way to begin, not {len(given)}")


def _carry_out(
    recipe: Recipe, state: RunState, report: Report, given: Sequence[Adapter], files: dict[str, bytes],
    options: dict[str, object], *, add: bool, rebased: bool, resume: bool,
) -> None:  # fmt: skip
    """Change the files, and keep what undoing it needs.

    Args:
        files: Other files that change too: name -> new content.
        rebased: Whether a base was given to begin from.
    """
    from lorasurgery.ops.merging.in_place import run_in_place  # imports torch

    report.sources = [source for item in report.inputs for source in describe(item, report.warnings)]
    call = f"{in_place_call(report)}{' --add' if add else ''}"
    if rebased:
        options["base"] = report.sources[1].to_dict()
    identity = about(call, given, state.device.type, **options)
    run_in_place(recipe, state, identity, lambda: files | record_file(report), report, resume=resume)


def _small_files(
    merged: Checkpoint, origin: Checkpoint | None, adapters: Sequence[Adapter], restored: UndoRecord | None
) -> tuple[dict[str, bytes], dict[str, bytes | None]]:
    """Config and tokenizer by name: their new content, and what undoing the switch puts back."""
    if origin is not None:
        return files_of_origin(merged, origin, adapters)
    files = files_in_place(merged, adapters)
    return files, before_in_place(merged, list(files)) | (restored.files if restored else {})


def _nothing_to_take_out(path: Path, to: Sequence[str | Path]) -> str:
    """A plain base, or a merge without --undo: which of them no file can tell for sure."""
    new, old = (some([shlex.quote(show(name)) for name in names]) for names in (map(str, to), merged_names(path)))
    where = shlex.quote(show(str(path)))
    told = f"; {RECORD_NAME} says that {old} was merged, but without --undo" if old else ""
    return (
        f"{show(str(path))}: no undo record says which adapter is in it, so none can be taken out{told}. --add puts "
        f"{new} on top of what is there, --base BASE begins from the base again, and `lorasurgery unmerge {where} "
        f"{old or 'OLD'} -o OUT` subtracts the old one first"
    )
