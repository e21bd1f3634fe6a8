"""Batched SVDs by Gram matrices against LAPACK in float64, and against the decomposition of each matrix alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, batched_svd, exact_svd, squared_norms, truncated_svd

SHAPES = {"square": (48, 48), "tall": (90, 40), "wide": (33, 120), "row": (1, 20), "column": (20, 1), "one": (1, 1)}
CHOICES = {
    "rank": RankChoice(rank=7),
    "energy": RankChoice(energy=0.9),
    "tolerance": RankChoice(tolerance=0.05),
    "capped": RankChoice(tolerance=0.0, max_rank=5),
}


def stack(rows: int, columns: int, count: int = 4, seed: int = 0, decay: float = 1.0) -> Tensor:
    """Matrices with σᵢ ~ i^−decay, each at its own scale, in float32."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u, v = (
        torch.linalg.qr(torch.randn(count, n, k, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    scales = 10.0 ** torch.arange(count)[:, None, None]
    return (scales * (u * torch.arange(1, k + 1) ** -decay) @ v.mT).float()


def graded(k: int, digits: float) -> Tensor:
    """One matrix (2k, k) whose singular values fall by so many digits, in float64."""
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in (2 * k, k))
    return (u * 10 ** torch.linspace(0, -digits, k, dtype=torch.float64)) @ v.mT


def measured(delta: Tensor, found: TruncatedSVD) -> float:
    """‖ΔW − USVᵀ‖/‖ΔW‖ in float64."""
    d = delta.double()
    return float((d - (found.u.double() * found.s) @ found.vt.double()).norm() / d.norm())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_lapack_in_float64(shape: str, choice: str) -> None:
    """Rank, singular values and error are those of float64's full SVD; dtypes and shapes are as promised."""
    deltas = stack(*SHAPES[shape])
    for delta, found in zip(deltas, batched_svd(deltas, CHOICES[choice]), strict=True):
        exact = np.linalg.svd(delta.double().numpy(), compute_uv=False)
        assert len(found.s) == CHOICES[choice].choose((exact**2).tolist(), float((exact**2).sum()))
        np.testing.assert_allclose(found.s.numpy(), exact[: len(found.s)], rtol=1e-10)
        optimum = math.sqrt((exact[len(found.s) :] ** 2).sum() / (exact**2).sum())
        assert measured(delta, found) == pytest.approx(optimum, rel=1e-6, abs=3e-7)
        assert found.error == pytest.approx(optimum, rel=1e-6, abs=3e-7)
        assert (found.u.dtype, found.s.dtype, found.vt.dtype) == (torch.float32, torch.float64, torch.float32)
        assert (found.u.shape[0], found.vt.shape[1]) == SHAPES[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_each_matrix_alone(shape: str) -> None:
    """The same rank, singular values and projection as LAPACK in float32 and as truncated_svd give one by one."""
    deltas = stack(*SHAPES[shape])
    for delta, found in zip(deltas, batched_svd(deltas, CHOICES["rank"]), strict=True):
        rank = len(found.s)
        exact, alone = exact_svd(delta).truncate(rank), truncated_svd(delta, CHOICES["rank"], method="exact")
        assert len(alone.s) == rank
        torch.testing.assert_close(found.s, exact.s, rtol=1e-6, atol=1e-6 * float(exact.s[0]))
        assert measured(delta, found) == pytest.approx(measured(delta, exact), abs=1e-6)
        product = (found.u * found.s.float()) @ found.vt
        torch.testing.assert_close(
            product, (exact.u * exact.s.float()) @ exact.vt, rtol=0, atol=1e-5 * float(exact.s[0])
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_orthonormal(shape: str) -> None:
    """U and V have orthonormal columns to 1e-5, whichever of them came from the eigenvectors."""
    for found in batched_svd(stack(*SHAPES[shape]), RankChoice(tolerance=0.0)):
        eye = torch.eye(len(found.s))
        torch.testing.assert_close(found.u.T @ found.u, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.vt @ found.vt.T, eye, atol=1e-5, rtol=0)


def test_zero_and_rank_deficient_matrices_of_a_batch() -> None:
    """Each matrix has its own rank: zero has 0, what is missing is not made up, and the neighbours don't notice."""
    deltas = stack(30, 50, count=5)
    deltas[1] = 0
    deltas[3] = deltas[3][:, :3] @ deltas[3][:3]
    found = batched_svd(deltas, RankChoice(rank=8))
    assert [len(f.s) for f in found] == [8, 0, 8, 3, 8]
    assert (found[1].error, found[1].total, tuple(found[1].u.shape), tuple(found[1].vt.shape)) == (
        0,
        0,
        (30, 0),
        (0, 50),
    )
    assert measured(deltas[3], found[3]) < 1e-6
    for i in (0, 2, 4):
        assert found[i].error == pytest.approx(truncated_svd(deltas[i], RankChoice(rank=8)).error, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_named(bad: float) -> None:
    """NaN and infinity anywhere in the batch stop it, in the words of truncated_svd."""
    deltas = stack(20, 30)
    deltas[2, 3, 4] = bad
    with pytest.raises(SurgeryError, match="holds NaN or infinity") as alone:
        truncated_svd(deltas[2], RankChoice(rank=2))
    with pytest.raises(SurgeryError, match=str(alone.value)):
        batched_svd(deltas, RankChoice(rank=2))


@pytest.mark.parametrize("digits", [3, 6, 8])
def test_a_graded_tail_is_seen_as_far_as_float32_goes(digits: float) -> None:
    """What a Gram matrix in float64 tells is all that float32 data has: ranks and σ down to the noise are LAPACK's."""
    delta = graded(40, digits).float()
    (found,) = batched_svd(delta[None], RankChoice(tolerance=0.0))
    exact = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    above = int((exact > torch.finfo(torch.float32).eps * math.sqrt(80) * exact[0]).sum())
    whole = RankChoice(tolerance=0.0).choose((exact**2).tolist(), float((exact**2).sum()))
    assert len(found.s) == min(above, whole or above)
    np.testing.assert_allclose(found.s.numpy(), exact[: len(found.s)], rtol=1e-4)
    (fixed,) = batched_svd(delta[None], RankChoice(rank=40))
    assert len(fixed.s) == above
    np.testing.assert_allclose(fixed.s.numpy(), exact[:above], rtol=1e-3)
    assert measured(delta, fixed) < 1e-6


def test_double_precision_stays_double() -> None:
    """Float64 data keep what a Gram matrix would lose: a tail of 12 digits, orthonormal."""
    delta = graded(30, 12)
    (found,) = batched_svd(delta[None], RankChoice(rank=30))
    assert found.u.dtype == torch.float64
    torch.testing.assert_close(found.s, torch.linalg.svdvals(delta), rtol=1e-2, atol=0)
    torch.testing.assert_close(found.vt @ found.vt.T, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_batch_of_one_is_as_any_other() -> None:
    """One matrix, and the same among others, come out alike."""
    deltas = stack(40, 60)
    (alone,), among = batched_svd(deltas[2:3], RankChoice(rank=5)), batched_svd(deltas, RankChoice(rank=5))[2]
    torch.testing.assert_close(alone.s, among.s, rtol=1e-12, atol=0)
    torch.testing.assert_close(alone.u @ alone.u.T, among.u @ among.u.T)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_at_the_ends_of_float32(size: float) -> None:
    """Squares that float32 can't hold are no matter in float64."""
    delta = stack(20, 30, count=1) * size
    (found,) = batched_svd(delta, RankChoice(rank=20))
    assert len(found.s) == 20
    assert measured(delta, found) < 1e-6


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 24),
    st.floats(0.0, 3.0),
    st.integers(0, 99),
)
def test_the_error_by_pythagoras_is_the_measured_one(
    rows: int, columns: int, count: int, rank: int, decay: float, seed: int
) -> None:
    """‖ΔW‖² − Σσ² is what is left, to float32's rounding, whatever shape, rank and spectrum."""
    deltas = stack(rows, columns, count, seed, decay)
    found = batched_svd(deltas, RankChoice(rank=rank))
    assert [f.total for f in found] == pytest.approx(squared_norms(deltas.double()))
    for delta, one in zip(deltas, found, strict=True):
        assert measured(delta, one) ** 2 == pytest.approx(one.error**2, rel=1e-5, abs=1e-12)
        assert one.s.tolist() == sorted(one.s.tolist(), reverse=True)
