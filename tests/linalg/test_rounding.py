"""One rounding, nearest or stochastic, and the report of what survives it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rounding import Survival, _dot, add_updates, round_to
from lorasurgery.lowrank import LowRank

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def example(rows: int = 300, columns: int = 400, size: float = 0.02, rank: int = 8) -> tuple[torch.Tensor, LowRank]:
    """A bfloat16 weight and an update whose norm is `size` of the weight's."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=g).to(torch.bfloat16)
    up, down = torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g)
    return weight, LowRank(up, down, size / rank**0.5)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_nearest_is_torchs_cast(dtype: torch.dtype) -> None:
    """Within range, rounding to nearest is torch's own cast, to the bit."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_to(x, dtype).float(), x.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW[2:])
def test_eight_bit_floats_saturate(dtype: torch.dtype) -> None:
    """Beyond the largest value an 8-bit float holds its largest value, never NaN or infinity."""
    top = torch.finfo(dtype).max
    assert round_to(torch.tensor([1e9, -1e9]), dtype).float().tolist() == [top, -top]


@pytest.mark.parametrize("dtype", NARROW)
@given(st.floats(-400, 400, width=32))
def test_stochastic_takes_a_neighbour(dtype: torch.dtype, value: float) -> None:
    """Stochastic rounding gives the nearest value or the one on the other side of x, and x itself when it fits."""
    x = torch.full((64,), value)
    near = x.to(dtype).float()
    drawn = round_to(x, dtype, torch.Generator().manual_seed(1)).float()
    gap = (drawn - near).abs()
    assert bool(torch.isfinite(drawn).all())
    assert bool(((drawn - x).sign() * (near - x).sign() <= 0)[gap > 0].all())
    if float(near[0]) == value:
        assert torch.equal(drawn, near)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [0.3, -0.7, 3.1e-3, -1e-3, 100.3])
def test_stochastic_is_unbiased(dtype: torch.dtype, value: float) -> None:
    """The mean over many draws is x, within five standard errors."""
    n = 200_000
    x = torch.full((n,), value)
    drawn = round_to(x, dtype, torch.Generator().manual_seed(2)).double()
    spread = float(drawn.std()) / n**0.5
    assert abs(float(drawn.mean()) - float(x[0])) <= 5 * spread + 1e-9 * abs(value)


@pytest.mark.parametrize("size", [0.002, 0.02, 1.0])
def test_sum_is_the_float64_reference_rounded_once(size: float) -> None:
    """At least 99.99% of bfloat16 elements are the float64 sum rounded once, for small and large updates."""
    weight, update = example(1024, 1024, size)
    out, _ = add_updates(weight, [update], torch.bfloat16)
    reference = (weight.double() + update.scale * (update.up.double() @ update.down.double())).to(torch.bfloat16)
    assert float((out == reference).double().mean()) >= 0.9999


def test_small_update_in_bfloat16_drowns_in_noise() -> None:
    """An update of 0.2% of a Gaussian bfloat16 weight's norm meets rounding noise of 61% of its own: half is kept."""
    weight, update = example(1024, 1024, 0.002)
    _, survival = add_updates(weight, [update], torch.bfloat16)
    assert survival.noise == pytest.approx(0.61, abs=0.03)
    assert survival.retention < 0.9  # the bound below which merge warns


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_survival_is_what_its_formulas_say(rounding: str) -> None:
    """Retention is ⟨D,Δ⟩/‖Δ‖² and noise ‖D−Δ‖/‖Δ‖ with D = round(W+Δ) − W, by float64 arithmetic."""
    weight, update = example()
    out, survival = add_updates(weight, [update], torch.bfloat16, rounding=rounding, seed=5)  # type: ignore[arg-type]
    d = out.double() - weight.double()
    delta = update.scale * (update.up.double() @ update.down.double())
    assert survival.retention == pytest.approx(float((d * delta).sum() / delta.square().sum()), rel=1e-4)
    assert survival.noise == pytest.approx(float((d - delta).norm() / delta.norm()), rel=1e-4)
    assert survival.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_several_updates_and_transposed_factors() -> None:
    """Updates of different rank, sign and orientation add up; factors may be transposed views."""
    weight, update = example()
    other = LowRank(torch.randn(2, 300).T, torch.randn(400, 2).T, -0.5)
    out, _ = add_updates(weight.float(), [update, other], torch.float32)
    torch.testing.assert_close(out, weight.float() + update.dense() + other.dense(), atol=1e-5, rtol=1e-5)


def test_the_weight_is_not_written_to() -> None:
    """Inputs stay as they are, in float32 too, where a cast would be a view."""
    weight = torch.ones(4, 4)
    add_updates(weight, [LowRank(torch.ones(4, 1), torch.ones(1, 4))], torch.float32)
    assert torch.equal(weight, torch.ones(4, 4))


def test_overflow_is_an_error() -> None:
    """A sum beyond float16 is refused with the dtype that holds it, instead of becoming infinity."""
    weight = torch.full((2, 2), 60000.0, dtype=torch.float16)
    with pytest.raises(SurgeryError, match="bfloat16"):
        add_updates(weight, [LowRank(torch.ones(2, 1), torch.full((1, 2), 60000.0))], torch.float16)


def test_nothing_to_add_survives_whole() -> None:
    """Without an update nothing is lost: retention 1, noise 0."""
    assert (Survival(0, 0, 0).retention, Survival(0, 0, 0).noise) == (1.0, 0.0)


@pytest.mark.parametrize(("size", "dtypes"), [(1.0, ["float32"]), (0.0, ["float32"]), (1e-30, ["float32", "float64"])])
def test_products_are_formed_again_only_where_they_leave_the_dtype(
    size: float, dtypes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products too small for float32 are told in float64; where all is well, or zero, one pass is enough."""
    taken, dot = [], torch.dot

    def noted(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        taken.append(str(one.dtype).removeprefix("torch."))
        return dot(one, two)

    monkeypatch.setattr(torch, "dot", noted)
    values = torch.full((2, 2), size)
    assert _dot(values, values) == pytest.approx(4 * size**2, rel=1e-6, abs=0)
    assert taken == dtypes
