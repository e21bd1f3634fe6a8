"""JSON that nobody vouches for: bounded in size, in depth and in time.

A text is parsed only when it holds no more values than any real one, for a value of three bytes takes a hundred when it
is parsed. So the bounds on the text (regular.py reads no larger file) bound the memory, about a gigabyte for the
largest, and the time.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from lorasurgery.errors import FormatError

MOST = 100_000_000  # bytes: an index or a result's record of a million tensors; a tokenizer, which has 40 MB at most
MOST_CONFIG = 32_000_000  # a model's or an adapter's config: the modules of the largest models, several times
MOST_VALUES = 10_000_000  # in one text: a header of the largest size has seven million
DEEPEST = 64  # what is parsed is written, compared and shown by functions that call themselves
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half a character
_BEFORE_VALUES = (b",", b"[", b"{")


def parse(raw: bytes, where: str, *, strict: bool = False) -> Any:
    """What a JSON text holds, in UTF-8 with or without a byte order mark.

    >>> parse(b'[1, "a"]', "journal")
    [1, 'a']

    Args:
        where: What the text is, for messages.
        strict: Refuse names that stand twice in an object, and NaN and Infinity, which are no JSON: for what says where
            bytes lie. Configs are read as Python's own readers do, which take the last and know these words.

    Raises:
        FormatError: no JSON, nested too deeply for a parser, of too many values, or half a character in it.
    """
    if sum(map(raw.count, _BEFORE_VALUES)) > MOST_VALUES:
        raise FormatError(f"{where}: holds more than {MOST_VALUES:,} values, more than any real one")
    try:
        options: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _constant} if strict else {}
        found = json.loads(raw.decode("utf-8-sig"), **options)
        if _HALF.search(raw):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as problem:
        raise FormatError(f"{where}: not JSON: not UTF-8 ({problem.reason} at byte {problem.start})") from None
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half of a character, which is no valid Unicode text") from None
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


class _TwiceError(Exception):
    """A name that stands twice in an object."""


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        raise _TwiceError(next(n for n, _ in items if n in seen or seen.add(n)))  # type: ignore[func-returns-value]
    return found


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
