"""The pieces that merge and unmerge are made of: bytes copied by the system, rows merged, whole tensors computed."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.buffers import Buffers
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.files import PAGE
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.writer import TensorFile, as_bytes
from lorasurgery.errors import FormatError, SurgeryError
from lorasurgery.linalg.norms import block_height
from lorasurgery.linalg.rounding import Merger, Survival
from lorasurgery.linalg.threads import own_stream
from lorasurgery.ops.apply import Recipe
from lorasurgery.ops.compute import apply_edit, placed
from lorasurgery.ops.edits import Edit
from lorasurgery.ops.turns import Turns, is_by_row

PIECE = 8 << 20  # bytes of a weight that are read, merged and written together
Files = Callable[[], TensorFile]
Done = Callable[[str, Survival | None], None]


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
            self.done(tensor.name, None)


class Rows:
    """One tensor that is merged row by row: its updates, read once, and how many of its pieces are still missing.

    Args:
        edit: None for a tensor that is only cast.
    """

    def __init__(
        self, recipe: Recipe, edit: Edit | None, tensor: PlannedTensor, device: torch.device, file: Files, done: Done,
    ) -> None:  # fmt: skip
        self.recipe, self.edit, self.tensor, self.device, self.file, self.done = (
            recipe, edit, tensor, device, file, done
        )  # fmt: skip
        self.weights, name = recipe.base, edit.source.name if edit and edit.source else tensor.name
        if edit and edit.replacement:
            held = edit.replacement.adapter
            self.weights, name = held.weights, held.replaced[edit.replacement.name]
        self.info: TensorInfo = self.weights.tensors[name]
        self.source, self.dtype = torch_dtype(self.info.dtype), torch_dtype(tensor.dtype)
        self.stacked = edit is not None and any(c.stacked for c in edit.contributions)
        self._mergers: dict[int, Merger | Turns] = {}
        self._found: dict[int, Survival] = {}
        self._lock = threading.Lock()
        self.pieces = list(self._pieces())

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of one matrix: of each expert where there are several."""
        shape = self.info.shape[1:] if self.stacked else self.info.shape
        return (shape[0], prod(shape[1:])) if shape else (1, 1)

    def _pieces(self) -> Iterator[tuple[int, slice]]:
        """(expert, rows): whole blocks, as many as make up a piece."""
        rows, columns = self.matrix
        block = block_height(columns, self.device)
        many = max(1, PIECE // max(1, block * columns * self.source.itemsize)) * block
        for expert in range(self.info.shape[0] if self.stacked else 1):
            for start in range(0, rows, many):
                yield expert, slice(start, min(start + many, rows))

    def merger(self, expert: int) -> Merger | Turns:
        """What is added to one matrix; the factors are read when the first piece needs them."""
        with self._lock:
            if expert not in self._mergers:
                self._mergers[expert] = self._load(expert)
            return self._mergers[expert]

    def _load(self, expert: int) -> Merger | Turns:
        contributions = self.edit.contributions if self.edit else []
        seed = self.recipe.seed ^ zlib.crc32(self.tensor.name.encode())
        how: dict[str, Any] = {"rounding": self.recipe.rounding, "seed": seed + expert}
        if self.edit and any(c.decomposes for c in contributions):
            return Turns(self.edit, self.matrix[0], self.source, self.dtype, self.device, **how)
        if self.stacked:
            updates = [c.load(expert) for c in contributions]
        else:
            updates = [placed(c, self.matrix[0]) for c in contributions]
        on_device = [u.to(self.device) for u in updates]
        if self.device.type == "cuda":  # others use them on streams of their own
            torch.cuda.current_stream(self.device).synchronize()
        return Merger(self.source, on_device, self.dtype, **how)

    def finish(self, piece: int, survival: Survival) -> None:
        """Count a piece as written; after the last one the tensor is done."""
        with self._lock:
            self._found[piece] = survival
            if len(self._found) < len(self.pieces):
                return
            self._mergers.clear()
        whole = sum((self._found[i] for i in sorted(self._found)), Survival(0.0, 0.0, 0.0))
        self.done(self.tensor.name, whole)


class RowsJob:
    """Some rows of a tensor: read, merged and written."""

    def __init__(self, work: Rows, piece: int, buffers: Buffers) -> None:
        self.work, self.piece, self.buffers = work, piece, buffers
        self.expert, self.rows = work.pieces[piece]
        self.count = (self.rows.stop - self.rows.start) * work.matrix[1]
        self.cost = self.count * (work.source.itemsize + work.dtype.itemsize)
        self._in: Tensor | None = None
        self._out: Tensor | None = None

    def read(self) -> None:
        """Read the rows into memory that is used again."""
        size = self.count * self.work.source.itemsize
        self._in = self.buffers.take(size)
        start = (self.expert * self.work.matrix[0] + self.rows.start) * self.work.matrix[1] * self.work.source.itemsize
        self.work.weights.fill(self.work.info.name, as_bytes(self._in[:size]), start)

    @torch.inference_mode()
    def compute(self) -> None:
        """Merge the rows on the device."""
        work, shape = self.work, (self.rows.stop - self.rows.start, self.work.matrix[1])
        assert self._in is not None
        self._out = self._aligned(self.count * work.dtype.itemsize)
        weight = self._in[: self.count * work.source.itemsize].view(work.source).view(shape)
        out = self._out.view(work.dtype).view(shape)
        try:
            merger = work.merger(self.expert)
            if work.device.type == "cpu":
                self.survival = merger.rows(weight, out, self.rows.start)
            else:
                self.survival = _on_device(merger, weight, out, self.rows.start, work.device)
        except SurgeryError as problem:
            raise type(problem)(f"{work.recipe.base.path}: {work.tensor.name}: {problem}") from None
        self.buffers.give(self._in)
        self._in = None

    def _aligned(self, size: int) -> Tensor:
        """Memory for the result that lies to a page as the place in the file does: the system need not copy it."""
        self._lent = self.buffers.take(size + PAGE)
        place = self.work.file().place(self.work.tensor.name) + self._start
        skipped = (place - self._lent.data_ptr()) % PAGE
        return self._lent[skipped : skipped + size]

    @property
    def _start(self) -> int:
        """Where the rows begin in the tensor as it is written, in bytes."""
        rows, columns = self.work.matrix
        place: int = (self.expert * rows + self.rows.start) * columns * self.work.dtype.itemsize
        return place

    def write(self) -> None:
        """Write the rows to their place."""
        work = self.work
        assert self._out is not None
        work.file().put(work.tensor.name, self._start, as_bytes(self._out))
        self._out = None
        self.buffers.give(self._lent)
        work.finish(self.piece, self.survival)


class WholeJob:
    """A tensor that only makes sense as a whole: with rows that are replaced, or norms of columns."""

    def __init__(
        self, recipe: Recipe, edit: Edit, tensor: PlannedTensor, device: torch.device, file: Files, done: Done
    ) -> None:
        self.recipe, self.edit, self.tensor, self.device, self.file, self.done = (
            recipe, edit, tensor, device, file, done
        )  # fmt: skip
        self.cost = whole_bytes(tensor)

    def read(self) -> None:
        """Nothing: what must be read is known when it is computed."""

    @torch.inference_mode()
    def compute(self) -> None:
        """Compute the tensor."""
        recipe = self.recipe
        try:
            value, self.survival = apply_edit(
                recipe.base, self.edit, self.tensor, self.device, rounding=recipe.rounding, seed=recipe.seed
            )
        except SurgeryError as problem:
            raise type(problem)(f"{recipe.base.path}: {self.tensor.name}: {problem}") from None
        self.value: Tensor | None = value.cpu().contiguous()

    def write(self) -> None:
        """Write it."""
        assert self.value is not None
        self.file().put(self.tensor.name, 0, as_bytes(self.value))
        self.value = None
        self.done(self.tensor.name, self.survival if self.edit.contributions else None)


def _on_device(merger: Merger | Turns, weight: Tensor, out: Tensor, first: int, device: torch.device) -> Survival:
    """The same on a GPU, from and to pinned memory."""
    with own_stream(device):
        here = weight.to(device, non_blocking=True)
        result = torch.empty(out.shape, dtype=out.dtype, device=device)
        survival = merger.rows(here, result, first)
        out.copy_(result, non_blocking=True)
    return survival


def whole_bytes(tensor: PlannedTensor) -> int:
    """Memory that a tensor taken as a whole needs: as it is stored, and twice in float32."""
    return tensor.nbytes + 8 * prod(tensor.shape)


def is_by_rows(edit: Edit | None) -> bool:
    """Whether rows can be merged on their own, whatever is in the others."""
    if edit is None:
        return True
    new = edit.replacement
    start = edit.source if new is None else new.info if new.weight == 1 else None
    return (
        start is not None
        and start.shape == edit.shape
        and start.is_float
        and not edit.rows
        and all(is_by_row(c) for c in edit.contributions)
        and len({c.stacked for c in edit.contributions}) <= 1  # one and all experts of a tensor: the whole tensor
    )
