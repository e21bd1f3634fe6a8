"""Which mutants are tried: spread over rooms and kinds of mistake, by a hash of what they are.

No random numbers: a mutant's turn depends on the seed and its own text alone, so that an edit elsewhere, or a file that
moves, changes the choice by a few at most.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mutant_kinds import Mutant, mutants

ROOMS = (("linalg",), ("adapters",), ("checkpoint", "engine"), ("ops", "clients"))
EQUIVALENT = Path(__file__).with_name("equivalent.json")
_KNOWN_BY = ("file", "function", "kind", "was", "now")
Reasons = dict[tuple[str, ...], str]


def choose(root: Path, count: int, seed: int, only: str = "") -> list[Mutant]:
    """Mutants of the package, an equal share for each of the rooms, no two in one function.

    Args:
        only: Of files whose path begins so.
    """
    shares = [count // len(ROOMS) + (i < count % len(ROOMS)) for i in range(len(ROOMS))]
    if only:
        return _share(_all(root, [only]), count, seed)
    return [
        m
        for rooms, share in zip(ROOMS, shares, strict=True)
        for m in _share(_all(root, [f"lorasurgery/{room}/" for room in rooms]), share, seed)
    ]


def _all(root: Path, starts: list[str]) -> Iterable[Mutant]:
    for path in sorted((root / "lorasurgery").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(tuple(starts)):
            yield from mutants(name, path.read_bytes())


def _share(found: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """The first of each kind of mistake, then the second of each."""
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(found, key=lambda m: _turn(m, seed)):
        kinds[mutant.kind].append(mutant)
    chosen: list[Mutant] = []
    functions: set[tuple[str, str]] = set()
    while len(chosen) < count and any(kinds.values()):
        for kind in sorted(kinds):
            left = kinds[kind]
            while left and (left[0].file, left[0].function) in functions:
                left.pop(0)
            if left and len(chosen) < count:
                chosen.append(left.pop(0))
                functions.add((chosen[-1].file, chosen[-1].function))
    return sorted(chosen, key=lambda m: (m.file, m.line))


def _turn(mutant: Mutant, seed: int) -> str:
    what = (str(seed), mutant.function, mutant.kind, mutant.was, mutant.now, str(mutant.same))
    return hashlib.sha256("\n".join(what).encode()).hexdigest()


def reasons(path: Path = EQUIVALENT) -> Reasons:
    """Why mutants that somebody looked at make no difference."""
    return {tuple(e[name] for name in _KNOWN_BY): e["why"] for e in json.loads(path.read_text())}


def reason(mutant: Mutant, known: Reasons) -> str | None:
    """Why this one makes no difference; None when it should be caught."""
    return known.get(tuple(getattr(mutant, name) for name in _KNOWN_BY))
