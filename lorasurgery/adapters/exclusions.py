"""Patterns for --exclude that mean some modules and no others, to be printed as a next move."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from lorasurgery.adapters.patterns import PRESETS, any_match, matches
from lorasurgery.errors import UsageError

_MOST = 12  # patterns that a person may be asked to give
_ENDING = 4  # parts of a path's end


def exclude_only(meant: Collection[str], others: Iterable[str]) -> str:
    """The options that leave out these modules and nothing else, as they are typed; "" if there would be too many.

    >>> exclude_only(["mtp.fc", "mtp.layers.0.q_proj"], ["layers.0.q_proj", "lm_head"])
    '--exclude mtp.+'
    >>> exclude_only(["conv.0"], ["conv.0.0", "to_out.0"])
    '--exclude conv.0'

    Args:
        meant: Paths that are to be left out. others: All the other paths that a pattern could mean.
    """
    rest, patterns = sorted(set(meant)), list[str]()
    spared = set(others) - set(meant)
    taken = {key for path in spared for key in _keys(path)}
    while rest:
        if len(patterns) == _MOST:
            return ""
        pattern = _widest(rest, taken)
        if _means_any(pattern, spared):
            pattern = _exact(pattern if pattern.endswith(".+") else rest[0])
        left = [path for path in rest if not matches(pattern, path)]
        if len(left) == len(rest):
            return ""
        patterns.append(pattern)
        rest = left
    return " ".join(f"--exclude {shlex.quote(p)}" for p in patterns)


def _widest(paths: list[str], taken: set[str]) -> str:
    """The pattern that means the most of these paths and, as far as words go, none of the others."""
    counts: Counter[str] = Counter(key for path in paths for key in _keys(path) if key not in taken)
    best = max(counts.values(), default=0)
    if best <= 1:
        return paths[0]
    return min((p for p, n in counts.items() if n == best), key=lambda p: (len(p), p))


def _keys(path: str) -> Iterator[str]:
    """What may stand for a path: everything inside one of its parents, or its ending."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i]) + ".+"
    for i in range(max(0, len(parts) - _ENDING), len(parts)):
        ending = ".".join(parts[i:])
        if ending not in PRESETS and not ending[:1].isdecimal():
            yield ending


def _exact(pattern: str) -> str:
    """The same as a regular expression on the whole path, in which a dot is a dot."""
    if pattern.endswith(".+"):
        return re.escape(pattern.removesuffix(".+")) + r"\..+"
    return f"({re.escape(pattern)})"


def _means_any(pattern: str, paths: Iterable[str]) -> bool:
    try:
        return any(any_match([pattern], path) for path in paths)
    except UsageError:  # a name that is no regular expression
        return True
