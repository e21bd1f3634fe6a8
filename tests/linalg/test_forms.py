"""Tucker, Hadamard and Kronecker products against their definitions in float64, and DoRA against LyCORIS's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris.functional.general import weight_decompose

from lorasurgery.linalg.dora import rescaled
from lorasurgery.linalg.forms import hadamard, hadamard_factors, kronecker, kronecker_factors, tucker
from lorasurgery.lowrank import Dense, LowRank

SIZE = st.integers(1, 7)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected).norm() <= 1e-6 * expected.norm())


@given(SIZE, SIZE, SIZE, SIZE, st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_tucker(m: int, n: int, out: int, into: int, kernel: list[int]) -> None:
    """up @ tucker(mid, down) is the sum over both ranks, which may differ, for kernels of one to three dimensions."""
    up, mid, down = noise(out, m), noise(m, n, *kernel), noise(n, into)
    expected = torch.einsum("im,mn...,nj->ij...", up.double(), mid.double(), down.double())
    assert close((up @ tucker(mid, down)).reshape(expected.shape), expected)


@given(SIZE, SIZE, SIZE, SIZE)
def test_hadamard(out: int, into: int, r1: int, r2: int) -> None:
    """The Khatri–Rao factors give the entrywise product of both matrices, scales aside."""
    one, two = LowRank(noise(out, r1), noise(r1, into)), LowRank(noise(out, r2, seed=1), noise(r2, into, seed=1))
    expected = (one.up.double() @ one.down.double()) * (two.up.double() @ two.down.double())
    factors = hadamard_factors(one, two)
    assert factors.rank == r1 * r2
    assert (factors.dense().double() - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    assert (hadamard(one, two).double() - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@given(SIZE, SIZE, SIZE, SIZE)
def test_kronecker(a: int, b: int, c: int, d: int) -> None:
    """The factors made of both halves' SVDs give the product, with columns in the order of falling σ."""
    left, right = noise(a, b), noise(c, d, seed=1)
    expected = torch.kron(left.double(), right.double())
    factors = kronecker_factors(left, right)
    assert close(factors.dense(), expected)
    assert close(kronecker(left, right), expected)
    assert factors.rank <= min(a, b) * min(c, d)
    sizes = factors.up.norm(dim=0) * factors.down.norm(dim=1)
    assert torch.allclose(sizes, torch.linalg.svdvals(expected).float()[: len(sizes)], rtol=1e-4, atol=1e-5)


def test_nothing_has_no_directions() -> None:
    """A half of zeros, as LyCORIS begins with, makes factors of rank 0 and a product of zeros."""
    factors = kronecker_factors(torch.zeros(2, 3), noise(4, 5))
    assert factors.rank == 0
    assert torch.equal(factors.dense(), torch.zeros(8, 15))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -0.3])
@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("kernel", [(), (3, 3), (2,)])
def test_dora_is_lycoris_own(kernel: tuple[int, ...], by_output: bool, strength: float) -> None:
    """By output and by input, for every strength, 0 (V itself) included."""
    weight, delta = noise(6, 6, *kernel).double(), noise(6, 6, *kernel, seed=1).double()
    shape = (6, *[1] * (1 + len(kernel))) if by_output else (1, 6, *[1] * len(kernel))
    magnitude = noise(*shape, seed=2).double().abs()
    expected = weight_decompose(weight + delta, magnitude, strength, by_output)
    found = rescaled(weight, Dense(delta.flatten(1)), magnitude, strength)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
