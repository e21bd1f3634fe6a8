"""The engine of merge and unmerge: plan the output from headers, then stream every tensor through once."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.naming import module_of
from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, index_json, split_shards
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.carry import CONFIG, carried_files, patched_config, write_carried
from lorasurgery.ops.edits import Edit, EditPlan
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch

    from lorasurgery.linalg.rounding import Survival
    from lorasurgery.lowrank import LowRank

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
        names = [n for n in header.tensors if base.file_of[n] == name and n not in recipe.dropped]
        files.append(PlannedFile(name, tuple(_planned(recipe, n) for n in names), header.metadata))
    new = tuple(_planned(recipe, n) for n in edits if n not in base.tensors)
    if new and files:
        last = files[-1]
        files[-1] = PlannedFile(last.name, last.tensors + new, last.metadata)
    files = [f for f in files if f.tensors] or files[:1]
    if recipe.out.suffix == ".safetensors":
        tensors = tuple(t for f in files for t in f.tensors)
        files = [PlannedFile(recipe.out.name, tensors, files[0].metadata)]
    elif recipe.max_shard_size:
        files = split_shards(files, recipe.max_shard_size)
    recipe.files = files


def _planned(recipe: Recipe, name: str) -> PlannedTensor:
    edit = recipe.edits.edits.get(name)
    info = recipe.base.tensors.get(name) or (edit.source if edit else None)
    if edit is not None and edit.replacement is not None and info is None:
        dtype = _common_dtype(recipe.base) if edit.replacement.info.is_float else edit.replacement.info.dtype
    else:
        assert info is not None
        dtype = info.dtype
    if recipe.dtype and dtype in FLOAT_DTYPES:
        dtype = recipe.dtype
    return PlannedTensor(name, dtype, edit.shape if edit else info.shape)  # type: ignore[union-attr]


def _common_dtype(base: Checkpoint) -> str:
    sizes: Counter[str] = Counter()
    for info in base.tensors.values():
        if info.is_float:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


def run(recipe: Recipe, report: Report, device: torch.device, progress: Progress | None) -> None:
    """Stream the checkpoint through the recipe into the output, which appears whole or not at all."""
    from lorasurgery.linalg.rounding import Survival

    total, done, survived = recipe.bytes_planned, 0, Survival(0.0, 0.0, 0.0)
    with ExitStack() as stack:
        output = stack.enter_context(Output(recipe.out, overwrite=recipe.overwrite))
        for planned in recipe.files:
            with output.tensor_file(planned) as file:
                for tensor in planned.tensors:
                    survival = _write(recipe, tensor, file, device, report)
                    survived = survived + survival if survival else survived
                    done += tensor.nbytes
                    if progress:
                        progress(tensor.name, done, total)
        if not recipe.allow_loss and survived.update and survived.retention < LEAST_RETENTION:
            raise SurgeryError(_too_little(recipe, survived))
        _finish(recipe, output)
        report.bytes_written = output.bytes_written
    report.bytes_read = recipe.base.bytes_read + sum(a.weights.bytes_read for a in recipe.adapters)
    report.totals |= {
        "delta_norm": survived.delta_norm, "retention": survived.retention, "noise": survived.noise
    }  # fmt: skip


def _too_little(recipe: Recipe, survived: Survival) -> str:
    narrow = any(t.dtype.startswith("F8") for f in recipe.files for t in f.tensors)
    return (
        f"{recipe.base.path}: rounding would keep {survived.retention:.1%} of the update, so the result would hardly "
        f"differ from the base; --dtype {'bfloat16' if narrow else 'float32'} keeps it, --rounding stochastic keeps "
        "its mean, --allow-loss writes it all the same"
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
            write_carried(output, carried_files(source.folder, recipe.adapters), source.config, config)
        elif recipe.edits.untied:
            config = patched_config(source.config, untied=True)
            output.write_bytes(CONFIG, json.dumps(config, indent=2).encode())
        if len(recipe.files) > 1:
            last = recipe.base.index_name or INDEX
            output.write_bytes(last, (json.dumps(index_json(recipe.files), indent=2) + "\n").encode())
    output.commit(last=last)


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
    try:
        value, survival = apply_edit(recipe, edit, tensor, device)
    except SurgeryError as problem:
        raise type(problem)(f"{base.path}: {tensor.name}: {problem}") from None
    write(tensor.name, value.cpu())
    _describe(edit, survival, report)
    return survival if edit.contributions else None


def apply_edit(
    recipe: Recipe, edit: Edit, tensor: PlannedTensor, device: torch.device
) -> tuple[torch.Tensor, Survival]:
    """Compute one output tensor: replace, add every contribution in float32, round once."""
    from lorasurgery.checkpoint.dtypes import torch_dtype
    from lorasurgery.linalg.rounding import add_updates, set_values

    start = _start(recipe, edit).to(device)
    how: dict[str, Any] = {"rounding": recipe.rounding, "seed": recipe.seed ^ zlib.crc32(tensor.name.encode())}
    dtype = torch_dtype(tensor.dtype)
    if any(c.stacked for c in edit.contributions):
        value, survival = _experts(edit, start, dtype, how)
    else:
        matrix = start.reshape(start.shape[0], -1) if start.ndim else start.reshape(1, 1)
        if any(c.delta.magnitude and not c.bias for c in edit.contributions):
            value, survival = set_values(matrix, _in_turn(edit, matrix), dtype, **how)
        else:
            value, survival = add_updates(matrix, [_to(c.load(), device) for c in edit.contributions], dtype, **how)
    return value.reshape(tensor.shape), survival


def _experts(edit: Edit, start: torch.Tensor, dtype: torch.dtype, how: dict[str, Any]) -> tuple[torch.Tensor, Survival]:
    """All experts of one three-dimensional tensor, each with its own factors."""
    import torch

    from lorasurgery.linalg.rounding import Survival, add_updates

    value = torch.empty(start.shape, dtype=dtype, device=start.device)
    total = Survival(0.0, 0.0, 0.0)
    for e in range(start.shape[0]):
        updates = [_to(c.load(e), start.device) for c in edit.contributions]
        value[e], survival = add_updates(start[e], updates, dtype, **(how | {"seed": how["seed"] + e}))
        total = total + survival
    return value, total


def _in_turn(edit: Edit, matrix: torch.Tensor) -> torch.Tensor:
    """Contributions one after the other in float32, for DoRA's norm is that of the weight it meets."""
    import torch

    from lorasurgery.linalg.dora import decomposed

    value = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    for c in edit.contributions:
        if c.delta.magnitude is None:
            update = _to(c.load(), value.device)
            value = value.addmm(update.up.to(value.dtype), update.down.to(value.dtype), alpha=update.scale)
            continue
        magnitude = c.adapter.weights.read(c.delta.magnitude).to(value.device)
        update = _to(c.plain(), value.device)
        new = decomposed(value, update, magnitude, by_column=c.transposed)
        value = new if c.weight == 1 else value.lerp_(new, c.weight)
    return value


def _to(update: LowRank, device: torch.device) -> LowRank:
    return type(update)(update.up.to(device), update.down.to(device), update.scale)


def _start(recipe: Recipe, edit: Edit) -> torch.Tensor:
    """W itself, or what replaces it or some of its rows; at a weight w other than 1, W + w·(R − W) in float32."""
    import torch

    new = edit.replacement
    if new is None:
        assert edit.source is not None
        value = recipe.base.read(edit.source.name)
    else:
        value = new.adapter.load_replaced(new.name)
        if new.weight != 1:
            if edit.source is None:
                raise SurgeryError("is new to the base, so it can only be taken whole; use weight 1")
            old = recipe.base.read(edit.source.name).to(torch.float32)
            value = old + new.weight * (value.to(torch.float32) - old)
    for item in edit.rows:
        rows, place = item.adapter.weights.read(item.key), torch.tensor(item.rows)
        if item.weight != 1 or value.dtype != rows.dtype:
            value = value.to(torch.promote_types(value.dtype, torch.float32))
        value[place] = torch.lerp(value[place], rows.to(value.dtype), item.weight)
    return value


def _describe(edit: Edit, survival: Survival, report: Report) -> None:
    deltas = [c.delta for c in edit.contributions if not c.bias]
    name = edit.tensor.removesuffix(".weight")
    if not edit.contributions:
        kind = "replaced" if edit.replacement else "rows" if edit.rows else "untied"
        report.full.append(ModuleReport(edit.tensor, edit.shape, kind=kind))
        return
    report.modules.append(
        ModuleReport(
            name if deltas else f"{module_of(edit.tensor)}.bias",
            edit.shape,
            kind=deltas[0].kind if deltas else "bias",
            rank=sum(d.rank for d in deltas) if deltas else None,
            alpha=deltas[0].alpha if len(deltas) == 1 else None,
            delta_norm=survival.delta_norm,
            retention=survival.retention,
            noise=survival.noise,
        )
    )
