"""What an undo record says, held against what this program writes: a record may come with a downloaded checkpoint."""

from __future__ import annotations

import math
from math import prod
from typing import Any

from lorasurgery.checkpoint.header import DTYPE_BITS
from lorasurgery.checkpoint.inside import is_inside
from lorasurgery.checkpoint.json_text import parse_object
from lorasurgery.errors import FormatError

_LARGEST = 1 << 30  # bytes of one stretch; those that are written have some megabytes
_KINDS = {"changed", "resized", "added"}
_HOWS = {"steps", "difference", "whole"}


def parsed(raw: bytes, version: int, room: int) -> dict[str, Any]:
    """`about` of a record, when all in it is of the right kind and in its bounds.

    Args:
        version: Of the format. room: Bytes of the record's data.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    try:
        about = parse_object(raw, "about", strict=True)
    except FormatError as problem:
        raise ValueError from problem
    if about["format"] != version:
        return about  # which the caller says by its number
    if not about["adapters"]:
        raise ValueError
    for adapter in about["adapters"]:
        _all_text(adapter["name"], adapter["sha256"], adapter.get("hub", ""))
        if type(adapter["weight"]) not in (int, float) or not math.isfinite(adapter["weight"]):
            raise ValueError
    _all_text(*about["block_weights"])
    for name, data in about["files"].items():
        _check_file(name, data)
    for kept in about["tensors"].values():
        _check_tensor(kept, room)
    return about


def _check_file(name: str, data: Any) -> None:
    """A file that undoing writes: below the checkpoint's folder, none of its weights and nothing hidden."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    if not is_inside(name) or hidden or name.lower().endswith(".safetensors"):
        raise ValueError
    if data is not None:
        _all_text(data)


def _check_tensor(kept: dict[str, Any], room: int) -> None:
    """The stretches follow one another from a tensor's first byte to its last."""
    _all_text(kept["after"])
    if kept["kind"] not in _KINDS or not _all_counts(*kept["shape"]):
        raise ValueError
    size = prod(kept["shape"]) * DTYPE_BITS[kept["dtype"]] // 8
    end = 0
    for start, length, place, packed, before, after, how in kept["stretches"]:
        _all_text(before, after)
        if not _all_counts(start, length, place, packed) or how not in _HOWS or start != end or length > _LARGEST:
            raise ValueError
        if place + packed > room:
            raise ValueError
        end += length
    if end != size and not (kept["kind"] == "added" and end == 0):
        raise ValueError


def _all_text(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError
        value.encode()  # half a character could not be shown


def _all_counts(*values: Any) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 62 for v in values)
