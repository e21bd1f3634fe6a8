"""diff and inspect --spectrum against dense float64 linear algebra."""

from __future__ import annotations

import math
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasurgery.errors import MismatchError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.diff import diff
from lorasurgery.ops.inspect import RANKS, inspect
from lorasurgery.report import Comparison, Spectrum


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters that differ in rank, scaling and modules."""
    root = tmp_path_factory.mktemp("pair")
    models.peft_adapter("llama", root / "a", r=4, lora_alpha=16, target_modules=["q_proj", "down_proj", "embed_tokens"])
    models.peft_adapter(
        "llama", root / "b", seed=2, r=6, use_rslora=True, target_modules=["q_proj", "up_proj", "embed_tokens"]
    )
    return root / "a", root / "b"


def test_diff_is_the_dense_one(pair: tuple[Path, Path]) -> None:
    """Cosine, norms and principal angles by module, and the totals over all of them."""
    a, b = (models.peft_deltas("llama", p) for p in pair)
    report = diff(*pair)
    assert {m.name for m in report.modules} == a.keys() | b.keys()
    for m in report.modules:
        assert isinstance(m, Comparison)
        one, two = a.get(m.name), b.get(m.name)
        assert m.norm_a == pytest.approx(float(one.norm()) if one is not None else 0.0, rel=1e-6)
        assert m.norm_b == pytest.approx(float(two.norm()) if two is not None else 0.0, rel=1e-6)
        if one is None or two is None:
            assert m.cosine is None
            assert m.overlap is None
            continue
        assert m.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-7)
        if "embed" in m.name:  # in PEFT's orientation the outputs are the embedding's dimensions
            one, two = one.mT, two.mT
        qa, qb = torch.linalg.svd(one).U[:, :4], torch.linalg.svd(two).U[:, :6]
        cosines = torch.linalg.svdvals(qa.mT @ qb)
        assert m.overlap == pytest.approx(float(cosines.square().mean()), rel=1e-5)
        assert m.angles == pytest.approx([math.degrees(math.acos(min(1.0, c))) for c in cosines.tolist()], abs=1e-3)
        assert m.chance == pytest.approx(6 / one.shape[0])
    dot = sum(float((a[n] * b[n]).sum()) for n in a.keys() & b.keys())
    norms = [math.sqrt(sum(float(d.square().sum()) for d in x.values())) for x in (a, b)]
    assert report.totals["cosine"] == pytest.approx(dot / norms[0] / norms[1], abs=1e-7)
    assert report.totals["norm_ratio"] == pytest.approx(norms[1] / norms[0], rel=1e-6)
    assert (report.totals["shared"], report.totals["only_a"], report.totals["only_b"]) == (3, 2, 2)


def test_diff_of_relatives(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Itself: cosine 1, angles 0. Its negative: −1, and the summary says that they fight."""
    same = diff(pair[0], pair[0])
    assert same.totals["cosine"] == pytest.approx(1.0)
    assert all(max(m.angles or [90]) < 0.01 for m in same.modules if isinstance(m, Comparison))
    blend([pair[0]], tmp_path / "minus", BlendOptions(weights=[-2.0]))
    against = diff(pair[0], tmp_path / "minus")
    assert against.totals["cosine"] == pytest.approx(-1.0)
    assert against.totals["norm_ratio"] == pytest.approx(2.0)
    assert "against each other in 5" in against.summary
    rerank(pair[0], tmp_path / "two", RankChoice(rank=2))
    inside = diff(pair[0], tmp_path / "two")
    assert inside.totals["overlap"] == pytest.approx(1.0, abs=1e-6)  # a truncation lies within


def test_diff_of_strangers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """No module in common is said plainly; different shapes are an error."""
    models.peft_adapter("llama", tmp_path / "v", r=2, target_modules=["v_proj"])
    report = diff(pair[0], tmp_path / "v")
    assert report.totals["shared"] == 0
    assert "share no module" in report.summary
    tensors = load_file(tmp_path / "v/adapter_model.safetensors")
    renamed = {k.replace("v_proj", "q_proj"): v for k, v in tensors.items()}
    save_file(renamed, tmp_path / "v/adapter_model.safetensors")
    with pytest.raises(MismatchError, match="different base models"):
        diff(pair[0], tmp_path / "v")


def test_spectrum_is_the_dense_one(pair: tuple[Path, Path]) -> None:
    """Singular values, effective rank by entropy, stable rank and energies."""
    dense = models.peft_deltas("llama", pair[1])
    report = inspect(pair[1], spectrum=True)
    assert {m.name for m in report.modules} == dense.keys()
    kept = dict.fromkeys(RANKS, 0.0)
    for m in report.modules:
        assert isinstance(m, Spectrum)
        s = torch.linalg.svdvals(dense[m.name])[:6]
        assert m.singular_values == pytest.approx(s.tolist(), rel=1e-5)
        share = s / s.sum()
        assert m.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
        assert m.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-5)
        for rank in RANKS:
            energy = float(s[:rank].square().sum())
            assert m.energy_at[rank] == pytest.approx(energy / float(s.square().sum()), rel=1e-6)
            kept[rank] += energy
    total = sum(float(d.square().sum()) for d in dense.values())
    assert report.totals["energy_at"] == pytest.approx({r: e / total for r, e in kept.items()}, rel=1e-6)


def test_inspect_tells_what_it_is(pair: tuple[Path, Path]) -> None:
    """Format, scaling, ranks, sizes, from headers."""
    report = inspect(pair[1])
    assert report.totals["rslora"] is True
    assert (report.totals["rank_min"], report.totals["rank_max"]) == (6, 6)
    assert report.totals["parameters"] == sum(
        v.numel() for v in load_file(pair[1] / "adapter_model.safetensors").values()
    )
    assert "rsLoRA" in report.summary
    assert report.bytes_read == 0


def test_a_fresh_adapter_has_no_spectrum(tmp_path: Path) -> None:
    """B is zero at first: no singular values, and nothing divides by zero."""
    models.peft_adapter("llama", tmp_path, r=2, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    report = inspect(tmp_path, spectrum=True)
    assert all(isinstance(m, Spectrum) and m.singular_values == [] for m in report.modules)
    assert diff(tmp_path, tmp_path).totals["cosine"] is None
