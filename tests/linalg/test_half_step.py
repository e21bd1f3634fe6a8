"""Which pairs of tensors are roundings of the same numbers: torch's casts are the oracle."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lorasurgery.linalg.rounding import same_but_rounded

NARROW = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
          torch.float8_e5m2fnuz]  # fmt: skip
VALUES = st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=20)


def finite(dtype: torch.dtype) -> Tensor:
    """The non-negative finite values of an 8 or 16 bit dtype, from zero up, in float32."""
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    values = torch.arange(1 << (8 * dtype.itemsize - 1)).to(bits).view(dtype).float()
    return values[values.isfinite()]


def wide(dtypes: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def alike(a: Tensor, b: Tensor) -> bool:
    """same_but_rounded of two tensors as they are stored."""
    dtypes = a.dtype, b.dtype
    return same_but_rounded(a.to(wide(dtypes)), b.to(wide(dtypes)), dtypes)


@pytest.mark.parametrize("dtype", NARROW)
@given(values=VALUES, scale=st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]))
@settings(max_examples=60, deadline=None)
def test_a_cast_is_rounding(dtype: torch.dtype, values: list[float], scale: float) -> None:
    """Whatever is cast to any narrower dtype, subnormals and zeros too, differs by rounding, seen from either side."""
    for x in (torch.tensor(values, dtype=torch.float64) * scale, torch.tensor(values) * scale):
        y = x.to(dtype)
        if x.dtype == dtype or not y.double().isfinite().all():
            continue
        assert alike(x, y)
        assert alike(y, x)


@pytest.mark.parametrize("dtype", [d for d in NARROW if d.itemsize <= 2])
def test_exactly_the_values_that_are_cast_to_it(dtype: torch.dtype) -> None:
    """Of every value of a dtype: up to half-way to its neighbours is rounding, the next float32 beyond is not."""
    values = finite(dtype)
    for low, high in itertools.pairwise(values) if dtype.itemsize == 1 else sampled(values):
        middle = low + (high - low) / 2
        below, above = (torch.nextafter(middle, end) for end in (low, high))
        assert below.to(dtype) == low.to(dtype)
        assert above.to(dtype) == high.to(dtype)
        for sign in (1, -1):
            one, other = (sign * low).to(dtype), (sign * high).to(dtype)
            assert alike(one, sign * below)
            assert alike(other, sign * above)
            assert alike(one, sign * middle)
            assert alike(other, sign * middle)
            assert not alike(one, sign * above)
            # next to zero, float32 can't tell: the distance itself is rounded to half-way
            assert low == 0 or not alike(other, sign * below)


def sampled(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Neighbours around every power of two, and some more."""
    exponents = torch.frexp(values).exponent
    edges = (exponents[1:] != exponents[:-1]).nonzero().flatten()
    places = torch.cat([edges, edges - 1, edges + 1, torch.arange(0, len(values) - 1, 997)]).clamp(0, len(values) - 2)
    return [(values[i], values[i + 1]) for i in places.unique().tolist()]


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_one_value_two_steps_off_is_a_change(narrow: torch.dtype, place: int) -> None:
    """A single value two steps away makes all of a tensor a change, wherever it stands."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    y = x.to(narrow)
    assert alike(x, y)
    y.view(torch.int16)[place] += 2
    assert not alike(x, y)


def test_two_roundings_of_one_weight() -> None:
    """float16 and bfloat16 made of one float32 tensor, though a cast of either gives the other nowhere near always."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 2, 200_000)
    a, b = x.half(), x.bfloat16()
    assert alike(a, b)
    assert alike(b, a)
    assert not torch.equal(a.bfloat16(), b)
    assert not torch.equal(b.half(), a)
    b.view(torch.int16)[150_000] += 2
    assert not alike(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5])
def test_what_is_not_finite_is_no_rounding(value: float) -> None:
    """NaN and infinity are never explained, not even where a cast that overflows makes them."""
    x = torch.tensor([1.0, value])
    assert not alike(x, x.half())


def test_opposite_signs() -> None:
    """Small numbers become zero of either sign, but never each other's negatives."""
    tiny = torch.tensor([2e-8])
    assert alike(tiny, -torch.zeros(1).half())
    assert not alike(-tiny, torch.tensor([6e-8]).half())
