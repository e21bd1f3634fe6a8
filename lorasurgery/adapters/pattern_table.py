"""PEFT's rank_pattern and alpha_pattern: which of many patterns is the first to mean a module path.

PEFT matches `(.*\\.)?(KEY)$` with every key in turn. Most keys are plain paths, one for each module of a large model;
those are looked up, and only real regular expressions are matched one by one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lorasurgery.adapters.path_regex import Budget, PathRegex, PathText, PatternError
from lorasurgery.errors import FormatError, UnsupportedError

_MOST = 10_000  # regular expressions in one config
_PLAIN = re.compile(r"\^?(?:[\w/ -]|\\?\.|\\-)+\$?")
_PLAIN_PARTS = re.compile(r"\\?(.)")


class PatternTable:
    """Patterns with a value each, in their order.

    >>> table = PatternTable({r"layers\\.1\\..*": 4, "q_proj": 2}, "adapter_config.json: rank_pattern")
    >>> table.first("m.layers.1.q_proj", 8), table.first("m.layers.2.q_proj", 8), table.first("m.k_proj", 8)
    (4, 2, 8)

    Args:
        where: File and name of the field, for messages.

    Raises:
        FormatError: a key that is no regular expression. UnsupportedError: one that can't be matched in bounded time.
    """

    def __init__(self, patterns: Mapping[str, Any], where: str) -> None:
        self.where, self._values = where, list(patterns.values())
        self._budget = Budget()
        self._regexes: list[tuple[int, PathRegex]] = []
        # length of the key -> places of its dots, which mean any character -> the rest of it -> its number
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(dict)
        self._anchored: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(dict)
        for number, key in enumerate(patterns):
            if _PLAIN.fullmatch(key):
                self._add_plain(key, number)
            else:
                self._add_regex(key, number)

    def first(self, path: str, default: Any) -> Any:
        """The value of the first pattern that means the path, or a part of it behind a dot.

        Raises:
            UnsupportedError: it would take too long to tell.
        """
        if not self._values:
            return default
        try:
            best = min(self._looked_up(path), default=len(self._values))
            text = PathText(path, self._budget)
            for number, regex in self._regexes:
                if number > best:
                    break
                if regex.fullmatch(text):
                    best = number
        except PatternError as problem:
            raise UnsupportedError(f"{self.where} {problem}") from None
        return self._values[best] if best < len(self._values) else default

    def _add_regex(self, key: str, number: int) -> None:
        if len(self._regexes) == _MOST:
            raise UnsupportedError(f"{self.where} has more than {_MOST:,} regular expressions")
        try:
            self._budget.take(len(key))
            self._regexes.append((number, PathRegex(rf"(.*\.)?({key})$")))
        except PatternError as problem:
            raise FormatError(f"{self.where} key {key!r} {problem}") from None

    def _add_plain(self, key: str, number: int) -> None:
        table = self._anchored if key.startswith("^") else self._plain
        parts = list(_PLAIN_PARTS.finditer(key.removeprefix("^").removesuffix("$")))
        dots = tuple(i for i, part in enumerate(parts) if part[0] == ".")
        text = "".join(part[1] for part in parts)
        table[len(text)].setdefault(dots, {}).setdefault(_without(text, dots), number)

    def _looked_up(self, path: str) -> list[int]:
        """The numbers of the plain keys that mean a path."""
        starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
        tables = [(self._plain, start) for start in starts] + [(self._anchored, 0)]
        found = []
        for table, start in tables:
            shapes = table.get(len(path) - start, {})
            self._budget.take(1 + len(shapes))
            rest = ((_without(path[start:], dots), keys) for dots, keys in shapes.items())
            found += [keys[text] for text, keys in rest if text in keys]
        return found


def _without(text: str, places: tuple[int, ...]) -> str:
    """A text without the characters at some places.

    >>> _without("a.b.c", (1, 3))
    'abc'
    """
    edges = [-1, *places, len(text)]
    return "".join(text[edges[i] + 1 : edges[i + 1]] for i in range(len(edges) - 1))
