"""Which modules PEFT's target_modules means (peft 0.21.2, tuners_utils.check_target_module_exists)."""

from __future__ import annotations

import re
from typing import Any

from lorasurgery.adapters.config_values import deepest, endings
from lorasurgery.adapters.path_regex import Budget, PathRegex, PathText, PatternError
from lorasurgery.errors import FormatError

_NUMBER = re.compile(r"\.(\d{1,6})\.")


class Selection:
    """target_modules, exclude_modules and layers_to_transform of one config.

    >>> Selection({"target_modules": ["q_proj"]}).means("l.0.q_proj")
    True
    >>> Selection({"target_modules": ".*v"}).means("l.0.q_proj")
    False

    Args:
        config: adapter_config.json. where: The adapter, for messages.

    Raises:
        FormatError: an expression that is none, or one that can't be matched in bounded time.
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
