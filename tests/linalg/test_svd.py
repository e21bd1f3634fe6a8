"""Truncated SVD against LAPACK in float64 on matrices of known spectrum; products are compared, never signs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasurgery.errors import SurgeryError, UsageError
from lorasurgery.linalg.krylov import BlockKrylov
from lorasurgery.linalg.norms import residual_norm, squared_norm
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, exact_svd, randomized_svd, truncated_svd
from lorasurgery.lowrank import LowRank

K = 256
FLOOR = 2e-6  # what LAPACK itself reaches in float32 where nothing should be left
I = torch.arange(1, K + 1, dtype=torch.float64)  # noqa: E741
SPECTRA = {
    "fast decay": 0.8**I,
    "slow decay": I**-0.3,
    "power law": I**-1.0,
    "flat": torch.ones(K, dtype=torch.float64),
    "cluster": torch.where(I <= 50, 1.0, 0.1),
    "rank-deficient": torch.where(I <= 10, 1.0 / I, 0.0),
    "graded": 10 ** (-12 * I / K),
}
SHAPES = {"square": (256, 256), "tall": (900, 256), "wide": (256, 900)}


def known(spectrum: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """U·diag(s)·Vᵀ with random orthonormal U and V, in float32."""
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    return ((u * spectrum) @ v.T).float()


def measured(delta: Tensor, found: TruncatedSVD) -> float:
    """‖ΔW − USVᵀ‖/‖ΔW‖ in float64."""
    d = delta.double()
    product = (found.u.double() * found.s) @ found.vt.double()
    return float((d - product).norm() / d.norm())


def optimum(delta: Tensor, rank: int) -> float:
    """Eckart–Young's bound by LAPACK in float64."""
    s = torch.linalg.svdvals(delta.double())
    return float(s[rank:].norm() / s.norm())


@pytest.mark.parametrize("method", ["randomized", "exact", "auto"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_is_within_a_thousandth_of_the_optimum(spectrum: str, shape: str, method: str) -> None:
    """At ranks 4 to 32 the measured error is at most 0.1% above Eckart–Young's (or at float32's own floor)."""
    delta = known(SPECTRA[spectrum], *SHAPES[shape])
    for rank in (4, 16, 32):
        found = truncated_svd(delta, RankChoice(rank=rank), method=method, seed=1)
        assert measured(delta, found) <= 1.001 * optimum(delta, rank) + FLOOR


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (3, 500)])
def test_thin_matrices(shape: tuple[int, int]) -> None:
    """1×n, n×1 and other thin matrices come back whole."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for method in ("auto", "randomized", "exact"):
        found = truncated_svd(delta, RankChoice(rank=8), method=method)
        assert len(found.s) == min(shape)
        torch.testing.assert_close((found.u * found.s.float()) @ found.vt, delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_zero_has_rank_zero(method: str) -> None:
    """A zero matrix has no directions, and its error is 0."""
    found = truncated_svd(torch.zeros(300, 400), RankChoice(rank=8), method=method)
    assert len(found.s) == 0
    assert found.error == 0


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_rank_comes_out_lower_when_there_is_no_more(method: str) -> None:
    """A matrix of rank 10 asked for 32 directions gives 10."""
    delta = known(SPECTRA["rank-deficient"], 300, 400)
    assert len(truncated_svd(delta, RankChoice(rank=32), method=method).s) == 10


@pytest.mark.parametrize("spectrum", ["slow decay", "power law", "cluster"])
@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_certificate_is_the_measured_error(spectrum: str, method: str) -> None:
    """The error by Pythagoras is the error measured in float64, also where the basis is not the best one."""
    delta = known(SPECTRA[spectrum], 300, 500)
    found = truncated_svd(delta, RankChoice(rank=16), method=method)
    assert found.error == pytest.approx(measured(delta, found), rel=1e-5)


def test_one_pass_is_not_enough_for_a_slow_decay() -> None:
    """Where an approximation must fail it does: a single pass is measurably worse, and its certificate says so."""
    delta = known(SPECTRA["slow decay"], 512, 700)
    one = randomized_svd(delta, RankChoice(rank=16), squared_norm(delta), max_passes=1)
    assert one is not None
    one = one.truncate(16)
    assert measured(delta, one) > 1.01 * optimum(delta, 16)
    assert one.error == pytest.approx(measured(delta, one), rel=1e-5)


@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_gives_the_least_rank(share: float, method: str) -> None:
    """--energy F: the least r with Σσ² ≥ F·‖ΔW‖², as the exact spectrum tells it."""
    spectrum = SPECTRA["power law"]
    delta = known(spectrum, 400, 600)
    shares = spectrum.square().cumsum(0) / spectrum.square().sum()
    least = int((shares < share).sum()) + 1
    found = truncated_svd(delta, RankChoice(energy=share), method=method)
    assert len(found.s) == least


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_tolerance_gives_the_least_rank(method: str) -> None:
    """--tolerance F: the least r whose error is at most F."""
    delta = known(SPECTRA["fast decay"], 400, 600)
    found = truncated_svd(delta, RankChoice(tolerance=0.05), method=method)
    assert measured(delta, found) <= 0.05 < optimum(delta, len(found.s) - 1)


def test_energy_one_keeps_everything() -> None:
    """--energy 1 is full rank: nothing is lost but float32's rounding."""
    delta = known(SPECTRA["slow decay"], 300, 300)
    assert measured(delta, truncated_svd(delta, RankChoice(energy=1.0))) < 1e-3


def test_same_seed_same_bits() -> None:
    """The same seed gives the same bits; another seed another basis of the same quality."""
    delta = known(SPECTRA["slow decay"], 300, 500)
    one, two, other = (truncated_svd(delta, RankChoice(rank=8), method="randomized", seed=s) for s in (1, 1, 2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.vt, two.vt)
    assert other.error == pytest.approx(one.error, rel=1e-3)


def test_factors_are_orthonormal() -> None:
    """U and V have orthonormal columns to float32."""
    found = truncated_svd(known(SPECTRA["power law"], 300, 500), RankChoice(rank=32), method="randomized")
    eye = torch.eye(32)
    torch.testing.assert_close(found.u.T @ found.u, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.vt @ found.vt.T, eye, atol=1e-4, rtol=0)


def test_double_precision_stays_double() -> None:
    """A float64 ΔW is decomposed in float64: its graded tail is seen to 1e-12."""
    delta = known(SPECTRA["power law"], 300, 400).double()
    assert truncated_svd(delta, RankChoice(rank=8), method="randomized").u.dtype == torch.float64


@given(st.floats(1e-6, 1e6), st.integers(0, 5))
def test_scaling_law(factor: float, seed: int) -> None:
    """svd(c·ΔW) has c·σ and the same error."""
    delta = known(SPECTRA["power law"][:40], 40, 60, seed)
    one, scaled = (truncated_svd(d, RankChoice(rank=5)) for d in (delta, factor * delta))
    torch.testing.assert_close(scaled.s, factor * one.s, rtol=1e-4, atol=0)
    assert scaled.error == pytest.approx(one.error, rel=1e-3)


@given(st.integers(0, 20))
def test_transposition(seed: int) -> None:
    """svd(ΔWᵀ) is svd(ΔW) with U and V exchanged: the same σ and the same product."""
    delta = known(SPECTRA["fast decay"], 260, 300, seed)
    one, other = (truncated_svd(d, RankChoice(rank=6), method="randomized") for d in (delta, delta.T.contiguous()))
    product = (one.u * one.s.float()) @ one.vt
    torch.testing.assert_close(((other.u * other.s.float()) @ other.vt).T, product, atol=2e-3, rtol=0)


def test_not_finite_is_named() -> None:
    """NaN and infinity stop the work with a reason instead of an endless iteration."""
    for bad in (math.nan, math.inf):
        delta = torch.zeros(300, 300)
        delta[3, 4] = bad
        with pytest.raises(SurgeryError, match="not finite"):
            truncated_svd(delta, RankChoice(rank=4))


def test_exhausted_basis_is_noticed() -> None:
    """Once the basis holds the whole range, a step says so."""
    basis = BlockKrylov(known(SPECTRA["rank-deficient"], 256, 300), 16, seed=0)
    assert [basis.step(), basis.step()] == [False, True]


def test_residual_is_measured_from_stored_factors() -> None:
    """The stated error is that of the bfloat16 factors, not of their float32 origin."""
    delta = known(SPECTRA["rank-deficient"], 300, 400)
    found = exact_svd(delta).truncate(10)
    root = found.s.sqrt().float()
    update = LowRank((found.u * root).bfloat16(), (root[:, None] * found.vt).bfloat16())
    expected = float((delta.double() - update.up.double() @ update.down.double()).norm())
    assert residual_norm(delta, update) == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3 * float(delta.norm())


@pytest.mark.parametrize("spectrum", ["slow decay", "power law", "flat"])
def test_passes_do_not_depend_on_the_scale(spectrum: str) -> None:
    """A power of two before ΔW changes no bit of what follows from it, and so not when the iteration stops."""
    delta = known(SPECTRA[spectrum], 600, 500)
    found = [
        randomized_svd(delta * 2.0**n, RankChoice(rank=16), squared_norm(delta * 2.0**n)) for n in (-30, -3, 0, 3, 30)
    ]
    passes = {one.passes for one in found if one}
    assert None not in found
    assert len(passes) == 1
    assert passes.pop() <= 6, "far from all that there could be"


@pytest.mark.parametrize(
    ("bad", "said"),
    [({}, "give exactly one of"), ({"rank": 1, "energy": 0.5}, "give exactly one of"), ({"rank": 0}, "rank=0"),
     ({"energy": 0.0}, "energy=0.0"), ({"energy": 1.5}, "energy=1.5"), ({"energy": math.nan}, "energy nan"),
     ({"tolerance": 1.0}, "tolerance=1.0"), ({"tolerance": -0.1}, "tolerance=-0.1"), ({"tolerance": math.nan}, "tolerance nan"),
     ({"rank": 4, "max_rank": 0}, "max_rank=0")],
)  # fmt: skip
def test_senseless_choices_are_usage_errors(bad: dict[str, float], said: str) -> None:
    """No rule, two rules or a value out of range is refused before any work."""
    with pytest.raises(UsageError, match=f"^{said}"):
        RankChoice(**bad)


@pytest.mark.parametrize("rows", [1, 5, 16, 20, 40, 100])
@pytest.mark.parametrize("rank", [4, 8, 30])
@pytest.mark.parametrize("turned", [False, True])
def test_a_few_rows_that_changed(rows: int, rank: int, turned: bool) -> None:
    """A difference in a few rows only, as of an embedding with new tokens: the basis stays orthonormal, the error true.

    Once the basis holds all of those rows, what a pass adds is rounding within the same rows: nothing to keep.
    """
    generator = torch.Generator().manual_seed(rows)
    delta = torch.zeros(600, 2048)
    delta[torch.randperm(600, generator=generator)[:rows]] = torch.randn(rows, 2048, generator=generator)
    delta = delta.mT.contiguous() if turned else delta
    found = truncated_svd(delta, RankChoice(rank=rank), method="randomized")
    assert len(found.s) == min(rank, rows)
    u = found.u.double()
    assert (u.mT @ u - torch.eye(len(found.s))).abs().max() < 1e-5
    best = torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt() / delta.double().norm()
    rest = (delta.double() - u * found.s @ found.vt.double()).norm() / delta.double().norm()
    assert abs(found.error - rest) < 5e-4  # of √(float32's precision), where the error is 0
    assert rest <= best * 1.0005 + 1e-6
