"""What blend and convert do to one module: the same from thin factors and from their product."""

from __future__ import annotations

import math

import pytest
import torch

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import EVERYTHING, RankChoice
from lorasurgery.linalg.truncate import core_of, to_store, truncated_core, truncated_matrix
from lorasurgery.lowrank import LowRank


def factors() -> LowRank:
    """A 24×17 update of rank 6, at a scale of 0.5."""
    random = torch.Generator().manual_seed(5)
    return LowRank(torch.randn(24, 6, generator=random), torch.randn(6, 17, generator=random), 0.5)


@pytest.mark.parametrize("choice", [RankChoice(rank=3), RankChoice(energy=0.9), RankChoice(tolerance=0.2)], ids=str)
def test_factors_and_their_product_give_the_same(choice: RankChoice) -> None:
    """Rank, norm and error of both are float64's, and so is what every smaller rank leaves."""
    update = factors()
    thin = truncated_core(core_of([update], choice), choice, (24, 17), torch.float32, stepwise=True)
    whole = truncated_matrix(update.dense(), choice, torch.float32, stepwise=True)
    exact = torch.linalg.svdvals(update.up.double() @ update.down.double() * update.scale)
    for made in (thin, whole):
        rank = made.update.rank
        assert rank == thin.update.rank < 6
        assert made.norm == pytest.approx(float(exact.norm()), rel=1e-6)
        assert made.error == pytest.approx(float(exact[rank:].norm()), rel=1e-5)
        assert made.left == pytest.approx([float(exact[r:].square().sum()) for r in range(rank + 1)], rel=1e-5)


def test_everything_is_the_rank_that_there_is() -> None:
    """Without a rule the factors lose nothing but float32's rounding."""
    made = truncated_core(core_of([factors()], EVERYTHING), EVERYTHING, (24, 17), torch.float32)
    assert made.update.rank == 6
    assert made.error < 1e-6 * made.norm


def test_what_is_not_finite_is_not_stored() -> None:
    """A norm or a factor that is NaN or infinite is said, not written."""
    update = factors()
    with pytest.raises(SurgeryError, match="NaN or infinity"):
        to_store(update, math.nan)
    with pytest.raises(SurgeryError, match="do not fit float32"):
        to_store(LowRank(update.up * math.inf, update.down), 1.0)
