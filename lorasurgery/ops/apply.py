"""The engine of merge and unmerge: plan the output from headers, then stream every tensor through once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.hashes import without_hashes
from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.locate import PIPELINE
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, index_json, split_shards
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import OutputError, SurgeryError
from lorasurgery.ops.carry import CONFIG, carried_files, patched_config, write_carried
from lorasurgery.ops.edits import Edit, EditPlan
from lorasurgery.ops.parameters import commonest_dtype
from lorasurgery.ops.quantized import is_narrow, is_scale
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch

    from lorasurgery.linalg.rounding import Survival

Rounding = Literal["nearest", "stochastic"]
INDEX = "model.safetensors.index.json"
LEAST_RETENTION = 0.5


@dataclass
class Recipe:
    """All that is settled before the first byte moves: inputs, edits, output files and how to round.

    Args:
        dropped: Tensors of the base that the output leaves out (unmerge with a base that ties them).
        config_from: The checkpoint whose config and other files go along.
        allow_loss: Write the result even when rounding swallows most of the update.
    """

    base: Checkpoint
    adapters: Sequence[Adapter]
    edits: EditPlan
    out: Path
    dtype: str | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    max_shard_size: int | None = None
    overwrite: bool = False
    dropped: frozenset[str] = frozenset()
    config_from: Checkpoint | None = None
    allow_loss: bool = True
    files: list[PlannedFile] = field(default_factory=list)

    @property
    def bytes_planned(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(t.nbytes for f in self.files for t in f.tensors)


def plan_files(recipe: Recipe) -> None:
    """Settle names, dtypes, shapes and shards of the output, keeping the base's layout unless told otherwise."""
    base, edits = recipe.base, recipe.edits.edits
    files = []
    for name, header in base.files.items():
        prefix = base.parts.get(name, "")
        names = [n for n in (prefix + t for t in header.tensors) if base.file_of[n] == name and n not in recipe.dropped]
        planned = tuple(_planned(recipe, n) for n in names)
        files.append(PlannedFile(name, planned, _metadata(recipe, header.metadata, planned), prefix))
    new = tuple(_planned(recipe, n) for n in edits if n not in base.tensors)
    if new and files:
        last = files[-1]
        files[-1] = replace(last, tensors=last.tensors + new)
    files = [f for f in files if f.tensors] or files[:1]
    if recipe.out.suffix == ".safetensors" and base.parts:
        raise OutputError(f"{recipe.out}: is a file but {base.path} is a diffusers folder of several; name a folder")
    if recipe.out.suffix == ".safetensors":
        tensors = tuple(t for f in files for t in f.tensors)
        files = [PlannedFile(recipe.out.name, tensors, _metadata(recipe, files[0].metadata, tensors))]
    elif recipe.max_shard_size:
        files = split_shards(files, recipe.max_shard_size)
    recipe.files = files


def _metadata(recipe: Recipe, metadata: dict[str, str], tensors: Sequence[PlannedTensor]) -> dict[str, str]:
    """The header's words as they were, but for hashes of bytes that change."""
    base, edits = recipe.base.tensors, recipe.edits.edits
    same = all(t.name not in edits and t.dtype == base[t.name].dtype for t in tensors) and not recipe.dropped
    return metadata if same else without_hashes(metadata)


def _planned(recipe: Recipe, name: str) -> PlannedTensor:
    edit = recipe.edits.edits.get(name)
    info = recipe.base.tensors.get(name) or (edit.source if edit else None)
    if edit is not None and edit.replacement is not None and info is None:
        dtype = commonest_dtype(recipe.base) if edit.replacement.info.is_float else edit.replacement.info.dtype
    else:
        assert info is not None
        dtype = info.dtype
    untouched = edit is None and (is_narrow(dtype) or is_scale(name))  # a cast would say nothing new, or undo a scale
    if recipe.dtype and dtype in FLOAT_DTYPES and not untouched:
        dtype = recipe.dtype
    return PlannedTensor(name, dtype, edit.shape if edit else info.shape)  # type: ignore[union-attr]


def run(recipe: Recipe, report: Report, device: torch.device, progress: Progress | None) -> None:
    """Stream the checkpoint through the recipe into the output, which appears whole or not at all."""
    from lorasurgery.linalg.rounding import Survival

    total, done, survived, narrow = recipe.bytes_planned, 0, Survival(0.0, 0.0, 0.0), Survival(0.0, 0.0, 0.0)
    with ExitStack() as stack:
        output = stack.enter_context(Output(recipe.out, overwrite=recipe.overwrite))
        for planned in recipe.files:
            with output.tensor_file(planned) as file:
                for tensor in planned.tensors:
                    survival = _write(recipe, tensor, file, device, report)
                    survived = survived + survival if survival else survived
                    narrow = narrow + survival if survival and is_narrow(tensor.dtype) else narrow
                    done += tensor.nbytes
                    if progress:
                        progress(tensor.name, done, total)
        if not recipe.allow_loss:
            _check_survival(recipe, survived, narrow)
        _finish(recipe, output)
        report.bytes_written = output.bytes_written
    report.bytes_read = recipe.base.bytes_read + sum(a.weights.bytes_read for a in recipe.adapters)
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


def _finish(recipe: Recipe, output: Output) -> None:
    last = recipe.files[-1].name
    if recipe.out.suffix != ".safetensors":
        source = recipe.config_from or recipe.base
        if not source.is_file:
            dtype = recipe.dtype
            config = patched_config(
                source.config, untied=recipe.edits.untied, vocab_size=recipe.edits.vocab_size, dtype=dtype
            )
            carried = carried_files(source.folder, recipe.adapters, parts=source.parts)
            write_carried(output, carried, source.config, config, dtype)
        elif recipe.edits.untied:
            config = patched_config(source.config, untied=True)
            output.write_bytes(CONFIG, json.dumps(config, indent=2).encode())
        last = _write_indexes(recipe, output) or last
    output.commit(last=last)


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


def _write(
    recipe: Recipe, tensor: PlannedTensor, file: object, device: torch.device, report: Report
) -> Survival | None:
    from lorasurgery.checkpoint.dtypes import torch_dtype

    base, edit = recipe.base, recipe.edits.edits.get(tensor.name)
    write = file.write  # type: ignore[attr-defined]
    if edit is None and base.tensors[tensor.name].dtype == tensor.dtype:
        write(tensor.name, base.chunks(tensor.name))
        return None
    if edit is None:
        from lorasurgery.linalg.rounding import round_to

        write(tensor.name, round_to(base.read(tensor.name), torch_dtype(tensor.dtype)))
        return None
    from lorasurgery.ops.compute import apply_edit

    try:
        value, survival = apply_edit(base, edit, tensor, device, rounding=recipe.rounding, seed=recipe.seed)
    except SurgeryError as problem:
        raise type(problem)(f"{base.path}: {tensor.name}: {problem}") from None
    write(tensor.name, value.cpu())
    _describe(edit, survival, report)
    return survival if edit.contributions else None


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
