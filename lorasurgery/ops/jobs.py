"""The pieces that merge and unmerge are made of: bytes copied by the system, whole tensors computed or taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.writer import TensorFile, as_bytes
from lorasurgery.errors import FormatError, SurgeryError
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.apply import Recipe
from lorasurgery.ops.compute import apply_edit
from lorasurgery.ops.edits import Edit
from lorasurgery.ops.recorder import Recorder
from lorasurgery.ops.turns import is_by_row
from lorasurgery.ops.undo_record import Stretch

Files = Callable[[], TensorFile]


@dataclass(frozen=True)
class Note:
    """What is known of a piece when it is written: how the update survived in it, and what its undoing needs."""

    survival: Survival | None = None
    kept: list[Any] = field(default_factory=list)


Done = Callable[[str, Note], None]


class Slot(Protocol):
    """Where one tensor goes, piece by piece, in any order and from several threads."""

    def expect(self, pieces: int) -> None:
        """Say how many pieces there will be."""
        ...

    def place(self) -> int:
        """Where in its file the tensor begins."""
        ...

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Write a piece, from the tensor's byte `start` on."""
        ...


class CopyJob:
    """Tensors that lie side by side in both files and stay as they are."""

    cost = 1

    def __init__(self, base: Checkpoint, tensors: list[PlannedTensor], file: Files, done: Done) -> None:
        self.base, self.tensors, self.file, self.done = base, tensors, file, done

    def read(self) -> None:
        """Nothing: the system copies."""

    def compute(self) -> None:
        """Nothing."""

    def write(self) -> None:
        """Copy all of them at once."""
        first = self.tensors[0].name
        info, size = self.base.tensors[first], sum(t.nbytes for t in self.tensors)
        source = self.base.readable(first)
        if self.file().copy(first, source, info.start, size) != size:
            raise FormatError(f"{self.base.path}: {first}: the file ends inside this tensor; it was cut while in use")
        self.base.count(size)
        for tensor in self.tensors:
            self.done(tensor.name, Note())


class WholeJob:
    """A tensor that only makes sense as a whole: with rows that are replaced, or norms of columns."""

    def __init__(
        self, recipe: Recipe, edit: Edit, tensor: PlannedTensor, device: torch.device, slot: Slot,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.edit, self.tensor, self.device, self.slot = recipe, edit, tensor, device, slot
        self.recorder = recorder
        self.cost = whole_bytes(tensor)
        slot.expect(1)

    def read(self) -> None:
        """Nothing: what must be read is known when it is computed."""

    @torch.inference_mode()
    def compute(self) -> None:
        """Compute the tensor."""
        ways = [partial(self._computed, device) for device in (self.device, torch.device("cpu"))]
        (value, self.survival), _ = self.recipe.fallback.first(self.tensor.name, ways)
        self.value: Tensor | None = value
        self.kept = self.recorder.whole(self.edit, self.tensor, self.value) if self.recorder else []

    def _computed(self, device: torch.device) -> tuple[Tensor, Survival]:
        recipe = self.recipe
        try:
            value, survival = apply_edit(
                recipe.base,
                self.edit,
                self.tensor,
                device,
                rounding=recipe.rounding,
                seed=recipe.seed,
                finite=not recipe.allow_nonfinite,
            )
        except SurgeryError as problem:
            raise type(problem)(f"{recipe.base.path}: {self.tensor.name}: {problem}") from None
        return value.cpu().contiguous(), survival

    def write(self) -> None:
        """Write it."""
        assert self.value is not None
        self.slot.put(0, 0, as_bytes(self.value), Note(self.survival if self.edit.contributions else None, self.kept))
        self.value = None


class StretchJob:
    """Some bytes of a tensor as it was before a merge, taken back where they were."""

    def __init__(self, base: Checkpoint, name: str, piece: int, stretch: Stretch, slot: Slot) -> None:
        self.base, self.name, self.piece, self.stretch, self.slot = base, name, piece, stretch, slot
        self.cost = 4 * stretch.size
        self._data: bytearray | None = None

    def read(self) -> None:
        """Nothing: reading and taking back are one."""

    def compute(self) -> None:
        """Take the update out of the merged bytes."""
        self._data = bytearray(self.stretch.size)
        self.base.fill(self.name, memoryview(self._data), self.stretch.start)

    def write(self) -> None:
        """Write them."""
        assert self._data is not None
        self.slot.put(self.piece, self.stretch.start, memoryview(self._data), Note())
        self._data = None


def whole_bytes(tensor: PlannedTensor) -> int:
    """Memory that a tensor taken as a whole needs: as it is stored, and twice in float32."""
    return tensor.nbytes + 8 * prod(tensor.shape)


def is_by_rows(edit: Edit | None, *, recorded: bool = False) -> bool:
    """Whether rows can be merged on their own, whatever is in the others.

    Args:
        recorded: What was there is kept, so that what takes its place must meet it.
    """
    if edit is None:
        return True
    new = edit.replacement
    if recorded and new is not None:
        return False
    start = edit.source if new is None else new.info if new.weight == 1 else None
    return (
        start is not None
        and start.shape == edit.shape
        and start.is_float
        and not edit.rows
        and all(is_by_row(c) for c in edit.contributions)
        and len({c.stacked for c in edit.contributions}) <= 1  # one and all experts of a tensor: the whole tensor
    )
