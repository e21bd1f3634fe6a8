"""What merge and unmerge will write, settled from headers: files, tensors, dtypes and shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.naming import commonest_dtype
from lorasurgery.adapters.single_file.header import without_hashes
from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, split_shards
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.errors import OutputError
from lorasurgery.ops.merging.undo.record import UndoRecord
from lorasurgery.ops.placement.edits import Edit, EditPlan
from lorasurgery.ops.placement.quantized import is_narrow, is_scale

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class TensorRecipe:
    """What becomes of each tensor, wherever it goes.

    Args:
        base: What the tensors are before.
        edits: What is done to them.
        seed: Of stochastic rounding.
        allow_nonfinite: Write NaN and infinity where they come up.
        undo: Keep what it takes to undo this to the bit: the record as far as it is known in advance.
        restored: The record whose merge is taken back by this; `base` then reads as it was before.
    """

    base: TensorReader
    edits: EditPlan
    rounding: Rounding = "nearest"
    seed: int = 0
    allow_nonfinite: bool = False
    undo: UndoRecord | None = None
    restored: UndoRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(TensorRecipe):
    """All that is settled before the first byte moves: inputs, edits, output files and how to round.

    Args:
        disk: The checkpoint whose files are copied or changed; `base` may be a view of it.
        adapters: Those that are merged, for what lies beside their weights.
        out: The new checkpoint, or the path of `disk`.
        files: What `out` will hold; see plan_files.
        dtype: safetensors name of floating tensors written; None keeps each tensor's own.
        companion: The checkpoint whose config and other files go along.
        allow_loss: Write the result even when rounding swallows most of the update.
        memory_limit: Bytes that weights on their way may take; None for what is fastest.
    """

    disk: Checkpoint
    adapters: Sequence[Adapter] = ()
    out: Path
    files: tuple[PlannedFile, ...]
    dtype: str | None = None
    overwrite: bool = False
    companion: Checkpoint
    allow_loss: bool = True
    memory_limit: int | None = None


def plan_files(
    disk: Checkpoint, base: TensorReader, plan: EditPlan, out: Path, *, dtype: str | None = None,
    max_shard_size: int | None = None, dropped: Collection[str] = (),
) -> tuple[PlannedFile, ...]:  # fmt: skip
    """Settle names, dtypes, shapes and shards of the output, keeping the layout of `disk` unless told otherwise.

    Args:
        disk: As for Recipe.
        base: As for Recipe.
        out: As for Recipe.
        dtype: As for Recipe.
        max_shard_size: Bytes.
        dropped: Tensors that the output leaves out.

    Raises:
        OutputError: one file cannot hold a diffusers folder of several.
    """

    def kept(metadata: dict[str, str], tensors: Sequence[PlannedTensor]) -> dict[str, str]:
        """The header's words as they were, but for hashes of bytes that change."""
        same = all(t.name not in plan.edits and t.dtype == base.tensors[t.name].dtype for t in tensors)
        return metadata if same and not dropped else without_hashes(metadata)

    files = []
    for name, header in disk.files.items():
        prefix = disk.parts.get(name, "")
        names = [n for n in (prefix + t for t in header.tensors) if disk.file_of[n] == name and n not in dropped]
        planned = tuple(_planned(base, plan.edits.get(n), n, dtype) for n in names)
        files.append(PlannedFile(name, planned, kept(header.metadata, planned), prefix))
    new = tuple(_planned(base, edit, n, dtype) for n, edit in plan.edits.items() if n not in base.tensors)
    if new and files:
        last = files[-1]
        files[-1] = replace(last, tensors=last.tensors + new)
    files = [f for f in files if f.tensors] or files[:1]
    if out.suffix == ".safetensors" and disk.parts:
        raise OutputError(f"{out}: is a file but {disk.path} is a diffusers folder of several; name a folder")
    if out.suffix == ".safetensors":
        tensors = tuple(t for f in files for t in f.tensors)
        files = [PlannedFile(out.name, tensors, kept(files[0].metadata, tensors))]
    elif max_shard_size:
        files = split_shards(files, max_shard_size)
    return tuple(files)


def _planned(base: TensorReader, edit: Edit | None, name: str, wanted: str | None) -> PlannedTensor:
    info = base.tensors.get(name) or (edit.source if edit else None)
    if edit is not None and edit.replacement is not None and info is None:
        dtype = commonest_dtype(base) if edit.replacement.info.is_float else edit.replacement.info.dtype
    else:
        assert info is not None
        dtype = info.dtype
    untouched = edit is None and (is_narrow(dtype) or is_scale(name))  # a cast would say nothing new, or undo a scale
    if wanted and dtype in FLOAT_DTYPES and not untouched:
        dtype = wanted
    return PlannedTensor(name, dtype, edit.shape if edit else info.shape)  # type: ignore[union-attr]
