"""Regular expressions from a config or the command line, matched against module paths in bounded time.

Python's re goes back and tries again, so that `(a+)+b` takes 2ⁿ steps on n letters. PEFT only asks whether a path
matches, and for that all ways can be followed at once: a set of places in the path, one bit each of a number, goes
through the expression from left to right. Groups that refer back to others can't be followed so; they are refused.
Where Python's re is quick for sure, as with most real expressions on paths of real length, it is asked instead.

The regex package (2026.11.15) with a time-out can't take this file's place: given a second each it gives up on
`(a|aa)+b` for 60 letters, `(.*a){30}b` for 5000 and `(a{1,1000}){1,1000}b`, which take less than 5 ms here, and that
second counts the work of all threads (beside three busy ones it ended after 0.24 s of its own), so whether a pattern is
refused would depend on what else runs. Nor does it mean what re means, which PEFT asks: it accepts `^*`, `a(?i)b`,
`(?e)a`, `\\p{L}` and `(?<=a+)b`, errors in re, reads `[[:alpha:]]` as a class, and its `\\w` differs for 30,468
characters.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

from lorasurgery.engine.process import own_settings

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_LONGEST, _DEEPEST = 100_000, 100
STEPS = 20_000_000  # that one config may cost, ten seconds or so; real ones take thousands
_QUICK = 50_000  # ways through an expression that re may try: a tenth of a millisecond to a few
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_IGNORE_CASE, _MULTILINE, _DOT_ALL, _ASCII = 2, 8, 16, 256  # re's flags

Advance = Callable[["PathText", int], int]
"""From the places (a bit each) where a part of the expression may begin to those where it may end."""


class PatternError(ValueError):
    """A pattern that is not a regular expression, or one that is refused; says why, without naming it."""


class Budget:
    """Steps that may still be taken: by the patterns of one config together, or by one on one path."""

    def __init__(self, steps: int | None = None) -> None:
        self.left = STEPS if steps is None else steps

    def take(self, steps: int) -> None:
        """Spend some.

        Raises:
            PatternError: more than there were.
        """
        self.left -= steps
        if self.left < 0:
            raise PatternError("takes too long to be matched with names of modules")


class PathRegex:
    """One expression, parsed once.

    >>> PathRegex(r".*\\.layers\\.[0-3]\\.(q|v)_proj").fullmatch(PathText("model.layers.2.v_proj"))
    True
    >>> PathRegex("(a+)+b").fullmatch(PathText("a" * 5000))
    False

    Raises:
        PatternError: not a regular expression, or one that can't be matched in bounded time.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise PatternError(f"has {len(text):,} characters, more than any real one")
        try:
            with own_settings():
                warnings.simplefilter("ignore")
                tree = _parser.parse(text)
                self._step = _sequence(tree, tree.state.flags, 0)
                self._ways = _ways(tree)
                self._text = text
        except PatternError:
            raise
        except RecursionError:
            raise PatternError("is nested too deeply") from None
        except (ValueError, OverflowError, _parser.error) as problem:
            raise PatternError(f"is not a regular expression ({problem})") from None

    def means(self, path: str, steps: int) -> bool:
        """Whether all of a path matches.

        Args:
            steps: That it may cost, where re is not sure to be quick.

        Raises:
            PatternError: it would cost more.
        """
        count, degree = self._ways
        if count * (len(path) + 1) ** degree <= _QUICK:
            return self._compiled.fullmatch(path) is not None
        return self.fullmatch(PathText(path, Budget(steps)))

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(self._text)

    def fullmatch(self, path: PathText) -> bool:
        """Whether all of a path matches.

        Raises:
            PatternError: its budget is spent.
        """
        return bool(self.ends(path, 0) >> path.end)

    def ends(self, path: PathText, start: int) -> int:
        """The places where a match that begins at `start` may end, as bits."""
        return self._step(path, 1 << start)


class PathText:
    """A path as it is matched, by many expressions in turn: where each of its characters stands, as bits."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self.text, self.budget, self.end = text, budget or Budget(), len(text)
        self.budget.take(len(text))
        self.cost = 1 + (len(text) >> 10)
        self.places: dict[str, int] = {}
        self.known: dict[int, int] = {}  # of a class of characters
        for i, c in enumerate(text):
            self.places[c] = self.places.get(c, 0) | 1 << i

    def where(self, one: _Single) -> int:
        """Where the characters stand that a part of the expression means."""
        if one.letter:
            return self.places.get(one.letter, 0)
        if id(one) not in self.known:
            self.budget.take(len(self.places))
            self.known[id(one)] = sum(bits for c, bits in self.places.items() if one.means(c))
        return self.known[id(one)]


class _Single:
    """A part that is one character: a letter, a dot, a class."""

    def __init__(self, op: str, av: Any, flags: int) -> None:
        self.flags, self.negated = flags, op == "NOT_LITERAL"
        self.any = op == "ANY"
        self.letter = chr(av) if op == "LITERAL" and not flags & _IGNORE_CASE else ""
        self._known: dict[str, bool] = {}
        self.items = [(str(kind), value) for kind, value in av] if op == "IN" else [("LITERAL", av)]
        if self.items and self.items[0][0] == "NEGATE":
            self.negated, self.items = True, self.items[1:]

    def means(self, c: str) -> bool:
        """Whether a character is meant."""
        if c not in self._known:
            self._known[c] = self._means(c)
        return self._known[c]

    def _means(self, c: str) -> bool:
        if self.any:
            return c != "\n" or bool(self.flags & _DOT_ALL)
        forms = {c, c.lower(), c.upper(), c.swapcase()} if self.flags & _IGNORE_CASE else {c}
        found = any(self._item(kind, value, form) for kind, value in self.items for form in forms if len(form) == 1)
        return found != self.negated

    def _item(self, kind: str, value: Any, c: str) -> bool:
        if kind == "LITERAL":
            return bool(ord(c) == value)
        if kind == "RANGE":
            return bool(value[0] <= ord(c) <= value[1])
        name = str(value).removeprefix("CATEGORY_")
        plain = c.isascii() or not self.flags & _ASCII
        kinds: dict[str, bool] = {"DIGIT": c.isdecimal(), "SPACE": c.isspace(), "WORD": _is_word(c)}
        return (plain and kinds[name.removeprefix("NOT_")]) != name.startswith("NOT_")

    def __call__(self, path: PathText, starts: int) -> int:
        path.budget.take(path.cost)
        return (starts & path.where(self)) << 1


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _ways(tree: Any) -> tuple[float, int]:
    """(c, d): re goes through a sequence in at most c·(n + 1)ᵈ ways on a path of n letters."""
    found = [_ways_of(str(op), av) for op, av in tree]
    return math.prod(count for count, _ in found), sum(degree for _, degree in found)


def _ways_of(op: str, av: Any) -> tuple[float, int]:
    """The same for a part: infinitely many where groups are repeated, for each round multiplies them."""
    if op == "SUBPATTERN":
        return _ways(av[3])
    if op == "BRANCH":
        branches = [_ways(branch) for branch in av[1]]
        return sum(count for count, _ in branches), max(degree for _, degree in branches)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = av
        if len(inner) == 1 and str(inner[0][0]) in _SINGLE:
            return (1.0, 1) if most - least > 1000 else (1.0 + most - least, 0)
        count, degree = _ways(inner)
        return (1.0 + count, degree) if most <= 1 else (math.inf, 0)
    return _ways(av[1]) if op in ("ASSERT", "ASSERT_NOT") else (1.0, 0)


def _sequence(tree: Any, flags: int, depth: int) -> Advance:
    if depth > _DEEPEST:
        raise PatternError("is nested too deeply")
    steps = [_part(str(op), av, flags, depth) for op, av in tree]

    def run(path: PathText, places: int) -> int:
        for step in steps:
            if not places:
                break
            places = step(path, places)
        return places

    return steps[0] if len(steps) == 1 else run


def _part(op: str, av: Any, flags: int, depth: int) -> Advance:
    if op in _SINGLE:
        return _Single(op, av, flags)
    if op == "SUBPATTERN":
        return _sequence(av[3], (flags | av[1]) & ~av[2], depth + 1)
    if op == "BRANCH":
        branches = [_sequence(branch, flags, depth + 1) for branch in av[1]]
        return lambda path, places: _union(branches, path, places)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        inner = _sequence(av[2], flags, depth + 1)
        return _repeated_single(inner, *av[:2]) if isinstance(inner, _Single) else _repeated(inner, *av[:2])
    if op == "AT":
        return lambda path, places: places & _at(str(av), path, flags)
    if op in ("ASSERT", "ASSERT_NOT"):
        return _assertion(av, flags, depth, wanted=op == "ASSERT")
    if op == "FAILURE":
        return lambda path, places: 0
    raise PatternError(f"has what is not matched here ({op.lower().replace('_', ' ')})")


def _union(branches: list[Advance], path: PathText, places: int) -> int:
    path.budget.take(len(branches) * path.cost)
    found = 0
    for branch in branches:
        found |= branch(path, places)
    return found


def _repeated_single(one: _Single, least: int, most: int) -> Advance:
    """A run of characters of one kind: an addition carries every start to the end of its run."""

    def run(path: PathText, places: int) -> int:
        there = path.where(one)
        for _ in range(min(int(least), path.end + 1)):
            path.budget.take(path.cost)
            places = (places & there) << 1
        if most > path.end:
            path.budget.take(path.cost)
            return ((there + (places & there)) ^ there) | places
        found = places
        for _ in range(int(most) - int(least)):
            path.budget.take(path.cost)
            places = (places & there) << 1
            found |= places
        return found

    return run


def _repeated(inner: Advance, least: int, most: int) -> Advance:
    """Any part repeated. After as many rounds as there are places nothing new can come."""

    def run(path: PathText, places: int) -> int:
        for _ in range(min(int(least), path.end + 1)):
            path.budget.take(path.cost)
            places = inner(path, places)
        found = fresh = places
        for _ in range(min(int(most) - int(least), path.end + 1)):
            if not fresh:
                break
            path.budget.take(path.cost)
            fresh = inner(path, fresh) & ~found
            found |= fresh
        return found

    return run


def _assertion(av: Any, flags: int, depth: int, *, wanted: bool) -> Advance:
    """Look ahead or behind, from each place by itself."""
    behind, tree = av[0] < 0, av[1]
    low, high = tree.getwidth()
    if behind and low != high:
        raise PatternError("is not a regular expression (look-behind requires fixed-width pattern)")
    inner = _sequence(tree, flags, depth + 1)

    def holds(path: PathText, place: int) -> bool:
        path.budget.take(path.cost)
        if behind:
            return place >= low and bool(inner(path, 1 << (place - low)) >> place & 1)
        return inner(path, 1 << place) != 0

    def run(path: PathText, places: int) -> int:
        one_by_one = (i for i in range(path.end + 1) if places >> i & 1)
        return sum(1 << i for i in one_by_one if holds(path, i) == wanted)

    return run


def _at(kind: str, path: PathText, flags: int) -> int:
    """The places that are a beginning, an end or a boundary."""
    text, end = path.text, path.end
    everywhere = (2 << end) - 1
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        lines = path.places.get("\n", 0) << 1 if flags & _MULTILINE and kind == "AT_BEGINNING" else 0
        return 1 | lines
    if kind in ("AT_END", "AT_END_STRING"):
        last = 1 << (end - 1) if text.endswith("\n") and kind == "AT_END" else 0
        lines = path.places.get("\n", 0) if flags & _MULTILINE and kind == "AT_END" else 0
        return 1 << end | last | lines
    words = [bits for c, bits in path.places.items() if _is_word(c) and (c.isascii() or not flags & _ASCII)]
    word = sum(words)
    boundary = word ^ word << 1
    return boundary & everywhere if kind == "AT_BOUNDARY" else ~boundary & everywhere
