"""While a merge writes, what its undoing will need is found and kept, stretch by stretch."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.files import ScratchFile
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.checkpoint.writer import as_bytes
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.engine.threads import own_stream
from lorasurgery.errors import FormatError
from lorasurgery.linalg.undo import BITS, Corrections, Undoing
from lorasurgery.ops.merging.arithmetic import placed
from lorasurgery.ops.merging.undo.record import Kept, Stretch
from lorasurgery.ops.placement.edits import Contribution, Edit

_PIECE = 8 << 20


class Recorder:
    """Keeps what was there; several threads may.

    Args:
        scratch: Where the packed stretches go.
        base: What the weights were.
        device: Where corrections are found; one without float64 leaves it to the CPU, as does one that is full.
    """

    def __init__(self, scratch: ScratchFile, base: TensorReader, device: torch.device, fallback: Fallback) -> None:
        self.scratch, self.base, self.fallback, cpu = scratch, base, fallback, torch.device("cpu")
        self.devices = (cpu if device.type == "mps" else device, cpu)
        self._undoing: dict[str, dict[tuple[int, str], Undoing]] = {}  # tensor -> expert and device
        self._lock = threading.Lock()

    def rows(
        self, edit: Edit, tensor: PlannedTensor, expert: int, first: int, start: int, old: Tensor, new: Tensor
    ) -> list[Any]:
        """Keep some rows that were merged.

        Args:
            first: The row of the matrix (of the expert) they begin with.
            start: Their first byte in the tensor.
            old: (b, n), on the CPU.
            new: (b, n), on the CPU.
        """
        before, after = as_bytes(old), as_bytes(new)
        steps = is_undone_by_steps(edit, old.dtype)
        if steps:
            ways = [partial(self._corrections, device, edit, expert, first, old, new) for device in self.devices]
            found, _ = self.fallback.first(tensor.name, ways)
            packed = pack_corrections(found, old.dtype.itemsize)
        else:
            packed = pack_difference(before, after, old.dtype.itemsize)
        return [self._stretch(start, before, after, packed, "steps" if steps else "difference")]

    def whole(self, edit: Edit, tensor: PlannedTensor, new: Tensor) -> list[Any]:
        """Keep a tensor that was computed as a whole, piece by piece."""
        kind, raw = kind_of(tensor, self.base), as_bytes(new)
        if kind == "added":
            return []
        same, size = kind == "changed", torch_dtype(self.base.tensors[tensor.name].dtype).itemsize
        found: list[Any] = []
        for start, piece in _chunks(self.base, tensor.name):
            after = raw[start : start + len(piece)] if same else None
            packed = pack_difference(piece, after, size)
            found.append(self._stretch(start, piece, after, packed, "difference" if same else "whole"))
        if not same:
            found.append(hashlib.sha256(raw).hexdigest())
        return found

    def forget(self, tensor: str) -> None:
        """Let go of a tensor's factors."""
        with self._lock:
            self._undoing.pop(tensor, None)

    def _corrections(
        self, device: torch.device, edit: Edit, expert: int, first: int, old: Tensor, new: Tensor
    ) -> Corrections:
        with own_stream(device):
            undoing = self._of(edit, expert, old.dtype, device)
            return undoing.corrections(old.to(device), new.to(device), first)

    def _of(self, edit: Edit, expert: int, dtype: torch.dtype, device: torch.device) -> Undoing:
        with self._lock:
            of_tensor, key = self._undoing.setdefault(edit.tensor, {}), (expert, device.type)
            if key not in of_tensor:
                of_tensor[key] = undoing_of(edit, expert, dtype, device)
            return of_tensor[key]

    def _stretch(self, start: int, before: memoryview, after: memoryview | None, packed: bytes, how: str) -> list[Any]:
        old, new = (hashlib.sha256(b).hexdigest() if b is not None else "" for b in (before, after))
        return Stretch(start, len(before), self.scratch.put(packed), len(packed), old, new, how).listed()


def undoing_of(edit: Edit, expert: int, dtype: torch.dtype, device: torch.device) -> Undoing:
    """The updates of one matrix, ready to be taken out of its rows."""
    stacked = any(c.stacked for c in edit.contributions)
    height = edit.shape[1 if stacked else 0] if edit.shape else 1
    updates = [c.load(expert) if stacked else placed(c, height) for c in edit.contributions]
    found = Undoing([u.to(device) for u in updates], dtype)
    if device.type == "cuda":  # others use them on streams of their own
        torch.cuda.current_stream(device).synchronize()
    return found


def kind_of(tensor: PlannedTensor, base: TensorReader) -> str:
    """What became of a touched tensor; see Kept."""
    info = base.tensors.get(tensor.name)
    if info is None:
        return "added"
    return "changed" if (info.dtype, info.shape) == (tensor.dtype, tensor.shape) else "resized"


def is_undone_by_steps(edit: Edit, dtype: torch.dtype) -> bool:
    """Whether a tensor comes back from its merged values and the update, but for a few corrections."""
    plain = edit.contributions and not (edit.replacement or edit.rows) and all(map(_is_stored, edit.contributions))
    alike = len({c.stacked for c in edit.contributions}) == 1
    return bool(plain) and alike and is_kept_as_steps(dtype)


def _is_stored(c: Contribution) -> bool:
    """Whether the update is what the file holds: what is computed from it first may differ from machine to machine."""
    return not c.decomposes and (c.delta is None or c.delta.stores_factors)


def kept(tensor: PlannedTensor, base: TensorReader, listed: list[Any]) -> Kept:
    """The record of one tensor from what was kept of it."""
    info = base.tensors.get(tensor.name)
    shape, dtype = (info.shape, info.dtype) if info is not None else (tensor.shape, tensor.dtype)
    stretches = sorted((Stretch(*s) for s in listed if isinstance(s, list)), key=lambda s: s.start)
    after = next((s for s in listed if isinstance(s, str)), "")
    return Kept(kind_of(tensor, base), dtype, shape, tuple(stretches), after)


def _chunks(base: TensorReader, name: str) -> Iterator[tuple[int, memoryview]]:
    start = 0
    for piece in base.chunks(name, _PIECE):
        yield start, piece
        start += len(piece)


_HEAD = struct.Struct("<QQB")
_own = threading.local()
_LEVEL, _QUICK = 9, 3  # corrections are few; differences are as large as the weights


def pack_corrections(found: Corrections, itemsize: int) -> bytes:
    """Corrections as bytes.

    >>> none = torch.zeros(0, dtype=torch.int64)
    >>> some = Corrections(torch.tensor([2, 9]), torch.tensor([1, -1]), none, none)
    >>> unpack_corrections(pack_corrections(some, 2), 2, 10).steps.tolist()
    [1, -1]
    """
    steps = found.steps.numpy()
    size = 8 * steps.dtype.itemsize
    turned = ((steps << 1) ^ (steps >> (size - 1))).view(f"<u{size // 8}")  # small ones of either sign become small
    wide = next(w for w in (1, 2, 4, 8) if not len(turned) or int(turned.max()) < 1 << (8 * w))
    parts = [_planes(_gaps(found.places), 4), _planes(turned, wide), _planes(_gaps(found.doubtful), 4),
             _planes(found.bits.numpy(), itemsize)]  # fmt: skip
    head = _HEAD.pack(len(steps), len(found.bits), wide)
    return _compressed(head + b"".join(parts), _LEVEL)


def unpack_corrections(data: bytes, itemsize: int, size: int) -> Corrections:
    """Corrections from bytes.

    Args:
        size: Values in the stretch: no place lies behind them.

    Raises:
        FormatError: these are not corrections of such a stretch.
    """
    raw = _opened(data, 64 + size * (12 + 2 * itemsize))
    try:
        n, k, wide = _HEAD.unpack_from(raw)
        if (
            n > size
            or k > size
            or wide not in (1, 2, 4, 8)
            or len(raw) != _HEAD.size + n * (4 + wide) + k * (4 + itemsize)
        ):
            raise ValueError
    except (struct.error, ValueError):
        raise FormatError("the record is damaged") from None
    start, arrays = _HEAD.size, []
    for count, width in ((n, 4), (n, wide), (k, 4), (k, itemsize)):
        arrays.append(_numbers(raw[start : start + count * width], count, width))
        start += count * width
    turned = arrays[1]
    signed = turned.dtype.str.replace("u", "i")
    steps = (turned >> 1).view(signed) ^ -(turned & 1).view(signed)
    places, doubtful = _places(arrays[0], size), _places(arrays[2], size)
    bits = arrays[3].astype(f"<u{itemsize}").view(f"<i{itemsize}")
    return Corrections(places, torch.from_numpy(steps), doubtful, torch.from_numpy(bits))


def pack_difference(old: memoryview, new: memoryview | None, itemsize: int) -> bytes:
    """The old bytes, or what turns the new ones of the same length into them, plane by plane.

    >>> unpack_difference(pack_difference(memoryview(b"abcd"), memoryview(b"abzz"), 2), memoryview(b"abzz"), 2, 4)
    b'abcd'
    """
    values = np.frombuffer(old, np.uint8)
    if new is not None:
        values = values ^ np.frombuffer(new, np.uint8)
    planes = np.ascontiguousarray(values.reshape(-1, itemsize).T)
    return _compressed(planes.data if planes.size else b"", _QUICK)


def unpack_difference(data: bytes, new: memoryview | None, itemsize: int, size: int) -> bytes:
    """The old bytes again.

    Raises:
        FormatError: these are no such bytes.
    """
    raw = _opened(data, size)
    if len(raw) != size or size % itemsize:
        raise FormatError("the record is damaged")
    values = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(itemsize, -1).T).reshape(-1)
    if new is not None:
        values = values ^ np.frombuffer(new, np.uint8)
    return values.tobytes()


def is_kept_as_steps(dtype: torch.dtype) -> bool:
    """Whether a dtype's weights can be undone by corrections; float64 has no wider type to find them in."""
    return dtype.is_floating_point and dtype.itemsize in BITS


def _compressed(data: bytes | memoryview, level: int) -> bytes:
    """Compress with this thread's own compressor: a new one costs more than a small tensor's work."""
    held: dict[int, zstandard.ZstdCompressor] = _own.__dict__.setdefault("held", {})
    if level not in held:
        held[level] = zstandard.ZstdCompressor(level)
    return bytes(held[level].compress(data))


def _opened(data: bytes, most: int) -> bytes:
    try:
        if zstandard.frame_content_size(data) > most:  # what claims to be larger is not unpacked
            raise FormatError("the record is damaged")
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=most))
    except zstandard.ZstdError:
        raise FormatError("the record is damaged") from None


def _gaps(places: Tensor) -> Any:
    return np.diff(places.numpy(), prepend=np.int32(0))


def _places(gaps: Any, size: int) -> Tensor:
    if int(gaps.sum(dtype=np.uint64)) >= max(1, min(size, 1 << 31)):
        raise FormatError("the record is damaged")
    return torch.from_numpy(np.cumsum(gaps, dtype=np.int32))


def _planes(numbers: Any, width: int) -> bytes:
    """The lowest `width` bytes of numbers, all first bytes, then all second ones."""
    size = numbers.dtype.itemsize
    return bytes(np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, size)[:, :width].T).tobytes())


def _numbers(raw: bytes, count: int, width: int) -> Any:
    size = 4 if width <= 4 else 8
    wide = np.zeros((count, size), np.uint8)
    wide[:, :width] = np.frombuffer(raw, np.uint8).reshape(width, count).T
    return wide.reshape(-1).view(f"<u{size}")
