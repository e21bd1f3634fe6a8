"""Choosing ranks: each rule against its definition, the budget against every other way to spend it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.errors import UsageError
from lorasurgery.linalg.rank import Budget, RankChoice, allocate

SPECTRA = st.lists(
    st.tuples(st.lists(st.floats(0, 100), min_size=0, max_size=4), st.integers(1, 9)), min_size=1, max_size=4
)


@given(SPECTRA, st.integers(0, 60))
def test_the_budget_is_never_overdrawn(modules: list[tuple[list[float], int]], budget: int) -> None:
    """Ranks cost at most the budget, and what is left over buys no further direction that carries energy."""
    spectra, costs = [sorted(s, reverse=True) for s, _ in modules], [c for _, c in modules]
    ranks = allocate(spectra, costs, budget)
    spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
    assert spent <= budget
    for spectrum, cost, rank in zip(spectra, costs, ranks, strict=True):
        assert rank <= len(spectrum)
        if rank < len(spectrum) and spectrum[rank] > 0:
            assert spent + cost > budget


@given(st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 12))
def test_the_budget_is_spent_best(spectra: list[list[float]], directions: int) -> None:
    """With directions of one price no other choice of ranks keeps more energy."""
    spectra = [sorted(s, reverse=True) for s in spectra]
    ranks = allocate(spectra, [10] * len(spectra), 10 * directions)
    kept = sum(sum(s[:r]) for s, r in zip(spectra, ranks, strict=True))
    for other in itertools.product(*(range(len(s) + 1) for s in spectra)):
        if sum(other) <= directions:
            assert kept >= sum(sum(s[:r]) for s, r in zip(spectra, other, strict=True)) - 1e-9


def test_price_counts() -> None:
    """A direction of a large module must carry more energy than one of a small module."""
    assert allocate([[10.0], [6.0]], [100, 50], 100) == [0, 1]
    assert allocate([[13.0], [6.0]], [100, 50], 100) == [1, 0]
    assert allocate([[13.0], [6.0]], [100, 50], 99) == [0, 1]  # what doesn't fit makes room for what does


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (RankChoice(rank=2), 2),
        (RankChoice(rank=9), 4),
        (RankChoice(rank=3, max_rank=1), 1),
        (RankChoice(energy=0.5), 1),
        (RankChoice(energy=0.9), 3),
        (RankChoice(energy=1.0), 4),
        (RankChoice(energy=0.9, max_rank=2), 2),
        (RankChoice(tolerance=0.5), 2),
        (RankChoice(tolerance=0.0), 4),
        (RankChoice(tolerance=0.99), 1),
        (RankChoice(sv_ratio=1.5), 2),
        (RankChoice(sv_ratio=3.0), 3),
        (RankChoice(sv_ratio=1.0), 1),
        (RankChoice(sv_cumulative=0.4), 2),
        (RankChoice(sv_cumulative=0.9), 4),
        (RankChoice(sv_cumulative=0.9, max_rank=2), 2),
        (RankChoice(budget=Budget(size=1)), 4),
        (RankChoice(budget=Budget(size=1), max_rank=3), 3),
    ],
    ids=repr,
)
def test_rules(choice: RankChoice, expected: int) -> None:
    """σ² = 5, 3, 1.5, 0.5."""
    assert choice.choose([5.0, 3.0, 1.5, 0.5], 10.0, 1e-14) == expected


def test_small_tolerances_are_kept() -> None:
    """With exact energies a tolerance of 1e-5 is a tolerance of 1e-5."""
    squares = [1.0, 1e-9, 1e-11]
    assert RankChoice(tolerance=1e-5).choose(squares, sum(squares), 1e-14) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [({}, "give exactly one of"), ({"rank": 1, "energy": 0.5}, "give exactly one of"),
     ({"budget": Budget(size=1), "rank": 1}, "give exactly one of"), ({"sv_ratio": 2.0, "rank": 1}, "give exactly one of"),
     ({"rank": 0}, "rank=0: expected at least 1"), ({"rank": 1, "max_rank": 0}, "max_rank=0: expected at least 1"),
     ({"energy": 1.5}, "energy=1.5: expected a share"), ({"tolerance": 1.0}, "tolerance=1.0: expected a relative error"),
     ({"sv_ratio": 0.5}, "sv_ratio=0.5: expected a number"), ({"sv_cumulative": 1.5}, "sv_cumulative=1.5: expected a share")],
)  # fmt: skip
def test_meaningless_rules(words: dict[str, object], said: str) -> None:
    """None, two, or values out of range."""
    with pytest.raises(UsageError, match=f"^{said}"):
        RankChoice(**words)  # type: ignore[arg-type]
