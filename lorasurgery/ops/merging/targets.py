"""Where the result of merge, unmerge and switch goes: to a new place, or into the files that are there."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inplace.journal import check_line, file_of
from lorasurgery.checkpoint.inplace.recover import (
    FOLDER,
    cannot_write,
    recover_first,
    refuse_unfinished,
    surgery_folder,
    unfinished,
)
from lorasurgery.checkpoint.inside import is_link, link_on_the_way, refuse_link, to_read, to_replace
from lorasurgery.checkpoint.locate import load_bytes
from lorasurgery.checkpoint.operation import current
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.same import same_tensors
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import MismatchError, OutputError, UsageError, some
from lorasurgery.ops.factors.sidecars import CONFIG, tokenizer_files, tokenizer_in
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.undo.record import UndoRecord, top_record, undo_folder
from lorasurgery.ops.placement.edits import Edit, EditPlan, Replacement
from lorasurgery.ops.provenance.record import record_bytes
from lorasurgery.report import COMMAND_LINE, RECORD_NAME, Report

_ONE_PROCESS = "--in-place: is the work of one process; start it without torchrun"


def check_target(
    base: str | Path, out: str | Path | None, in_place: bool, dtype: str | None, max_shard_size: int | None, *,
    undo: bool = False,
) -> Path:  # fmt: skip
    """The output, or the checkpoint itself.

    Raises:
        UsageError: both, neither, or options that need a new place.
    """
    if in_place == (out is not None):
        raise UsageError("give either -o OUT or --in-place")
    if in_place and (dtype or max_shard_size):
        raise UsageError("--in-place: dtypes and shards stay as they are; --dtype and --max-shard-size need -o OUT")
    if undo and dtype:
        raise UsageError("--undo: what --dtype rounds away can't be undone; leave one of them away")
    return Path(base if out is None else out)


def is_recovered(checkpoint: Path, *, resume: bool, dry_run: bool) -> bool:
    """Before an operation in place: lock, and finish what an interrupted one had ready; whether nothing is left to do.

    A dry run finishes nothing, and is refused where something is unfinished.

    Raises:
        MismatchError: another one is unfinished; or none is, and this was to go on with it: it may be complete, and
            would be done twice.
    """
    if dry_run:
        refuse_unfinished(checkpoint)
        return False
    if ranks().size > 1:
        raise UsageError(_ONE_PROCESS)
    hold_in_place(checkpoint)
    began = unfinished(checkpoint) is not None
    done = recover_first(checkpoint, resume=resume)
    if resume and not began:
        last = top_record(checkpoint)
        merged = f"the last merge on record is of {last.names}" if last else "no merge is on record"
        raise MismatchError(
            f"{show(str(checkpoint))}: nothing is unfinished here, so there is nothing to resume: the operation is "
            f"complete or never began; {merged}, and without --resume the command does all of it"
        )
    return done


def hold_in_place(checkpoint: Path) -> None:
    """Keep others away from a checkpoint before anything of it is read that a plan rests on.

    Raises:
        OutputError: another command is at work there, or the system refuses the lock.
    """
    operation = current()
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if operation is None or not checkpoint.exists() or not os.access(home, os.W_OK):  # which others say better
        return
    try:
        operation.hold(checkpoint)
    except OSError as problem:
        raise cannot_write(checkpoint, problem, "nothing was changed") from None


def recovered_report(command: str, checkpoint: str) -> Report:
    """The report of a resumed operation of which only names were missing."""
    return Report(
        command, [checkpoint], checkpoint, sources=[], totals={"what": "settled"},
        summary="all of it was there already; only names were missing, and they are given now",
    )  # fmt: skip


def in_place_call(report: Report) -> str:
    """The operation as a person would name it."""
    inputs = [Path(i).name for i in report.inputs]
    return " ".join([report.command, *inputs, *(["--in-place"] if report.command != "switch" else [])])


def record_file(report: Report) -> dict[str, bytes]:
    """The record of an operation in place, by its name; a single file has none."""
    if not Path(report.output).is_dir():
        return {}
    return {RECORD_NAME: record_bytes(report, COMMAND_LINE.get() or in_place_call(report))}


def check_in_place(recipe: Recipe) -> None:
    """Refuse what can't be done inside the files, before anything is touched.

    Raises:
        MismatchError: a tensor that is new, goes, or gets another shape or dtype.
        OutputError: files that must not or can't be written to.
    """
    disk = recipe.disk
    if ranks().size > 1:
        raise UsageError(_ONE_PROCESS)
    if disk.path.is_file() and is_link(disk.path):
        raise OutputError(f"{show(str(disk.path))}: is a link; name the file itself")
    touched = {t.name: t for f in recipe.files for t in f.tensors if is_touched(recipe, t.name)}
    for name, tensor in touched.items():
        info = disk.tensors.get(name)
        if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise MismatchError(
                f"{show(str(disk.path))}: {show(name)} would be {'new' if info is None else 'of another shape'}, so it "
                "has no place in the files as they are; write a new checkpoint with -o OUT"
            )
    for file in sorted({disk.file_of[name] for name in touched}):
        _check_file(disk.folder, file)
    _check_others(disk.path, recipe.restored)
    _check_names(disk, touched)


def _check_others(checkpoint: Path, restored: UndoRecord | None) -> None:
    """What changes beside the weights: records, and the files that a record names."""
    records = undo_folder(checkpoint)
    refuse_link(records)
    if restored is not None and restored.files and not checkpoint.is_dir():
        raise MismatchError(
            f"{show(str(restored.path))}: also puts back files of a folder ({some(list(restored.files))}), and "
            f"{show(str(checkpoint))} is a file; name its folder, or write a new checkpoint with -o OUT"
        )
    if checkpoint.is_dir():
        for name in [RECORD_NAME, *(restored.files if restored else ())]:
            to_replace(checkpoint, name)
            check_line({"ending": {"0": name}, "removed": []}, checkpoint, "")


def _check_names(disk: Checkpoint, touched: Collection[str]) -> None:
    """Refuse at once what a journal would not be believed: names that no record of this program has."""
    place = surgery_folder(disk.path)
    file_name = file_of(place, FOLDER)
    weights = sorted({disk.file_of[name] for name in touched})
    record = f"{undo_folder(disk.path).name}/0001.safetensors"
    check_line({"ready": [[name, 0, 0, 0, 0] for name in weights], "done": {}}, place.parent, file_name)
    check_line({"ending": {"0": record}, "removed": []}, place.parent, file_name)


def _check_file(folder: Path, name: str) -> None:
    path = link_on_the_way(folder, name) or folder / name
    where = show(str(path))
    if is_link(path) or path.stat().st_nlink > 1:
        raise OutputError(
            f"{where}: is a link, so others would be changed too (the Hub's cache keeps files this way); "
            "copy the checkpoint first, or write a new one with -o OUT"
        )
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{where}: may not be written to")


def is_touched(recipe: Recipe, name: str) -> bool:
    """Whether a tensor's bytes may change."""
    return name in recipe.edits.edits or (recipe.restored is not None and name in recipe.restored.tensors)


def check_same_tensors(checkpoint: Checkpoint, origin: Checkpoint) -> None:
    """See that a checkpoint's files have a place for every tensor of what it is begun from again.

    Raises:
        MismatchError: the two have other tensors, dtypes or shapes.
    """
    for name in sorted({*checkpoint.tensors, *origin.tensors}):
        here, there = checkpoint.tensors.get(name), origin.tensors.get(name)
        if here is None or there is None or (here.dtype, here.shape) != (there.dtype, there.shape):
            raise MismatchError(
                f"{show(str(origin.path))}: {show(name)} is not as in {show(str(checkpoint.path))}, so it is not "
                "a base of what is there; `lorasurgery merge BASE ADAPTER -o OUT` writes a new checkpoint"
            )


def put_back(plan: EditPlan, checkpoint: Checkpoint, origin: Checkpoint) -> None:
    """Let a plan write every other tensor too in which a checkpoint differs from what it is begun from again."""
    for name in [n for n in checkpoint.tensors if n not in plan.edits]:
        info = origin.tensors[name]
        if not same_tensors(checkpoint, checkpoint.tensors[name], origin, info):
            plan.edits[name] = Edit(name, info, info.shape, replacement=Replacement(origin, name))


def files_of_origin(
    checkpoint: Checkpoint, origin: Checkpoint, adapters: Sequence[Adapter]
) -> tuple[dict[str, bytes], dict[str, bytes | None]]:
    """Config and tokenizer by name: what is to be written, and what `origin` has of it.

    Raises:
        FormatError: a link leads out of either folder.
        MismatchError: two tokenizers would be mixed.
    """
    if checkpoint.is_file or origin.is_file:
        return {}, {}
    tokenizer = tokenizer_files(adapters) or tokenizer_in(origin.folder)
    left = sorted(set(tokenizer_in(checkpoint.folder)) - set(tokenizer))
    if left:
        raise MismatchError(
            f"{show(str(checkpoint.folder / left[0]))}: the tokenizer that is to come has no such file, so two would "
            "be mixed; `lorasurgery merge BASE ADAPTER -o OUT` writes a new checkpoint"
        )
    config = to_read(origin.folder, CONFIG)
    wanted = {name: _bytes(file) for name, file in {CONFIG: config, **tokenizer}.items()}
    changed = {
        n: data for n, data in wanted.items() if data is not None and data != _bytes(to_read(checkpoint.folder, n))
    }
    before = {n: _bytes(to_read(origin.folder, n)) for n in (*tokenizer, CONFIG, RECORD_NAME)}
    return changed, {n: data for n, data in before.items() if n == RECORD_NAME or data != wanted[n]}


def _bytes(path: Path) -> bytes | None:
    return load_bytes(path) if path.is_file() else None
