"""Sketches of a matrix in bfloat16: their products, their bits, and what they cost in error against LAPACK."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_svd import known, measured, optimum
from torch import Tensor

from lorasurgery.engine import runtime
from lorasurgery.engine.threads import thread_pool
from lorasurgery.linalg import blocks
from lorasurgery.linalg import krylov as coarse
from lorasurgery.linalg.blocks import InMemory, Streamed
from lorasurgery.linalg.krylov import LEAST, Coarse
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import truncated_svd
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction import decompose as extraction
from lorasurgery.report import Report

SHAPES = {"wide": (300, 2500), "tall": (2500, 300), "few rows": (7, 5000), "one": (1, 1)}


def rounded(matrix: Tensor) -> InMemory:
    return InMemory(matrix, rounded=matrix.to(torch.bfloat16))


def streamed(matrix: Tensor, room: int) -> Streamed:
    return Streamed(
        lambda rows: matrix[rows].clone(), tuple(matrix.shape), matrix.dtype, matrix.device, room, coarse=True
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1 << 18)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: str) -> None:
    """Both products are those of the rounded matrices, to bfloat16's rounding of their sums."""
    m, n = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    a, x, y = (torch.randn(s, generator=generator) for s in ((m, n), (n, 20), (m, 20)))
    exact_a, exact_x, exact_y = (t.to(torch.bfloat16).double() for t in (a, x, y))
    for found, exact in (
        (Coarse(rounded(a)).times(x), exact_a @ exact_x),
        (Coarse(rounded(a)).transposed_times(y), exact_a.mT @ exact_y),
    ):
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        assert float((found - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_bits(shape: str, threads: int) -> None:
    """The same bits whether the rounded copy is there or rows are made again, few or many, for any number of threads."""
    delta = known(torch.arange(1, 301).double() ** -0.5, *SHAPES[shape])
    expected = truncated_svd(rounded(delta), RankChoice(rank=32))
    with thread_pool(threads):
        for matrix in (rounded(delta), streamed(delta, 1), streamed(delta, 1 << 21)):
            found = truncated_svd(matrix, RankChoice(rank=32))
            assert torch.equal(found.u, expected.u)
            assert torch.equal(found.vt, expected.vt)
            assert torch.equal(found.s, expected.s)


@pytest.mark.parametrize("noise", [0.12, 0.2, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_error(shape: str, noise: float) -> None:
    """From LEAST on, rounding adds less than 0.02% to the error, whatever the spectrum falls off to."""
    m, n = 900, 600 if shape == "tall" else 1500
    signal = known(torch.arange(1, 129).double() ** -1.0, m, n)
    other = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    delta = signal + other * (noise * signal.norm() / other.norm())
    exact, narrow = (truncated_svd(d, RankChoice(rank=32)) for d in (InMemory(delta), rounded(delta)))
    least = optimum(delta, 32)
    assert least > LEAST
    assert not torch.equal(exact.u, narrow.u)
    assert measured(delta, narrow) < 1.0002 * measured(delta, exact)
    assert measured(delta, narrow) < 1.001 * least


@pytest.mark.parametrize("count", [8, 31])
def test_too_close(count: int) -> None:
    """A matrix that the rank nearly holds is taken apart in float32 as if there were no rounded copy."""
    delta = known(0.9 ** torch.arange(count).double(), 900, 700)
    delta += 1e-4 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)) * delta.abs().mean()
    exact, found = (truncated_svd(d, RankChoice(rank=32)) for d in (InMemory(delta), rounded(delta)))
    assert torch.equal(found.u, exact.u)
    assert torch.equal(found.s, exact.s)
    assert found.error < LEAST


@pytest.mark.parametrize("choice", [RankChoice(energy=0.5), RankChoice(tolerance=0.7)], ids=["energy", "tolerance"])
def test_energies_that_choose_are_exact(choice: RankChoice) -> None:
    """Where energies choose the rank, and where `randomized` is asked for, nothing is rounded."""
    delta = known(torch.arange(1, 301).double() ** -0.5, 900, 700)
    for method, rule in (("auto", choice), ("randomized", RankChoice(rank=32))):
        exact, found = (truncated_svd(d, rule, method=method) for d in (InMemory(delta), rounded(delta)))
        assert torch.equal(found.u, exact.u)


def test_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor made for it, an adapter of a given rank is as good to 0.02%, and every other one is the same."""
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.0.mlp.{n}.weight": torch.randn(s, generator=generator).bfloat16()
            for n, s in (("up_proj", (1200, 500)), ("down_proj", (500, 1200)))}  # fmt: skip
    spectrum = torch.arange(1, 400).double() ** -0.8
    tuned = {n: (w.float() + 20 * known(spectrum, *w.shape)).bfloat16() for n, w in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")

    monkeypatch.setattr(runtime, "LEAST_MEMORY", 1)

    def run(fast: bool, options: ExtractOptions, **more: int) -> tuple[Report, bytes]:
        monkeypatch.setattr(extraction, "pays", lambda _: fast)
        report = extract(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", options, overwrite=True,
            device="cpu", **more,
        )  # fmt: skip
        return report, (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    (plain, before), (fast, after) = (run(f, ExtractOptions(RankChoice(rank=48))) for f in (False, True))
    assert before != after
    for slow, quick in zip(plain.modules, fast.modules, strict=True):
        assert quick.error == pytest.approx(slow.error, rel=2e-4)
    assert run(True, ExtractOptions(RankChoice(rank=48)), memory_limit=1_000_000)[1] == after
    assert run(True, ExtractOptions(RankChoice(rank=48), svd="randomized"))[1] == before
    energy = ExtractOptions(RankChoice(energy=0.6))
    assert run(True, energy)[1] == run(False, energy)[1]


def test_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that has tiles for it, and never on another device; a torch that can't tell counts as no."""
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles, raising=False)
        assert coarse.pays.__wrapped__(torch.device("cpu")) is (tiles and torch.backends.mkldnn.is_available())
        assert not coarse.pays.__wrapped__(torch.device("cuda"))
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not coarse.pays.__wrapped__(torch.device("cpu"))
