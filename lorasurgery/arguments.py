"""What kind of thing each argument of a public function is, so that a wrong one ends in a line that names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from lorasurgery.errors import UsageError


class Kind(NamedTuple):
    """What an argument may be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _several(one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """One such thing, or a list or tuple or the like of them; what can be gone through only once is not meant."""

    def holds(value: Any) -> bool:
        many = isinstance(value, Iterable) and hasattr(value, "__len__") and not isinstance(value, (bytes, Mapping))
        return one(value) or (many and not isinstance(value, str) and all(map(one, value)))

    return holds


PATH = Kind("a path", _is_path)
PATHS = Kind("a path, or a list of paths", _several(_is_path))
NUMBER = Kind("a number", _is_number)
NUMBERS = Kind("a number, or a list of numbers", _several(_is_number))
WHOLE = Kind("a whole number", _is_whole)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a string", _is_text)
TEXTS = Kind("a string, or a list of strings", _several(_is_text))
SIZE = Kind("bytes as a whole number, or a size such as '5GB'", lambda value: _is_whole(value) or _is_text(value))
DTYPE = Kind("the name of a dtype such as 'bfloat16', or a torch.dtype",
             lambda value: _is_text(value) or type(value).__name__ == "dtype")  # fmt: skip
CALLABLE = Kind("a function of (name, done, total)", callable)

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("a", "adapter", "against", "base", "checkpoint", "merged", "model", "out", "path", "tuned",
                     "undo_file"), PATH),
    **dict.fromkeys(("adapters", "from_"), PATHS),
    **dict.fromkeys(("alpha", "density", "energy", "sv_cumulative", "sv_ratio", "tolerance"), NUMBER),
    **dict.fromkeys(("max_lora_rank", "max_rank", "rank", "seed"), WHOLE),
    **dict.fromkeys(("add", "allow_loss", "allow_nonfinite", "average_replaced", "common", "create_pr", "dry_run",
                     "in_place", "keep_rounding", "normalize", "overwrite", "overwrite_card", "portable", "private",
                     "resume", "rslora", "spectrum", "undo", "uniform_rank"), FLAG),
    **dict.fromkeys(("base_model", "client", "command", "device", "message", "method", "revision", "rounding",
                     "server", "svd"), TEXT),
    **dict.fromkeys(("block_weights", "exclude", "full", "target"), TEXTS),
    **dict.fromkeys(("max_shard_size", "memory_limit"), SIZE),
    "b": PATH, "dtype": DTYPE, "progress": CALLABLE, "to": TEXT, "weights": NUMBERS,
}  # fmt: skip


def check_kinds(given: Mapping[str, Any], *required: str, **kinds: Kind) -> None:
    """Refuse arguments of a wrong type; None passes for "not given".

    >>> check_kinds({"rank": "x"})
    Traceback (most recent call last):
        ...
    lorasurgery.errors.UsageError: rank: expected a whole number, got 'x'

    Args:
        given: Name -> value; a name without a kind is not looked at.
        required: Those that must not be None.
        kinds: Of names that mean something else here than in KINDS.

    Raises:
        UsageError: names the argument, what is expected and what was given.
    """
    for name, value in given.items():
        kind = kinds.get(name) or KINDS.get(name)
        if kind is None or (value is None and name not in required) or kind.holds(value):
            continue
        raise UsageError(f"{name}: expected {kind.words}, got {shown(value)}")


def check_class(name: str, value: Any, kind: type) -> None:
    """The same where one class is meant, such as an options object; None passes.

    Raises:
        UsageError: it is something else.
    """
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise UsageError(f"{name}: expected {article} {kind.__name__}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One thing or several as a tuple; a string or a path is one, and None is none.

    >>> as_tuple("style"), as_tuple(["style", "topic"]), as_tuple(None)
    (('style',), ('style', 'topic'), ())
    """
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike)) else (value,)
