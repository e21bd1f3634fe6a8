"""What lorasurgery.json must hold to be believed: docs/schemas/record.schema.json, as far as anything here reads it."""

from __future__ import annotations

import math
from typing import Any

from lorasurgery.errors import FormatError

COLUMNS = ("rank", "alpha", "delta_norm", "error", "energy", "retention", "noise", "effective_rank")
"""Numbers of a module that a model card shows."""

_MODULE: dict[str, Any] = {"name": str, "shape": [int], **{f"{name}?": float for name in COLUMNS}}
_FILE = {"name": str, "bytes": int, "sha256?": str, "header_sha256?": str}
_SOURCE = {"name": str, "kind": str, "revision?": str, "base_model?": str, "license?": str, "files": [_FILE]}
_TOTALS = {"tensors_touched?": int, "retention?": float, "noise?": float, "error?": float, "energy?": float,
           "weights?": [float]}  # fmt: skip
RECORD: dict[str, Any] = {
    "command": str, "call": str, "version": str, "sources": [_SOURCE], "totals": _TOTALS, "modules": [_MODULE],
    "full": [{"name": str, "shape": [int]}], "left_out": [{"name": str, "shape": [int]}], "warnings": [str],
}  # fmt: skip
"""Field -> kind: a type, a list of one kind, or an object of fields; ? ends the name of one that may be missing."""

_WORDS = {str: "text", int: "a whole number of at least 0", float: "a finite number", list: "a list", dict: "an object"}


def check_record(found: Any, kind: Any = RECORD, where: str = "") -> None:
    """Hold a record against what this program writes.

    >>> check_record({"name": "a", "bytes": "8"}, {"name": str, "bytes": int})
    Traceback (most recent call last):
        ...
    lorasurgery.errors.FormatError: bytes is '8'; expected a whole number of at least 0

    Raises:
        FormatError: a field is missing or of another kind; names the field.
    """
    if isinstance(kind, dict):
        _expect(isinstance(found, dict), found, dict, where)
        for name, inner in kind.items():
            key = name.removesuffix("?")
            if key in found:
                check_record(found[key], inner, f"{where}.{key}" if where else key)
            elif key == name:
                raise FormatError(f"{where or 'it'} has no {key}")
    elif isinstance(kind, list):
        _expect(isinstance(found, list), found, list, where)
        for number, item in enumerate(found):
            check_record(item, kind[0], f"{where}[{number}]")
    else:
        _expect(_is(found, kind), found, kind, where)


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 62
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _expect(holds: bool, found: Any, kind: type, where: str) -> None:
    if not holds:
        raise FormatError(f"{where or 'it'} is {repr(found)[:80]}; expected {_WORDS[kind]}")
