"""How merge and unmerge end: the report from what every tensor left, config and indexes, and the names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.inside import leads_out
from lorasurgery.checkpoint.locate import PIPELINE
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, index_json
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.factors.sidecars import CONFIG, patched_config, write_carried
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.undo.record import (
    FOLDER,
    Kept,
    next_name,
    planned_record,
    stack,
    undo_folder,
    write_planned,
)
from lorasurgery.ops.merging.undo.recorder import kept
from lorasurgery.ops.placement.edits import Edit, EditPlan
from lorasurgery.ops.placement.quantized import is_narrow
from lorasurgery.report import RECORD_NAME, ModuleReport, Report

INDEX = "model.safetensors.index.json"
LEAST_RETENTION = 0.5


def describe(files: Sequence[PlannedFile], edits: EditPlan, done: Mapping[str, Any], report: Report) -> None:
    """Fill in the report, tensor by tensor in the order of the files.

    Args:
        done: tensor -> its Survival as a list (of those that were computed), and what its undoing needs.
    """
    whole = Survival(0.0, 0.0, 0.0)
    for _, edit, survival in _edited(files, edits, done):
        _describe(edit, survival, report)
        whole = whole + survival if edit.contributions else whole
    report.totals |= {"delta_norm": whole.delta_norm, "retention": whole.retention, "noise": whole.noise}


def check_survival(recipe: Recipe, done: Mapping[str, Any]) -> None:
    """Stop when rounding swallows most of the update; 8-bit weights count for themselves too, beside wider ones.

    Args:
        done: As for describe.

    Raises:
        SurgeryError: it does, and that was not allowed.
    """
    if recipe.allow_loss:
        return
    whole, narrow = Survival(0.0, 0.0, 0.0), Survival(0.0, 0.0, 0.0)
    for tensor, edit, survival in _edited(recipe.files, recipe.edits, done):
        if edit.contributions:
            whole = whole + survival
            narrow = narrow + survival if is_narrow(tensor.dtype) else narrow
    for survived, where in ((narrow, " in the 8-bit tensors"), (whole, "")):
        if survived.update and survived.retention < LEAST_RETENTION:
            raise SurgeryError(
                f"{recipe.base.path}: rounding would keep {survived.retention:.1%} of the update{where}, so the result "
                f"would hardly differ from the base; --dtype {'bfloat16' if where else 'float32'} keeps it, --rounding "
                "stochastic keeps its mean, --allow-loss writes it all the same"
            )


def _edited(
    files: Sequence[PlannedFile], edits: EditPlan, done: Mapping[str, Any]
) -> Iterator[tuple[PlannedTensor, Edit, Survival]]:
    """Every tensor that an edit changes, in the order of the files, and how much of the update survived in it."""
    for tensor, edit in _touched(files, edits):
        yield tensor, edit, Survival(*(done[tensor.name]["survived"] or (0.0, 0.0, 0.0)))


def _touched(files: Sequence[PlannedFile], edits: EditPlan) -> Iterator[tuple[PlannedTensor, Edit]]:
    for tensor in (t for f in files for t in f.tensors):
        edit = edits.edits.get(tensor.name)
        if edit is not None:
            yield tensor, edit


def _describe(edit: Edit, survival: Survival, report: Report) -> None:
    deltas = [c.delta for c in edit.contributions if c.delta is not None and not c.bias]
    name = edit.tensor.removesuffix(".weight")
    if not edit.contributions:
        kind = "replaced" if edit.replacement else "rows" if edit.rows else "untied"
        report.full.append(ModuleReport(edit.tensor, edit.shape, kind=kind))
        return
    report.modules.append(
        ModuleReport(
            name if deltas or len(edit.shape) > 1 else edit.tensor,
            edit.shape,
            kind=deltas[0].kind if deltas else "bias" if edit.tensor.endswith("bias") else "vector",
            rank=sum(d.rank for d in deltas) if deltas else None,
            alpha=deltas[0].alpha if len(deltas) == 1 else None,
            delta_norm=survival.delta_norm,
            retention=survival.retention,
            noise=survival.noise,
        )
    )


def finish(recipe: Recipe, output: Output, done: Mapping[str, Any], carried: Mapping[str, Path]) -> None:
    """Write config and indexes and what goes along, and give every file its name.

    Args:
        carried: Other files that go along into a new folder: name -> source.
    """
    last = recipe.files[-1].name
    write_undo(recipe, output, done)
    if recipe.out.suffix != ".safetensors":
        source = recipe.companion
        if not source.is_file:
            dtype = recipe.dtype
            config = patched_config(
                source.config, untied=recipe.edits.untied, vocab_size=recipe.edits.vocab_size, dtype=dtype
            )
            left = {name: file for name, file in carried.items() if name not in files_before(recipe)}
            _put_back(recipe, output)
            write_carried(output, left, source.config, config, dtype)
        elif recipe.edits.untied:
            own = {} if leads_out(source.folder / CONFIG, source.folder) else source.config
            config = patched_config(own, untied=True)
            output.write_bytes(CONFIG, json.dumps(config, indent=2).encode())
        last = _write_indexes(recipe, output) or last
    output.commit(last=last)


def write_undo(recipe: Recipe, output: Output, done: Mapping[str, Any]) -> None:
    """The records of the merges that can be undone, this one's last."""
    below = stack(recipe.disk.path)
    if recipe.restored is not None and recipe.restored.path in below:
        below = below[: below.index(recipe.restored.path)]
    if recipe.undo is None and recipe.restored is None:
        return  # what the base's records speak of is no longer there
    folder = undo_folder(recipe.out).name if output.single else FOLDER
    for old in below:
        output.copy_file(f"{folder}/{old.name}", old)
    if recipe.undo is None:
        return
    assert output.run is not None
    name = f"{folder}/{next_name(len(below))}"
    planned, about = planned_record(recipe.undo, kept_of_each(recipe, done), name)
    with output.tensor_file(planned) as file:
        write_planned(file, about, kept_of_each(recipe, done), output.run.path("0").parent)


def kept_of_each(recipe: Recipe, done: Mapping[str, Any]) -> Iterator[tuple[str, Kept]]:
    """Every tensor that the merge changed, in the order of the files, and what its undoing needs.

    Args:
        done: As for describe.
    """
    for tensor, _ in _touched(recipe.files, recipe.edits):
        yield tensor.name, kept(tensor, recipe.base, done[tensor.name]["kept"])


def files_before(recipe: Recipe) -> Mapping[str, bytes | None]:
    """What the merge that is taken back changed besides the weights: name -> bytes, None for what was not there."""
    return recipe.restored.files if recipe.restored else {}


def _put_back(recipe: Recipe, output: Output) -> None:
    """Files that the merge changed, as they were before."""
    for name, data in files_before(recipe).items():
        if data is not None and name != RECORD_NAME:  # how this came about is another record
            output.write_bytes(name, data)


def _write_indexes(recipe: Recipe, output: Output) -> str | None:
    """An index wherever there are several shards; returns the file that must come last."""
    last = None
    for prefix in dict.fromkeys(f.prefix for f in recipe.files):
        files = [f for f in recipe.files if f.prefix == prefix]
        if len(files) > 1:
            folder = files[0].name.rpartition("/")[0]
            name = recipe.disk.indexes.get(prefix) or recipe.disk.index_name
            last = name or (f"{folder}/diffusion_pytorch_{INDEX}" if folder else INDEX)
            output.write_bytes(last, (json.dumps(index_json(files), indent=2) + "\n").encode())
    return PIPELINE if recipe.disk.parts else last
