"""What merge and unmerge will write, settled from headers: files, tensors, dtypes and shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.naming import commonest_dtype
from lorasurgery.adapters.single_file.header import without_hashes
from lorasurgery.checkpoint.header import FLOAT_DTYPES
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, split_shards
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.errors import OutputError
from lorasurgery.ops.merging.undo.record import UndoRecord
from lorasurgery.ops.placement.edits import EditPlan
from lorasurgery.ops.placement.quantized import is_narrow, is_scale

Rounding = Literal["nearest", "stochastic"]


@dataclass
class Recipe:
    """All that is settled before the first byte moves: inputs, edits, output files and how to round.

    Args:
        dropped: Tensors of the base that the output leaves out (unmerge with a base that ties them).
        config_from: The checkpoint whose config and other files go along.
        allow_loss: Write the result even when rounding swallows most of the update.
        memory_limit: Bytes that weights on their way may take; None for what is fastest.
        allow_nonfinite: Write NaN and infinity where they come up.
        undo: Keep what it takes to undo this to the bit: the record as far as it is known beforehand.
        restored: The record whose merge is taken back by this; `base` then reads as it was before.
        carried: What else goes along into a new folder, as it was found at the beginning: name -> source.
        fallback: What was done where the device's memory did not suffice.
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
    memory_limit: int | None = None
    allow_nonfinite: bool = False
    undo: UndoRecord | None = None
    restored: UndoRecord | None = None
    fallback: Fallback = field(default_factory=Fallback)
    files: list[PlannedFile] = field(default_factory=list)
    carried: dict[str, Path] = field(default_factory=dict)

    @property
    def companion(self) -> Checkpoint:
        """The checkpoint whose config and tokenizer go along."""
        return self.config_from or self.base

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
