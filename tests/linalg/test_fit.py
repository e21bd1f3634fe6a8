"""Factors as they are stored, one side fitted to the other, and the error that comes out of the same product."""

import math

import pytest
import torch
from torch import Tensor

from lorasurgery.linalg.blocks import InMemory, Streamed
from lorasurgery.linalg.fit import fitted
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import exact_svd, truncated_svd

SHAPES = {"wide": (1200, 2000), "tall": (2000, 1200), "small": (60, 90)}


def noisy(shape: tuple[int, int], noise: float = 0.3) -> Tensor:
    """Sixteen directions of falling size, and noise of a share of their norm."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(side, 16, generator=generator) for side in shape)
    signal = (up * torch.arange(1, 17) ** -0.8) @ down.mT
    rest = torch.randn(shape, generator=generator)
    return signal + noise * signal.norm() / rest.norm() * rest


def true_error(delta: Tensor, found: object) -> float:
    """‖ΔW − scale·up@down‖_F in float64."""
    update = found.update  # type: ignore[attr-defined]
    return float((delta.double() - update.scale * update.up.double() @ update.down.double()).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.05, 0.3, 3.0])
def test_the_stated_error_is_the_true_one(shape: str, dtype: torch.dtype, noise: float) -> None:
    """Of the factors as stored, to 1e-6 of itself and float32's floor, for errors from 0.1% to near 1."""
    delta = noisy(SHAPES[shape], noise)
    found = fitted(delta, truncated_svd(delta, RankChoice(rank=16)), 0.5, dtype)
    assert found.update.up.dtype == found.update.down.dtype == dtype
    assert found.error == pytest.approx(true_error(delta, found), rel=1e-6, abs=1e-6 * float(delta.norm()))


@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_pass_more(shape: str) -> None:
    """The fitted factors are never worse than the directions they came from, and better than rounding both sides."""
    delta = noisy(SHAPES[shape])
    start = truncated_svd(delta, RankChoice(rank=12), method="randomized", gain=1.0)
    assert fitted(delta, start, 1.0, torch.float32).error <= start.error * math.sqrt(start.total) * (1 + 1e-6)
    best = exact_svd(delta).truncate(12)
    root = best.s.sqrt().float()
    up, down = (best.u * root).bfloat16(), (root[:, None] * best.vt).bfloat16()
    rounded = float((delta.double() - up.double() @ down.double()).norm())
    assert fitted(delta, best, 1.0, torch.bfloat16).error < rounded


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_those_of_the_stored_directions(shape: str) -> None:
    """They fall, and what cutting the last directions costs adds up: ‖ΔW‖² − Σ squares is the squared error."""
    delta = noisy(SHAPES[shape])
    found = fitted(delta, truncated_svd(delta, RankChoice(rank=12)), 2.0, torch.float32)
    assert found.squares == sorted(found.squares, reverse=True)
    u = found.update
    sizes = 2.0 * u.up.double().norm(dim=0) * u.down.double().norm(dim=1)
    assert torch.tensor(found.squares).sqrt().tolist() == pytest.approx(sizes.tolist(), rel=1e-6)
    left = float(delta.double().square().sum()) - sum(found.squares)
    assert math.sqrt(left) == pytest.approx(found.error, rel=1e-5)


def test_a_matrix_in_spans_gives_the_same_bits() -> None:
    """Read again in spans, as under --memory-limit, the factors and the error are the same."""
    delta = noisy((3000, 1500))
    whole = fitted(InMemory(delta), truncated_svd(delta, RankChoice(rank=8)), 1.0, torch.float32)
    spans = Streamed(lambda rows: delta[rows].clone(), (3000, 1500), delta.dtype, delta.device, 1)
    parts = fitted(spans, truncated_svd(spans, RankChoice(rank=8)), 1.0, torch.float32)
    assert torch.equal(whole.update.up, parts.update.up)
    assert torch.equal(whole.update.down, parts.update.down)
    assert whole.error == parts.error


def test_numbers_that_are_small_because_there_are_many() -> None:
    """A long column's numbers may lie below float16's normal ones though its size does not: a power of two helps."""
    column = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    delta = torch.zeros(4096, 8)
    delta[:, 3] = 1.5e-8 * column / column.norm()
    found = fitted(delta, exact_svd(delta).truncate(1), 1.0, torch.float16)
    assert found.error == pytest.approx(true_error(delta, found), rel=1e-3)
    assert found.error < 3e-3 * float(delta.norm())


def test_a_direction_too_small_for_the_dtype() -> None:
    """float16 turns its column into zeros: the others are not harmed."""
    delta = torch.diag(torch.tensor([1.0, 1e-16]))
    found = fitted(delta, exact_svd(delta), 1.0, torch.float16)
    assert torch.isfinite(found.update.dense()).all()
    assert found.update.dense()[0, 0] == 1
