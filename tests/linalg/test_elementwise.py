"""TIES, DARE, pruning and KnOTS against PEFT's functions and against their definitions in float64."""

from __future__ import annotations

import pytest
import references
import torch
from peft.utils import merge_utils
from torch import Tensor

from lorasurgery.linalg import norms
from lorasurgery.linalg.elementwise import align, combine, knots_ties
from lorasurgery.linalg.methods import ELEMENTWISE, Elementwise
from lorasurgery.lowrank import LowRank

WEIGHTS = [[1.0, 1.0, 1.0], [0.7, 0.3, 1.4], [1.0, 0.2, 0.0]]


def terms(m: int = 40, n: int = 30, ranks: tuple[int, ...] = (4, 8, 3)) -> list[LowRank]:
    generator = torch.Generator().manual_seed(5)
    return [
        LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks, so that their seams are seen."""
    monkeypatch.setattr(norms, "_BLOCK_BYTES", 1200)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.93])
def test_ties_and_pruning_are_pefts(weights: list[float], density: float) -> None:
    """The same as peft.utils.merge_utils on the dense updates, which its `ties_svd` decomposes."""
    dense = [t.dense() for t in terms()]
    for method, function in (("ties", merge_utils.ties), ("magnitude-prune", merge_utils.magnitude_prune)):
        expected = function(dense, torch.tensor(weights), density)
        assert torch.allclose(combine(terms(), weights, method, density=density), expected, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ties", "magnitude-prune", "dare-ties", "dare-linear"])
def test_density_one_keeps_everything(method: Elementwise) -> None:
    """Nothing is pruned: the linear methods are the weighted sum, TIES only elects signs."""
    weights = [0.7, -0.3, 1.4]
    found = combine(terms(), weights, method, density=1.0)
    dense = [t.dense().double() * w for t, w in zip(terms(), weights, strict=True)]
    expected = reference_ties(dense) if method.endswith("ties") else sum(dense)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def reference_ties(signed: list[Tensor], sizes: list[float] | None = None) -> Tensor:
    """Elect signs by the unweighted total; mean of the weighted entries that agree."""
    sizes = sizes or [0.7, 0.3, 1.4]
    plain = torch.stack([s / w for s, w in zip(signed, sizes, strict=True)])
    elected = torch.where(plain.sum(0) >= 0, 1.0, -1.0).double()
    agree = (plain.sign() == elected).double()
    return (torch.stack(signed) * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_negative_weights_turn_signs_first() -> None:
    """A term with weight −w is the negated term with weight w, in every method."""
    a, b, c = terms()
    for method in ELEMENTWISE:
        one = combine([a, b, c], [1.0, -0.5, 1.0], method, density=0.6, seed=3)
        two = combine([a, b.times(-1.0), c], [1.0, 0.5, 1.0], method, density=0.6, seed=3)
        assert torch.equal(one, two)


def test_dare_is_seeded_and_unbiased() -> None:
    """The same seed gives the same bits; the mean over seeds is the weighted sum; about `density` survives."""
    weights, one = [0.7, -0.3, 1.4], terms()
    assert torch.equal(
        combine(one, weights, "dare-linear", density=0.3, seed=1),
        combine(one, weights, "dare-linear", density=0.3, seed=1),
    )
    draws = [combine(one, weights, "dare-linear", density=0.3, seed=100 * s) for s in range(400)]
    expected = sum(w * t.dense() for w, t in zip(weights, one, strict=True))
    spread = torch.stack(draws).std(0) / 20
    assert ((torch.stack(draws).mean(0) - expected).abs() < 5 * spread + 1e-6).all()
    kept = combine(one[:1], [1.0], "dare-linear", density=0.3, seed=1) != 0
    assert 0.25 < float(kept.float().mean()) < 0.35
    survivors = combine(one[:1], [1.0], "dare-linear", density=0.3, seed=1)[kept]
    assert torch.allclose(survivors, one[0].dense()[kept] / 0.3)


def test_dare_ties_is_ties_of_the_dropped() -> None:
    """Each single term's DARE draw, put through the election by hand."""
    parts, weights = terms(), [0.7, 0.3, 1.4]
    drawn = [combine([t], [1.0], "dare-linear", density=0.5, seed=7 + i).double() for i, t in enumerate(parts)]
    expected = reference_ties([d * w for d, w in zip(drawn, weights, strict=True)], weights)
    assert torch.allclose(combine(parts, weights, "dare-ties", density=0.5, seed=7).double(), expected, atol=1e-5)


def test_tiny_density_keeps_nothing() -> None:
    """⌊density·m·n⌋ = 0 entries."""
    assert not combine(terms(), [1.0, 1.0, 1.0], "ties", density=1e-4).any()


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.3, 1.4], [1.0, -0.5, 0.8]], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_knots_from_factors_is_knots_of_the_dense(weights: list[float], density: float) -> None:
    """Stoica et al. 2024, without the matrices."""
    expected = references.knots([t.dense() for t in terms()], weights, density)
    found = knots_ties(terms(), weights, density=density)
    assert found.rank == 15
    assert torch.allclose(found.dense().double(), expected, atol=2e-5 * float(expected.abs().max()))


def test_alignment_is_exact() -> None:
    """UΣ·Vᵢᵀ is each update again, and the stacked V is orthonormal."""
    shared, parts = align(terms())
    for part, term in zip(parts, terms(), strict=True):
        assert torch.allclose(shared @ part.dense().double(), term.dense().double(), atol=1e-5)
    v = torch.cat([p.up @ p.down for p in parts], 1)
    assert torch.allclose(v @ v.mT, torch.eye(len(v), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(shared.mT @ shared, torch.diag(torch.linalg.vector_norm(shared, dim=0) ** 2), atol=1e-8)


def test_one_adapter_with_everything_kept_is_itself() -> None:
    """At density 1 a single term passes through every method."""
    t = terms()[0]
    for method in ELEMENTWISE:
        assert torch.allclose(combine([t], [1.0], method, density=1.0), t.dense(), atol=1e-5)
    assert torch.allclose(knots_ties([t], [1.0], density=1.0).dense(), t.dense(), atol=1e-5)
