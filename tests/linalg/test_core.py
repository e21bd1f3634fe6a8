"""Recompression against the SVD of the dense matrix in float64: values, truncations, errors, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.core import Core, distance, inner, recompress
from lorasurgery.linalg.thin import thin_qr
from lorasurgery.lowrank import LowRank


def term(m: int, n: int, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return LowRank(up.to(dtype), down.to(dtype), scale)


def dense(terms: list[LowRank]) -> Tensor:
    """The sum in float64, from the factors' exact values."""
    return sum(t.scale * (t.up.double() @ t.down.double()) for t in terms)  # type: ignore[return-value]


def check(terms: list[LowRank], tight: float = 1e-9) -> Core:
    """Singular values, every truncation and every error are those of the dense matrix."""
    whole = dense(terms)
    expected = torch.linalg.svdvals(whole)
    found = recompress(terms)
    size = min(len(found.singular), len(expected))
    assert torch.allclose(found.singular[:size], expected[:size], rtol=0, atol=tight * float(expected[0]))
    assert found.total == pytest.approx(float(whole.square().sum()), rel=1e-12)
    u, s, vt = torch.linalg.svd(whole)
    norm = float(torch.linalg.matrix_norm(whole))
    for rank in range(1, found.rank + 1):
        kept = found.truncate(rank)
        best = math.sqrt(float(s[rank:].square().sum())) / norm
        assert found.error(rank) == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert float(torch.linalg.matrix_norm(whole - dense([kept]))) / norm == pytest.approx(best, rel=1e-5, abs=1e-6)
        if s[rank - 1] > 1.01 * s[min(rank, len(s) - 1)]:  # where the best approximation is unique
            exact = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert float(torch.linalg.matrix_norm(dense([kept]) - exact)) < 1e-5 * norm
    return found


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 200), (5, 4), (1, 7)])
@pytest.mark.parametrize(
    "parts",
    [
        [(4, 1.0)],
        [(4, 0.7), (6, -0.3)],
        [(1, 1e-3), (8, 50.0), (3, -2.0)],
        [(16, 1.0), (16, 1.0), (16, -1.0)],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_dense_svd(shape: tuple[int, int], parts: list[tuple[int, float]], dtype: torch.dtype) -> None:
    """Any mix of ranks (beyond the matrix's own too), scales, signs and dtypes."""
    terms = [term(*shape, rank, scale, dtype, seed=i) for i, (rank, scale) in enumerate(parts)]
    found = check(terms)
    assert found.rank == min(*shape, sum(rank for rank, _ in parts))


def test_mixed_dtypes() -> None:
    """bfloat16, float16 and float32 factors in one sum."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    check([term(30, 20, 3, 0.5, dtype, seed=i) for i, dtype in enumerate(dtypes)])


def nearly_dependent(gap: float) -> LowRank:
    base = term(60, 50, 4)
    noise = term(60, 50, 4, seed=9)
    return LowRank(torch.cat([base.up, base.up + gap * noise.up], 1), torch.cat([base.down, noise.down]))


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_nearly_dependent_columns(gap: float) -> None:
    """Columns that nearly repeat, which the Gram matrix alone would not survive."""
    check([nearly_dependent(gap)])


@pytest.mark.parametrize("spread", [1e3, 1e8, 1e15])
def test_columns_of_wildly_different_size(spread: float) -> None:
    """The two sides of a product may share its size in any way; graded products keep their small ones."""
    t = term(50, 40, 8)
    split = torch.logspace(0, math.log10(spread), 8)
    moved = LowRank(t.up * split, t.down / split[:, None])
    assert check([moved]).rank == 8
    graded = LowRank(t.up * torch.logspace(0, -5, 8), t.down)
    found = check([graded])
    assert found.rank == 8
    assert torch.allclose(found.singular[:8], torch.linalg.svdvals(dense([graded]))[:8], rtol=1e-8)


def test_both_ways_of_qr_agree() -> None:
    """The Gram matrix is used where it is safe, Householder where it isn't; both give A = QR with orthonormal Q."""
    easy, hard = term(60, 50, 8).up.double().mT, nearly_dependent(1e-6).up.double().mT
    for rows, direct in ((easy, False), (hard, True)):
        thin = thin_qr(rows.contiguous())
        assert (thin.q is not None) == direct
        q = thin.times(torch.eye(thin.r.shape[0], dtype=torch.float64)).mT
        assert torch.allclose(q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-9)
        assert torch.allclose(q @ (thin.r * thin.norms), rows.mT, rtol=1e-9, atol=1e-9)


def test_zero_columns_and_padding_are_free() -> None:
    """Zero-padded factors, as servers want them, have the rank they had."""
    t = term(30, 20, 4)
    padded = LowRank(torch.cat([t.up, torch.zeros(30, 3)], 1), torch.cat([t.down, torch.zeros(3, 20)]))
    half = LowRank(torch.cat([t.up, torch.ones(30, 2)], 1), torch.cat([t.down, torch.zeros(2, 20)]))
    for odd in (padded, half):
        found = recompress([odd])
        assert found.rank == 4
        assert torch.allclose(dense([found.truncate(9)]), dense([t]), atol=1e-5)


def test_what_cancels_is_gone() -> None:
    """A − A is nothing at all; A + B − A is B to float64, not to float32."""
    a, b = term(80, 60, 8, 2.0), term(80, 60, 4, 1e-4, seed=1)
    nothing = recompress([a, a.times(-1.0)])
    assert nothing.rank == 0
    assert nothing.truncate(8).rank == 0
    rest = recompress([a, b, a.times(-1.0)])
    assert rest.rank == 4
    size = float(torch.linalg.matrix_norm(dense([b])))
    assert float(torch.linalg.matrix_norm(dense([rest.truncate(4)]) - dense([b]))) < 1e-6 * size


def test_zero_update() -> None:
    """B at its initial zero: rank 0, no error, factors of rank 0."""
    found = recompress([LowRank(torch.zeros(5, 2), torch.ones(2, 3))])
    assert (found.rank, found.total, found.error(0)) == (0, 0.0, 0.0)
    assert found.truncate(4).shape == (5, 3)
    assert found.basis().shape == (5, 0)


def test_minimal_rank_of_shared_directions() -> None:
    """Adapters that share their A (or B) add up within its rank."""
    a, b = term(40, 30, 6), term(40, 30, 6, seed=1)
    assert recompress([a, LowRank(b.up, a.down)]).rank == 6
    assert recompress([a, LowRank(a.up, b.down, -0.5)]).rank == 6
    assert recompress([a, b]).rank == 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    """One clear error, whichever way the QR goes."""
    t = term(20, 10, 3)
    t.up[2, 1] = bad
    with pytest.raises(SurgeryError, match="not finite"):
        recompress([t])
    with pytest.raises(SurgeryError, match="not finite"):
        recompress([term(20, 400, 300), LowRank(t.up, term(20, 400, 3).down)], most=4)


def many(count: int = 20, m: int = 700, n: int = 600) -> list[LowRank]:
    fall = torch.arange(1, 17) ** -0.5
    parts = [term(m, n, 16, 1 / count, torch.bfloat16, seed=i) for i in range(count)]
    return [LowRank(p.up * fall, p.down, p.scale) for p in parts]


def test_the_fast_way_is_as_good() -> None:
    """Many terms and few directions: float32 and an eigensolver give the optimal truncation to 1e-5."""
    terms = many()
    fast = recompress(terms, most=16)
    assert fast.left.rows.dtype == torch.float32
    whole = dense(terms)
    expected = torch.linalg.svdvals(whole)
    norm = float(torch.linalg.matrix_norm(whole))
    assert torch.allclose(fast.singular, expected[: len(fast.singular)], rtol=1e-4, atol=1e-5 * float(expected[0]))
    best = math.sqrt(float(expected[16:].square().sum())) / norm
    reached = float(torch.linalg.matrix_norm(whole - dense([fast.truncate(16)]))) / norm
    assert reached == pytest.approx(best, rel=1e-5)
    assert fast.error(16) == pytest.approx(reached, rel=1e-5)


def test_the_fast_way_gives_way() -> None:
    """Where terms cancel, columns depend or σ falls too far, float64 does it."""
    terms = many()
    cancelling = [*terms, *[t.times(-0.999) for t in terms]]
    steep = [LowRank(t.up * torch.logspace(0, -12, 16), t.down, t.scale if i else 1.0) for i, t in enumerate(terms)]
    for hard in (cancelling, steep):
        found = recompress(hard, most=32)
        assert found.x.dtype == torch.float64
        expected = torch.linalg.svdvals(dense(hard))
        assert torch.allclose(found.singular[:32], expected[:32], rtol=1e-6)


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
TERMS = st.lists(st.tuples(st.integers(1, 5), st.floats(-4, 4, allow_nan=False)), min_size=1, max_size=4)


def make(shape: tuple[int, int], parts: list[tuple[int, float]]) -> list[LowRank]:
    return [term(*shape, rank, scale, seed=i) for i, (rank, scale) in enumerate(parts)]


@given(SIZES, TERMS)
def test_order_does_not_matter(shape: tuple[int, int], parts: list[tuple[int, float]]) -> None:
    """The sum commutes."""
    terms = make(shape, parts)
    one, two = recompress(terms), recompress(terms[::-1])
    assert torch.allclose(one.singular, two.singular, rtol=1e-9, atol=1e-9 * max(1.0, float(one.singular[:1].sum())))
    assert torch.allclose(dense([one.truncate(99)]), dense([two.truncate(99)]), atol=1e-4)


@given(SIZES, TERMS, st.floats(-8, 8).filter(lambda w: abs(w) > 1e-3))
def test_scaling_passes_through(shape: tuple[int, int], parts: list[tuple[int, float]], weight: float) -> None:
    """σ(w·ΔW) = |w|·σ(ΔW), and truncation commutes with it."""
    terms = make(shape, parts)
    one, two = recompress(terms), recompress([t.times(weight) for t in terms])
    scale = max(1e-9, float(one.singular[:1].sum()))
    assert torch.allclose(one.singular * abs(weight), two.singular, atol=1e-9 * scale * abs(weight))
    assert one.rank == two.rank


@given(SIZES, TERMS)
def test_recompressing_twice_changes_nothing(shape: tuple[int, int], parts: list[tuple[int, float]]) -> None:
    """The factors of a sum are themselves a sum, of minimal rank and with the same spectrum."""
    one = recompress(make(shape, parts))
    if one.rank:
        two = recompress([one.truncate(99)])
        assert two.rank <= one.rank
        assert torch.allclose(two.singular[: two.rank], one.singular[: two.rank], rtol=1e-4, atol=1e-6)


@given(SIZES, TERMS, TERMS)
def test_inner_products(shape: tuple[int, int], left: list[tuple[int, float]], right: list[tuple[int, float]]) -> None:
    """⟨A,B⟩ from factors is the dense one, and ⟨A,A⟩ the total."""
    a, b = make(shape, left), make(shape, right)
    size = float(torch.linalg.matrix_norm(dense(a)) * torch.linalg.matrix_norm(dense(b)))
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-9, abs=1e-9 * max(1.0, size))
    assert recompress(a).total == pytest.approx(inner(a, a), rel=1e-9, abs=1e-9)


def test_distance_of_roundings() -> None:
    """What rounding the factors to bfloat16 costs, without cancellation."""
    exact = term(50, 40, 6)
    written = LowRank(exact.up.bfloat16(), exact.down.bfloat16())
    expected = float(torch.linalg.matrix_norm(dense([exact]) - dense([written])))
    assert distance(exact, written) == pytest.approx(expected, rel=1e-4)
    assert distance(exact, exact) == 0
