"""What a model card says of itself: the few words in its YAML front matter that are asked for, and nothing built of it.

A card comes from a stranger, and in YAML 600 bytes of aliases can mean more than any memory holds. So the front matter
is read as the stream of its events; a card that uses aliases, or is nested for ever, counts as none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.json_text import DEEPEST
from lorasurgery.checkpoint.regular import read_bytes
from lorasurgery.errors import FormatError

CARD = "README.md"
MOST_CARD = 32 << 20  # bytes of a card that is published
MOST_FRONT = 2 << 20  # bytes of front matter: the longest on the Hub, full of results, have half a megabyte
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")  # the Hub's own identifiers
_NULL = ("", "~", "null", "Null", "NULL")


def license_of(folder: Path, warnings: list[str]) -> str | None:
    """The licence that a folder's model card names in its metadata, by the Hub's identifier.

    Args:
        warnings: Gets a line where there is a card whose metadata can't be read, which then counts as none.
    """
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        found = front_matter(card).get("license")
    except (OSError, FormatError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        line = f"{show(str(card))}: its metadata counts as none, so the licence is not known: {why}"
        warnings += [line] if line not in warnings else []
        return None
    return found if found and is_licence(found) else None


def is_licence(text: str) -> bool:
    """Whether a word can be an identifier of a licence.

    >>> is_licence("apache-2.0"), is_licence("mit\\nbase_model: x")
    (True, False)
    """
    return _LICENCE.fullmatch(text) is not None


def check_card(card: Path) -> None:
    """See that a card can be published: the Hub's client reads all of it.

    Raises:
        FormatError: larger than any card, or no UTF-8.
    """
    try:
        read_bytes(card, MOST_CARD).decode()
    except (FormatError, UnicodeDecodeError) as problem:
        why = problem if isinstance(problem, FormatError) else "is not UTF-8, as a model card must be"
        raise FormatError(f"{show(str(card))}: {why}; fix it, or move it out of the folder") from None


def front_matter(card: Path) -> dict[str, str]:
    """The plain words at the top of a card's metadata, key by key; what is a list or an object is left out.

    Raises:
        FormatError: no YAML, too long, nested too deeply, or with aliases; without the card's name.
        OSError: the system's.
    """
    with card.open("rb") as file:
        raw = file.read(MOST_FRONT)
    text = raw.decode("utf-8-sig", errors="replace").lstrip()
    begin = re.match(r"---[ \t]*\r?\n", text)
    if begin is None:
        return {}
    end = re.compile(r"^---[ \t]*\r?$", re.MULTILINE).search(text, begin.end())
    if end is not None:
        return _words(text[begin.end() : end.start()])
    if len(raw) < MOST_FRONT:
        return {}  # a line of dashes, and no front matter
    raise FormatError(f"it does not end within {MOST_FRONT:,} bytes")


def _words(text: str) -> dict[str, str]:
    """Keys and values of the outermost mapping of a YAML text, as far as both are single words."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        nodes = list(_outermost(yaml, text))
    except yaml.YAMLError as problem:
        raise FormatError(f"it is not YAML ({' '.join(str(problem).split())[:200]})") from None
    except (ValueError, OverflowError, RecursionError):  # escapes that are no character
        raise FormatError("it is not YAML") from None
    return {key: value for key, value in zip(nodes[::2], nodes[1::2], strict=False) if key and value}


def _outermost(yaml: Any, text: str) -> Iterator[str | None]:
    """The nodes directly in the outermost mapping, in turn a key and its value; None for what is not a single word."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise FormatError("it uses aliases, which can mean more than it says")
        if isinstance(event, yaml.DocumentEndEvent) or (depth == 0 and isinstance(event, yaml.SequenceStartEvent)):
            return
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            yield _word(event) if isinstance(event, yaml.ScalarEvent) else None
        depth += isinstance(event, yaml.CollectionStartEvent)
        if depth > DEEPEST:
            raise FormatError("it is nested too deeply")


def _word(scalar: Any) -> str | None:
    return None if scalar.implicit[0] and scalar.value in _NULL else str(scalar.value)
