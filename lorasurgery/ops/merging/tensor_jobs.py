"""The pieces that merge and unmerge are made of: bytes copied by the system, whole tensors computed or taken back."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.files import PAGE
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.checkpoint.writer import TensorFile, as_bytes
from lorasurgery.engine.buffers import Buffers
from lorasurgery.engine.pipeline import Job
from lorasurgery.engine.threads import own_stream
from lorasurgery.errors import FormatError, SurgeryError
from lorasurgery.linalg.norms import block_height
from lorasurgery.linalg.rounding import Merger, Survival
from lorasurgery.ops.merging.arithmetic import DoraRows, apply_edit, is_by_row, placed
from lorasurgery.ops.merging.recipe import TensorRecipe
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.undo.record import Stretch
from lorasurgery.ops.merging.undo.recorder import Recorder
from lorasurgery.ops.placement.edits import Edit

Files = Callable[[], TensorFile]


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a piece when it is written: how the update survived in it, and what its undoing needs."""

    survival: Survival | None = None
    kept: list[Any] = field(default_factory=list)


Done = Callable[[PlannedTensor, Note], None]


class Destination(Protocol):
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
            self.done(tensor, Note())


class WholeJob:
    """A tensor that only makes sense as a whole: with rows that are replaced, or norms of columns."""

    def __init__(
        self, recipe: TensorRecipe, edit: Edit, tensor: PlannedTensor, state: RunState, slot: Destination,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.edit, self.tensor, self.state, self.slot = recipe, edit, tensor, state, slot
        self.recorder = recorder
        self.cost = whole_bytes(tensor)
        slot.expect(1)

    def read(self) -> None:
        """Nothing: what must be read is known when it is computed."""

    @torch.inference_mode()
    def compute(self) -> None:
        """Compute the tensor."""
        ways = [partial(self._computed, device) for device in (self.state.device, torch.device("cpu"))]
        (value, self.survival), _ = self.state.fallback.first(self.tensor.name, ways)
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

    def __init__(self, base: TensorReader, name: str, piece: int, stretch: Stretch, slot: Destination) -> None:
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


PIECE = 8 << 20  # bytes of a weight that are read, merged and written together


class Rows:
    """One tensor that is merged row by row: its updates, read once, and how many of its pieces are still missing.

    Args:
        edit: None for a tensor that is only cast.
    """

    def __init__(
        self, recipe: TensorRecipe, edit: Edit | None, tensor: PlannedTensor, state: RunState, slot: Destination,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.edit, self.tensor, self.slot = recipe, edit, tensor, slot
        self.device, self.fallback = state.device, state.fallback
        self.recorder = recorder if edit is not None else None
        self.weights, name = recipe.base, edit.source.name if edit and edit.source else tensor.name
        if edit and edit.replacement:
            self.weights, name = edit.replacement.weights, edit.replacement.key
        self.info: TensorInfo = self.weights.tensors[name]
        self.source, self.dtype = torch_dtype(self.info.dtype), torch_dtype(tensor.dtype)
        self.stacked = edit is not None and any(c.stacked for c in edit.contributions)
        shape = self.info.shape[1:] if self.stacked else self.info.shape
        self.matrix = (shape[0], prod(shape[1:])) if shape else (1, 1)  # (rows, columns), of each expert if several
        self._mergers: dict[tuple[int, str], Merger | DoraRows] = {}
        self._way = 0
        self._lock = threading.Lock()
        self.pieces = list(self._pieces())
        self._left = len(self.pieces)
        slot.expect(len(self.pieces))

    def _pieces(self) -> Iterator[tuple[int, slice]]:
        """(expert, rows): whole blocks, as many as make up a piece."""
        rows, columns = self.matrix
        block = block_height(columns, self.device)
        many = max(1, PIECE // max(1, block * columns * self.source.itemsize)) * block
        for expert in range(self.info.shape[0] if self.stacked else 1):
            for start in range(0, rows, many):
                yield expert, slice(start, min(start + many, rows))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first byte of each piece in the tensor as it is read, and how many."""
        rows, columns = self.matrix
        width = columns * self.source.itemsize
        return [((e * rows + r.start) * width, (r.stop - r.start) * width) for e, r in self.pieces]

    def merge(self, expert: int, weight: Tensor, out: Tensor, first: int) -> Survival:
        """Merge some rows: all at once, a few at a time where the device's memory does not suffice, or on the CPU.

        Args:
            weight: (b, n), on the CPU.
            out: (b, n), on the CPU.
            first: Which row of the matrix they begin with.
        """
        whole, cpu = max(1, weight.shape[0]), torch.device("cpu")
        ways = [
            partial(self._few, device, expert, weight, out, first, -(-whole // parts))
            for device, parts in ((self.device, 1), (self.device, 2), (self.device, 8), (cpu, 1))
        ]
        found, way = self.fallback.first(self.tensor.name, ways, self._way)
        self._way = max(self._way, way)  # for the next rows
        if way == len(ways) - 1 and self.device != cpu:
            with self._lock:  # factors on a full device are in others' way
                self._mergers.pop((expert, self.device.type), None)
        return found

    def _few(self, device: torch.device, expert: int, weight: Tensor, out: Tensor, first: int, height: int) -> Survival:
        merger, found = self._merger(expert, device), Survival(0.0, 0.0, 0.0)
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            found = found + _on_device(merger, weight[rows], out[rows], first + start, device)
        return found

    def _merger(self, expert: int, device: torch.device) -> Merger | DoraRows:
        """What is added to one matrix; the factors are read when the first piece needs them."""
        with self._lock:
            key = expert, device.type
            if key not in self._mergers:
                self._mergers[key] = self._load(expert, device)
            return self._mergers[key]

    def _load(self, expert: int, device: torch.device) -> Merger | DoraRows:
        contributions = self.edit.contributions if self.edit else []
        seed = self.recipe.seed ^ zlib.crc32(self.tensor.name.encode())
        how: dict[str, Any] = {
            "rounding": self.recipe.rounding, "seed": seed + expert, "finite": not self.recipe.allow_nonfinite
        }  # fmt: skip
        merger: Merger | DoraRows
        if self.edit and any(c.decomposes for c in contributions):
            merger = DoraRows(self.edit, self.matrix[0], self.source, self.dtype, device, **how)
        else:
            updates = [c.load(expert) if self.stacked else placed(c, self.matrix[0]) for c in contributions]
            merger = Merger(self.source, [u.to(device) for u in updates], self.dtype, **how)
        if device.type == "cuda":  # others use them on streams of their own
            torch.cuda.current_stream(device).synchronize()
        return merger

    def skip(self) -> None:
        """Count a piece as done; after the last one the factors go."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
            self._mergers.clear()
        if self.recorder is not None:
            self.recorder.forget(self.tensor.name)

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Write a piece."""
        self.slot.put(piece, start, data, note)
        self.skip()


class RowsJob:
    """Some rows of a tensor: read, merged and written."""

    def __init__(self, work: Rows, piece: int, buffers: Buffers) -> None:
        self.work, self.piece, self.buffers = work, piece, buffers
        self.expert, self.rows = work.pieces[piece]
        self.count = (self.rows.stop - self.rows.start) * work.matrix[1]
        self.cost = self.count * (work.source.itemsize + work.dtype.itemsize)
        self._in: Tensor | None = None
        self._out: Tensor | None = None
        self._kept: list[Any] = []

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
            self.survival = work.merge(self.expert, weight, out, self.rows.start)
        except SurgeryError as problem:
            raise type(problem)(f"{work.recipe.base.path}: {work.tensor.name}: {problem}") from None
        if work.recorder is not None:
            assert work.edit is not None
            self._kept = work.recorder.rows(
                work.edit, work.tensor, self.expert, self.rows.start, self._start, weight, out
            )
        self.buffers.give(self._in)
        self._in = None

    def _aligned(self, size: int) -> Tensor:
        """Memory for the result that lies to a page as the place in the file does: the system need not copy it."""
        if size < PAGE:  # goes through the system's cache in any case
            self._lent = self.buffers.take(size)
            return self._lent[:size]
        self._lent = self.buffers.take(size + PAGE)
        place = self.work.slot.place() + self._start
        skipped = (place - self._lent.data_ptr()) % PAGE
        skipped -= skipped % self.work.dtype.itemsize  # in files of others numbers may begin anywhere
        return self._lent[skipped : skipped + size]

    @property
    def _start(self) -> int:
        """Where the rows begin in the tensor as it is written, in bytes."""
        rows, columns = self.work.matrix
        place: int = (self.expert * rows + self.rows.start) * columns * self.work.dtype.itemsize
        return place

    def write(self) -> None:
        """Write the rows to their place."""
        assert self._out is not None
        self.work.put(self.piece, self._start, as_bytes(self._out), Note(self.survival, self._kept))
        self._out = None
        self.buffers.give(self._lent)


def _on_device(merger: Merger | DoraRows, weight: Tensor, out: Tensor, first: int, device: torch.device) -> Survival:
    """Merge rows that are on the CPU; on a GPU from and to pinned memory."""
    if device.type == "cpu":
        return merger.rows(weight, out, first)
    with own_stream(device):
        here = weight.to(device, non_blocking=True)
        result = torch.empty(out.shape, dtype=out.dtype, device=device)
        survival = merger.rows(here, result, first)
        out.copy_(result, non_blocking=True)
    return survival


def jobs_of(
    recipe: TensorRecipe, tensor: PlannedTensor, slot: Destination, state: RunState,
    recorder: Recorder | None = None, *, skip: Collection[str] = (),
) -> Iterator[tuple[str, Job]]:  # fmt: skip
    """(key, job) of each piece of a tensor that an edit changes, or that a merge is taken back from.

    Args:
        recorder: Keeps what the undoing needs.
        skip: Keys of pieces that are done already.
    """
    for key, job in _all_jobs(recipe, tensor, slot, state, recorder):
        if key not in skip:
            yield key, job
        elif isinstance(job, RowsJob):
            job.work.skip()


def _all_jobs(
    recipe: TensorRecipe, tensor: PlannedTensor, slot: Destination, state: RunState, recorder: Recorder | None
) -> Iterator[tuple[str, Job]]:
    edit = recipe.edits.edits.get(tensor.name)
    back = recipe.restored.tensors.get(tensor.name) if recipe.restored else None
    if edit is None and back is not None:
        slot.expect(len(back.stretches))
        for i, stretch in enumerate(back.stretches):
            yield f"{i} {tensor.name}", StretchJob(recipe.base, tensor.name, i, stretch, slot)
        return
    if is_by_rows(edit, recorded=recipe.undo is not None) and tensor.nbytes:
        rows = Rows(recipe, edit, tensor, state, slot, recorder)
        # a piece is written while others are still to be read, so each must come back from its own bytes alone
        if back is None or [(s.start, s.size) for s in back.stretches] == rows.spans:
            yield from ((f"{i} {tensor.name}", RowsJob(rows, i, state.buffers)) for i in range(len(rows.pieces)))
            return
    if edit is not None:
        yield f"0 {tensor.name}", WholeJob(recipe, edit, tensor, state, slot, recorder)
