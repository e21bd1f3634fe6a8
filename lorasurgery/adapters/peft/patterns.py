"""PEFT's patterns: which modules target_modules means, and which rank_pattern or alpha_pattern means a module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lorasurgery.adapters.config_values import deepest, endings
from lorasurgery.adapters.path_regex import Budget, PathRegex, PathText, PatternError
from lorasurgery.errors import FormatError, UnsupportedError

_NUMBER = re.compile(r"\.(\d{1,6})\.")


class Selection:
    """target_modules, exclude_modules and layers_to_transform of one config.

    >>> Selection({"target_modules": ["q_proj"]}).means("l.0.q_proj")
    True
    >>> Selection({"target_modules": ".*v"}).means("l.0.q_proj")
    False

    Args:
        config: adapter_config.json.
        where: The adapter, for messages.

    Raises:
        FormatError: an expression that is not valid, or one that can't be matched in bounded time.
    """

    def __init__(self, config: dict[str, Any], where: str = "adapter_config.json") -> None:
        self.where, self._budget = where, Budget()
        targets = config.get("target_modules")
        self._all = targets is None or targets in ("all-linear", ["all-linear"])  # by the model's family, or all
        self._targets = self._names("target_modules", targets)
        self._excluded = self._names("exclude_modules", config.get("exclude_modules"))
        layers = config.get("layers_to_transform")
        self._layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        patterns = config.get("layers_pattern") or r"[^\.]*"
        self._patterns = [
            self._regex("layers_pattern", p) for p in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    def means(self, path: str) -> bool:
        """Whether PEFT gives this module factors."""
        if self._all:
            return True
        try:
            if self._is_named(self._excluded, path) or not self._is_named(self._targets, path):
                return False
            if self._layers is None or isinstance(self._targets, PathRegex) or path in self._targets:
                return True
            return self._layer(path) in self._layers
        except PatternError as problem:
            raise FormatError(f"{self.where}: its choice of modules {problem}") from None

    def _names(self, key: str, given: Any) -> PathRegex | frozenset[str]:
        return self._regex(key, given) if given and isinstance(given, str) else frozenset(given or ())

    def _regex(self, key: str, text: str) -> PathRegex:
        try:
            return PathRegex(text)
        except PatternError as problem:
            raise FormatError(f"{self.where}: {key} {text!r} {problem}") from None

    def _is_named(self, names: PathRegex | frozenset[str], path: str) -> bool:
        if isinstance(names, PathRegex):
            return names.fullmatch(PathText(path, self._budget))
        return any(end in names for end in endings(path, deepest(names)))

    def _layer(self, path: str) -> int | None:
        """The number that follows the first place where a layers_pattern matches."""
        text = PathText(path, self._budget)
        for pattern in self._patterns:
            for start in (i + 1 for i, c in enumerate(path) if c == "."):
                ends = pattern.ends(text, start)
                for end in range(len(path), start - 1, -1):
                    number = _NUMBER.match(path, end) if ends >> end & 1 else None
                    if number:
                        return int(number[1])
        return None


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
        FormatError: a key that is not a regular expression.
        UnsupportedError: one that can't be matched in bounded time.
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
