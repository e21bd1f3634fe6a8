"""Values from configs, each held against the kind that it must have; and names that mean the end of a path."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from lorasurgery.errors import FormatError


def number(value: Any, what: str) -> float:
    """A finite number.

    Raises:
        FormatError: something else, a boolean or a number in quotes included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise FormatError(f"{what} is {value!r}; expected a finite number")
    return value


def rank(value: Any, what: str) -> int:
    """A whole number of at least 1.

    Raises:
        FormatError: something else.
    """
    found = number(value, what)
    if found != int(found) or found < 1:
        raise FormatError(f"{what} is {value!r}; expected a whole number of at least 1")
    return int(found)


def flag(value: Any, what: str) -> bool:
    """True or false; null is false. A word in quotes would count as true, whatever it says.

    Raises:
        FormatError: something else.
    """
    if value not in (None, True, False):
        raise FormatError(f"{what} is {value!r}; expected true or false")
    return bool(value)


def strings(value: Any, what: str) -> tuple[str, ...]:
    """A list of names; null is none.

    Raises:
        FormatError: something else.
    """
    value = value or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{what} is {value!r}; expected a list of module names")
    return tuple(value)


def check_selection(raw: dict[str, Any], where: str) -> None:
    """The fields that say which modules PEFT adapts: a regular expression or names; numbers of layers.

    Raises:
        FormatError: something else.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if not isinstance(raw.get(key), str):
            strings(raw.get(key), f"{where}: {key}")
    layers = raw.get("layers_to_transform")
    if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
        raise FormatError(f"{where}: layers_to_transform is {layers!r}; expected numbers of layers")


def endings(path: str, deepest: int) -> Iterator[str]:
    """The path, and what of it follows a dot, with at most so many dots; the shortest first.

    >>> list(endings("l.0.mlp", 1)), list(endings("l.0.mlp", 9))
    (['mlp', '0.mlp'], ['mlp', '0.mlp', 'l.0.mlp'])
    """
    parts = path.rsplit(".", deepest + 1)
    for n in range(1, min(len(parts), deepest + 1) + 1):
        yield ".".join(parts[-n:])


def deepest(names: Collection[str]) -> int:
    """The most dots in any of some names."""
    return max((name.count(".") for name in names), default=0)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
