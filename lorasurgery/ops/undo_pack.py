"""What undoing needs of a stretch of a tensor, in few bytes: gaps, steps and differences by planes, then zstandard."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from lorasurgery.errors import FormatError
from lorasurgery.linalg.undo import BITS, Corrections

_HEAD = struct.Struct("<QQB")
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
    return bytes(zstandard.ZstdCompressor(_LEVEL).compress(head + b"".join(parts)))


def unpack_corrections(data: bytes, itemsize: int, size: int) -> Corrections:
    """Corrections from bytes.

    Args:
        size: Values in the stretch: no place lies behind them.

    Raises:
        FormatError: these are no corrections of such a stretch.
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
    return bytes(zstandard.ZstdCompressor(_QUICK).compress(planes.data if planes.size else b""))


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
