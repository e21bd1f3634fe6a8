"""A merged checkpoint as it was before its last merge: every tensor is read as if nobody had merged anything."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import Header, TensorInfo, show
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.tensor_reader import ReadsByFill
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.errors import FormatError, MismatchError, UsageError
from lorasurgery.ops.merging.undo.record import Stretch, UndoRecord
from lorasurgery.ops.placement.block_weight import weighed_plan
from lorasurgery.ops.placement.edits import Edit

if TYPE_CHECKING:
    import torch

    from lorasurgery.linalg.undo import Undoing

_HELD = 4  # tensors whose factors are kept at hand


class UndoView(ReadsByFill):
    """What a record says was there, read through the merged checkpoint: each stretch is checked before and after.

    Args:
        merged: The checkpoint as it is.
        record: Of its last merge.
        adapters: Those of the record, in its order, with the same content.
        device: Where updates are taken out; None where only headers are wanted, and then torch is not imported.
        fallback: Notes where the device's memory does not suffice; None is one of its own.

    Raises:
        MismatchError: the checkpoint's tensors are not those that the record speaks of.
    """

    def __init__(
        self, merged: Checkpoint, record: UndoRecord, adapters: list[Adapter], device: torch.device | None,
        fallback: Fallback | None = None,
    ) -> None:  # fmt: skip
        self.merged, self.record, self.device = merged, record, device
        strengths = [a.weight for a in record.adapters]
        try:
            plan = weighed_plan(merged, adapters, strengths, record.block_weights, replaces=False)
        except UsageError as problem:  # what is wrong is in the record, not in what was typed
            raise FormatError(f"{_at(record)}: is a damaged undo record ({problem})") from None
        self._edits: dict[str, Edit] = plan.edits
        self._held: OrderedDict[tuple[str, int, str], Undoing] = OrderedDict()
        self._turn, self._fallback = threading.Lock(), fallback or Fallback()
        self.added = frozenset(n for n, k in record.tensors.items() if k.kind == "added")
        self.tensors = {n: self._info(n, info) for n, info in merged.tensors.items() if n not in self.added}
        for name, kept in record.tensors.items():
            if any(s.how == "steps" for s in kept.stretches) and name not in self._edits:
                raise MismatchError(f"{_at(record)}: {show(name)} was changed by no adapter given")

    @property
    def path(self) -> Path:
        """The merged checkpoint's."""
        return self.merged.path

    @property
    def files(self) -> dict[str, Header]:
        """The merged checkpoint's shards."""
        return self.merged.files

    @property
    def file_of(self) -> Mapping[str, str]:
        """Tensor -> shard."""
        return self.merged.file_of

    @property
    def parts(self) -> dict[str, str]:
        """Of a diffusers folder, shard -> prefix."""
        return self.merged.parts

    @property
    def config(self) -> dict[str, Any]:
        """The merged checkpoint's config.json."""
        return self.merged.config

    def config_of(self, part: str) -> dict[str, Any]:
        """The same of a part of a diffusers folder."""
        return self.merged.config_of(part)

    def where(self, name: str) -> str:
        """A tensor, for messages: its file and name."""
        return self.merged.where(name)

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        kept = self.record.tensors.get(name)
        if kept is None:
            return info
        if kept.kind == "resized":
            size = sum(s.size for s in kept.stretches)
            return TensorInfo(name, kept.dtype, kept.shape, 0, size)
        if (kept.dtype, kept.shape) != (info.dtype, info.shape):
            raise MismatchError(
                f"{show(str(self.path))}: {show(name)} is {info.dtype} {list(info.shape)} but was merged as "
                f"{kept.dtype} {list(kept.shape)}; the checkpoint was changed since"
            )
        return replace(info)

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read bytes of a tensor as it was; see TensorReader.

        Raises:
            MismatchError: the merged bytes are not those that the merge wrote, or don't come back to the bit.
        """
        kept = self.record.tensors.get(name)
        if kept is None:
            self.merged.fill(name, view, start)
            return
        end, done = start + len(view), 0
        for stretch in kept.stretches:
            low, high = max(start, stretch.start), min(end, stretch.start + stretch.size)
            if low < high:
                old = self.before(name, stretch)
                view[low - start : high - start] = old[low - stretch.start : high - stretch.start]
                done += high - low
        if done != len(view):
            raise FormatError(f"{_at(self.record)}: {show(name)}: some bytes of it are not in the record")

    def check(self, name: str, stretch: Stretch) -> memoryview:
        """The merged bytes of a stretch.

        Raises:
            MismatchError: they are not those that the merge wrote.
        """
        raw = memoryview(bytearray(stretch.size))
        self.merged.fill(name, raw, stretch.start)
        if hashlib.sha256(raw).hexdigest() != stretch.after:
            raise MismatchError(
                f"{show(str(self.path))}: {show(name)} is not what the merge of {self.record.names} wrote, so it can't "
                "be undone to the bit; it was changed since, by hand or by another program"
            )
        return raw

    def before(self, name: str, stretch: Stretch) -> memoryview:
        """The bytes of a stretch as they were.

        Raises:
            MismatchError: they don't come back to the bit.
        """
        from lorasurgery.ops.merging.undo.recorder import unpack_difference

        packed = self.record.data(stretch)
        dtype = torch_dtype(self.record.tensors[name].dtype)
        try:
            if stretch.how == "steps":
                old = self._restored(name, stretch, packed, dtype)
            else:
                new = self.check(name, stretch) if stretch.how == "difference" else None
                old = memoryview(unpack_difference(packed, new, dtype.itemsize, stretch.size))
        except FormatError as problem:
            raise FormatError(f"{_at(self.record)}: {show(name)}: {problem}") from None
        if hashlib.sha256(old).hexdigest() != stretch.before:
            raise MismatchError(
                f"{show(str(self.path))}: {show(name)} does not come back to the bit with this adapter and record; "
                "nothing of it was written"
            )
        return old

    def _restored(self, name: str, stretch: Stretch, packed: bytes, dtype: torch.dtype) -> memoryview:
        import torch

        from lorasurgery.engine.threads import own_stream
        from lorasurgery.ops.merging.undo.recorder import unpack_corrections

        edit, device = self._edits[name], self._device
        columns = prod(edit.shape[2:] if _is_stacked(edit) else edit.shape[1:])
        first = stretch.start // (columns * dtype.itemsize)
        height = edit.shape[1] if _is_stacked(edit) else edit.shape[0] if edit.shape else 1
        raw = self.check(name, stretch)
        merged = torch.frombuffer(raw, dtype=dtype).view(-1, columns)
        kept = unpack_corrections(packed, dtype.itemsize, merged.numel())

        def restored(device: torch.device) -> torch.Tensor:
            undoing = self._of(edit, first // height if _is_stacked(edit) else 0, dtype, device)
            with torch.inference_mode(), own_stream(device):
                here = merged.to(device)
                out = torch.empty_like(here)
                undoing.restore(here, kept, out, first % height)
                return out.cpu()

        ways = [partial(restored, device) for device in (device, torch.device("cpu"))]
        old, _ = self._fallback.first(name, ways)
        return old.reshape(-1).view(torch.uint8).numpy().data

    @property
    def _device(self) -> torch.device:
        import torch

        assert self.device is not None
        return torch.device("cpu") if self.device.type == "mps" else self.device  # which has no float64

    def _of(self, edit: Edit, expert: int, dtype: torch.dtype, device: torch.device) -> Undoing:
        from lorasurgery.ops.merging.undo.recorder import undoing_of

        with self._turn:
            key = edit.tensor, expert, device.type
            if key not in self._held:
                self._held[key] = undoing_of(edit, expert, dtype, device)
                if len(self._held) > _HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


def _is_stacked(edit: Edit) -> bool:
    return any(c.stacked for c in edit.contributions)


def _at(record: UndoRecord) -> str:
    return show(str(record.path))
