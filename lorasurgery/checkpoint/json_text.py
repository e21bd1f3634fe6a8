"""JSON that nobody vouches for: bounded in size, in depth and in time.

A text is parsed only when it holds no more values than any real one, for a value of three bytes takes a hundred when it
is parsed. So the bounds on the text (regular.py reads no larger file) bound the memory, about a gigabyte for the
largest, and the time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from math import isfinite
from typing import Any, NoReturn

from lorasurgery.errors import FormatError

MOST = 100_000_000  # bytes: an index or a result's record of a million tensors; a tokenizer, which has 40 MB at most
MOST_CONFIG = 32_000_000  # a model's or an adapter's config: the modules of the largest models, several times
MOST_VALUES = 10_000_000  # in one text: a header of the largest size has seven million
DEEPEST = 64  # what is parsed is written, compared and shown by functions that call themselves
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half a character
_SECOND = "\n  "
_BEFORE_VALUES = (b",", b"[", b"{")


def parse(
    raw: bytes, where: str, *, strict: bool = False, made: Callable[[dict[str, Any]], Any] = lambda found: found
) -> Any:
    """What a JSON text holds, in UTF-8 with or without a byte order mark.

    >>> parse(b'[1, "a"]', "journal")
    [1, 'a']

    Args:
        where: What the text is, for messages.
        strict: Refuse names that stand twice in an object, and NaN and Infinity, which are no JSON: for what says where
            bytes lie. Configs are read as Python's own readers do, which take the last and know these words.
        made: What takes the place of each object of a strict text, innermost first: there may be 10⁶ of them.

    Raises:
        FormatError: no JSON, nested too deeply for a parser, of too many values, or half a character in it.
    """
    if sum(map(raw.count, _BEFORE_VALUES)) > MOST_VALUES:
        raise FormatError(f"{where}: holds more than {MOST_VALUES:,} values, more than any real one")
    try:
        options: dict[str, Any] = {}
        if strict:
            options = {"object_pairs_hook": lambda items: made(_once(items)), "parse_constant": _constant}
        found = json.loads(raw.decode("utf-8-sig"), **options)
        if _HALF.search(raw):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as problem:
        raise FormatError(f"{where}: not JSON: not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half of a character, which is not valid Unicode text") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply") from None
    except _TwiceError as problem:
        raise FormatError(f"{where}: {problem} stands twice") from None
    except ValueError as problem:
        # Python's own words about such a number are advice to programmers
        why = "a number of thousands of digits" if "digits" in str(problem) else problem
        raise FormatError(f"{where}: not JSON ({why})") from None
    return found


def parse_object(raw: bytes, where: str, *, strict: bool = False) -> dict[str, Any]:
    """The object that a JSON text holds, no deeper than anything reasonable needs.

    >>> parse_object(b'{"r": 8}', "adapter_config.json")
    {'r': 8}

    Raises:
        FormatError: something else than an object, nested too deeply, and as parse does.
    """
    found = parse(raw, where, strict=strict)
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(found).__name__}")
    if not is_shallow(found):
        raise FormatError(f"{where}: is nested too deeply")
    return found


def is_shallow(value: Any) -> bool:
    """Whether lists and objects lie in one another no deeper than anything reasonable needs.

    >>> is_shallow([[[]]]), is_shallow(eval("[" * 70 + "]" * 70))
    (True, False)
    """
    level = [value]
    for _ in range(DEEPEST):
        inner = (v for item in level for v in (item.values() if isinstance(item, dict) else item))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return True
    return False


def pretty(value: Any, at: str = "\n", step: str = " ") -> str:
    """What json.dumps writes with an indent and `ensure_ascii=False`, where a record may have 10⁶ values.

    With an indent json itself goes through generators, which take ten times as long.

    >>> pretty({"a": [1, None], "b": {}}) == json.dumps({"a": [1, None], "b": {}}, indent=1)
    True

    Args:
        value: Plain data with text or whole numbers as keys, or what has `to_dict()`.
        at: What a line of the value's own level begins with.
        step: How much further in the next level is.

    Raises:
        ValueError: a number that is not finite.
    """
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, float):
        return float.__repr__(value) if isfinite(value) else _constant(str(value))
    if isinstance(value, (list, tuple)):
        inner = at + step
        return f"[{inner}{f',{inner}'.join([pretty(v, inner, step) for v in value])}{at}]" if value else "[]"
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        inner = at + step
        lines = [f"{encode_basestring(str(key))}: {pretty(v, inner, step)}" for key, v in value.items()]
        return f"{{{inner}{f',{inner}'.join(lines)}{at}}}" if value else "{}"
    return json.dumps(value)


def pretty_pieces(table: dict[str, Any]) -> Iterator[str]:
    """The same of an object, an item of its lists at a time: together they may take more memory than there is.

    >>> "".join(pretty_pieces({"a": [1, 2], "b": 3})) == pretty({"a": [1, 2], "b": 3})
    True
    """
    yield "{"
    for number, (key, value) in enumerate(table.items()):
        yield f"{',' if number else ''}\n {encode_basestring(key)}: "
        if isinstance(value, list) and value:
            for place, item in enumerate(value):
                yield f"{',' if place else '['}\n  {pretty(item, _SECOND)}"
            yield "\n ]"
        else:
            yield pretty(value, "\n ")
    yield "\n}"


class _TwiceError(Exception):
    """A name that stands twice in an object."""


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        raise _TwiceError(next(n for n, _ in items if n in seen or seen.add(n)))  # type: ignore[func-returns-value]
    return found


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
