"""How many places there are to stop at."""

from __future__ import annotations

from cases import CASES, PUSHES, World
from stopping import calls_of, stops


def test_the_whole_is_thousands_of_stops(world: World) -> None:
    """`make test-slow TESTS=tests/crash` stops at more than two thousand places; each operation has at least twenty."""
    count = {}
    for name in CASES:
        count[name] = len(list(stops(calls_of(name, world), cuts=0 if name in PUSHES else 1)))
        print(f"{name}: {count[name]}")
    assert min(count.values()) >= 20
    assert sum(count.values()) >= 2000
