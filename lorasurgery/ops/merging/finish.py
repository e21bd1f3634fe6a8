"""How merge and unmerge end: the report from what every tensor left, config and indexes, and the names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.inside import leads_out
from lorasurgery.checkpoint.locate import PIPELINE
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import index_json
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.factors.sidecars import CONFIG, patched_config, write_carried
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.undo.record import FOLDER, next_name, planned_record, stack, undo_folder, write_planned
from lorasurgery.ops.merging.undo.recorder import kept
from lorasurgery.ops.placement.edits import Edit
from lorasurgery.ops.placement.quantized import is_narrow
from lorasurgery.report import RECORD_NAME, ModuleReport, Report

INDEX = "model.safetensors.index.json"
LEAST_RETENTION = 0.5


def describe(recipe: Recipe, done: Mapping[str, Any], report: Report) -> None:
    """Fill in the report, tensor by tensor in the order of the files.

    Args:
        done: tensor -> its Survival as a list (of those that were computed), and what its undoing needs.

    Raises:
        SurgeryError: rounding swallows most of the update and that was not allowed.
    """
    survived, narrow = Survival(0.0, 0.0, 0.0), Survival(0.0, 0.0, 0.0)
    for tensor in (t for f in recipe.files for t in f.tensors):
        edit = recipe.edits.edits.get(tensor.name)
        if edit is None:
            continue
        survival = Survival(*(done[tensor.name]["survived"] or (0.0, 0.0, 0.0)))
        _describe(edit, survival, report)
        if edit.contributions:
            survived = survived + survival
            narrow = narrow + survival if is_narrow(tensor.dtype) else narrow
    if not recipe.allow_loss:
        _check_survival(recipe, survived, narrow)
    report.totals |= {
        "delta_norm": survived.delta_norm, "retention": survived.retention, "noise": survived.noise
    }  # fmt: skip


def _check_survival(recipe: Recipe, whole: Survival, narrow: Survival) -> None:
    """Stop when rounding swallows most of the update; 8-bit weights count for themselves too, beside wider ones."""
    for survived, where in ((narrow, " in the 8-bit tensors"), (whole, "")):
        if survived.update and survived.retention < LEAST_RETENTION:
            raise SurgeryError(
                f"{recipe.base.path}: rounding would keep {survived.retention:.1%} of the update{where}, so the result "
                f"would hardly differ from the base; --dtype {'bfloat16' if where else 'float32'} keeps it, --rounding "
                "stochastic keeps its mean, --allow-loss writes it all the same"
            )


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


def finish(recipe: Recipe, output: Output, done: Mapping[str, Any]) -> None:
    """Write config and indexes and what goes along, and give every file its name."""
    last = recipe.files[-1].name
    write_undo(recipe, output, done)
    if recipe.out.suffix != ".safetensors":
        source = recipe.companion
        if not source.is_file:
            dtype = recipe.dtype
            config = patched_config(
                source.config, untied=recipe.edits.untied, vocab_size=recipe.edits.vocab_size, dtype=dtype
            )
            carried = dict(recipe.carried)
            _put_back(recipe, output, carried)
            write_carried(output, carried, source.config, config, dtype)
        elif recipe.edits.untied:
            own = {} if leads_out(source.folder / CONFIG, source.folder) else source.config
            config = patched_config(own, untied=True)
            output.write_bytes(CONFIG, json.dumps(config, indent=2).encode())
        last = _write_indexes(recipe, output) or last
    output.commit(last=last)


def write_undo(recipe: Recipe, output: Output, done: Mapping[str, Any]) -> None:
    """The records of the merges that can be undone, this one's last."""
    below = stack(recipe.base.path)
    if recipe.restored is not None and recipe.restored.path in below:
        below = below[: below.index(recipe.restored.path)]
    if recipe.undo is None and recipe.restored is None:
        return  # what the base's records speak of is no longer there
    folder = undo_folder(recipe.out).name if output.single else FOLDER
    for old in below:
        output.copy_file(f"{folder}/{old.name}", old)
    if recipe.undo is None:
        return
    edits = recipe.edits.edits
    for tensor in (t for f in recipe.files for t in f.tensors if t.name in edits):
        listed = done[tensor.name]["kept"]
        recipe.undo.tensors[tensor.name] = kept(tensor, recipe.base, listed)
    assert output.run is not None
    planned, about, places = planned_record(recipe.undo, f"{folder}/{next_name(len(below))}")
    with output.tensor_file(planned) as file:
        write_planned(file, about, places, output.run.path("0").parent)


def _put_back(recipe: Recipe, output: Output, carried: dict[str, Path]) -> None:
    """Files that the merge changed, as they were before."""
    for name, data in (recipe.restored.files if recipe.restored else {}).items():
        carried.pop(name, None)
        if data is not None and name != RECORD_NAME:  # how this came about is another record
            output.write_bytes(name, data)


def _write_indexes(recipe: Recipe, output: Output) -> str | None:
    """An index wherever there are several shards; returns the file that must come last."""
    last = None
    for prefix in dict.fromkeys(f.prefix for f in recipe.files):
        files = [f for f in recipe.files if f.prefix == prefix]
        if len(files) > 1:
            folder = files[0].name.rpartition("/")[0]
            name = recipe.base.indexes.get(prefix) or recipe.base.index_name
            last = name or (f"{folder}/diffusion_pytorch_{INDEX}" if folder else INDEX)
            output.write_bytes(last, (json.dumps(index_json(files), indent=2) + "\n").encode())
    return PIPELINE if recipe.base.parts else last
