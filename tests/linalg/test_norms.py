"""Norms of a few numbers, and of none."""

from __future__ import annotations

import pytest
import torch

from lorasurgery.linalg.norms import norm_of


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_the_norm_of_no_numbers_is_0(shape: tuple[int, ...]) -> None:
    """A tensor may have no elements, and then there is no largest one either."""
    assert norm_of(torch.empty(shape)) == 0


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1.0, 1e20, 3e38])
def test_the_norm_is_that_of_float64(size: float) -> None:
    """However large or small the numbers are, to float32's precision."""
    values = size * torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert norm_of(values) == pytest.approx(float(values.double().norm()), rel=1e-6, abs=0)
