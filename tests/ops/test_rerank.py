"""rerank against the SVD of the dense update that PEFT loads, and the factors that need not change."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from peft import PeftModel
from references import best
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 on all linear layers of a Llama, with rsLoRA and patterns."""
    path = tmp_path_factory.mktemp("adapter")
    models.peft_adapter(
        "llama", path, r=8, lora_alpha=12, use_rslora=True, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3},
        target_modules="all-linear",
    )  # fmt: skip
    return path


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_the_dense_truncation(family: str, rslora: bool, tmp_path: Path) -> None:
    """To 1e-5, for every family, embeddings included, with alpha/r and rsLoRA."""
    modules = {"bert": ["query", "word_embeddings"], "opt": ["q_proj", "fc1"], "t5": ["q", "wi"]}
    targets = modules.get(family, ["c_attn", "wte"] if family == "gpt2" else ["q_proj", "embed_tokens"])
    models.peft_adapter(family, tmp_path / "a", r=8, lora_alpha=4, use_rslora=rslora, target_modules=targets)
    report = rerank(tmp_path / "a", tmp_path / "out", RankChoice(rank=3))
    dense, found = (models.peft_deltas(family, tmp_path / n) for n in ("a", "out"))
    assert found.keys() == dense.keys()
    assert models.relative(found, {n: best(d, 3) for n, d in dense.items()}) < 1e-5
    for module in report.modules:
        s = torch.linalg.svdvals(dense[module.name])
        assert module.error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
        assert module.delta_norm == pytest.approx(float(s.norm()), rel=1e-6)


@pytest.mark.parametrize(
    "choice", [RankChoice(energy=0.8), RankChoice(tolerance=0.3), RankChoice(energy=0.95, max_rank=4)], ids=repr
)
def test_energy_and_tolerance(adapter: Path, tmp_path: Path, choice: RankChoice) -> None:
    """The least rank that keeps the promise, module by module; ranks and alphas reload from full-path patterns."""
    report = rerank(adapter, tmp_path / "out", choice)
    dense, found = models.peft_deltas("llama", adapter), models.peft_deltas("llama", tmp_path / "out")
    for module in report.modules:
        s = torch.linalg.svdvals(dense[module.name]).square()
        share = choice.energy if choice.energy is not None else 1 - choice.tolerance**2  # type: ignore[operator]
        expected = int((s.cumsum(0) < (share - 1e-12) * s.sum()).sum()) + 1
        assert module.rank == min(expected, choice.max_rank or 99)
        assert float((found[module.name] - best(dense[module.name], module.rank)).norm()) < 1e-4
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert all(key.startswith("model.layers.") for key in config["rank_pattern"])
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


def test_enough_rank_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    """A module that has no more directions than asked for keeps its factors to the bit, and its scale."""
    rerank(adapter, tmp_path / "out", RankChoice(rank=8))
    old, new = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    one, two = models.peft_deltas("llama", adapter), models.peft_deltas("llama", tmp_path / "out")
    assert models.relative(two, one) < 1e-6


def test_lossless_compression(adapter: Path, tmp_path: Path) -> None:
    """Without a rule: the minimal exact rank. A concatenation of an adapter with itself shrinks back."""
    blend([adapter, adapter], tmp_path / "cat", BlendOptions(method="cat", weights=[0.5, 0.5]))
    report = rerank(tmp_path / "cat", tmp_path / "out")
    assert {m.rank for m in report.modules} == {6, 8}
    found = models.peft_deltas("llama", tmp_path / "out")
    assert models.relative(found, models.peft_deltas("llama", adapter)) < 1e-5


@pytest.mark.parametrize("choice", [None, RankChoice(rank=5), RankChoice(energy=0.7)], ids=repr)
def test_uniform_rank(adapter: Path, tmp_path: Path, choice: RankChoice | None) -> None:
    """One rank, no patterns, zero padding: the same update as without."""
    report = rerank(adapter, tmp_path / "one", choice, uniform_rank=True)
    rerank(adapter, tmp_path / "two", choice)
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    assert {m.rank for m in report.modules} == {config["r"]}
    one, two = (models.peft_deltas("llama", tmp_path / n) for n in ("one", "two"))
    assert models.relative(one, two) < 1e-6
    assert config["alpha_pattern"] == {}
    assert config["lora_alpha"] == config["r"]


@pytest.mark.parametrize("budget", [Budget(share=0.5), Budget(size=9000), Budget(size=16_000)], ids=repr)
@pytest.mark.parametrize("uniform", [False, True])
def test_budget(adapter: Path, tmp_path: Path, budget: Budget, uniform: bool) -> None:
    """The file fits; its ranks are those that keep the most energy; modules without room leave the adapter."""
    choice = RankChoice(budget=budget)
    report = rerank(adapter, tmp_path / "out", choice, uniform_rank=uniform)
    allowed = report.totals["budget"]
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= allowed
    dense, found = models.peft_deltas("llama", adapter), models.peft_deltas("llama", tmp_path / "out")
    assert {m.name for m in report.modules if m.rank} == found.keys()
    lost = sum(float((d - found.get(n, torch.zeros(()))).square().sum()) for n, d in dense.items())
    total = sum(float(d.square().sum()) for d in dense.values())
    assert report.totals["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    if not uniform:
        spectra = {n: torch.linalg.svdvals(d).square() for n, d in dense.items()}
        price = {n: 4 * sum(d.shape) for n, d in dense.items()}
        kept = {m.name: m.rank or 0 for m in report.modules}
        dropped = sum(not r for r in kept.values())
        spare = allowed - (tmp_path / "out" / WEIGHTS).stat().st_size
        assert spare < max(price.values()) + 300 * dropped  # a dropped module's place in the header is left over
        spent = sum(r * price[n] for n, r in kept.items())
        assert energy_for(spectra, price, spent - max(price.values())) <= total - lost + 1e-9


def energy_for(spectra: dict[str, Tensor], price: dict[str, int], budget: int) -> float:
    """What the best directions for their price hold, taken one by one until the budget would be overdrawn."""
    offers = sorted(((float(v) / price[n], price[n], float(v)) for n, s in spectra.items() for v in s), reverse=True)
    energy = 0.0
    for _, cost, value in offers:
        budget -= cost
        if budget < 0:
            break
        energy += value
    return energy


def test_a_budget_for_nothing(adapter: Path, tmp_path: Path) -> None:
    """Too small for one direction: the least that would do is named."""
    with pytest.raises(SurgeryError, match="give at least"):
        rerank(adapter, tmp_path / "out", RankChoice(budget=Budget(size=500)))
    assert not (tmp_path / "out").exists()


def test_dtype_and_what_goes_along(tmp_path: Path) -> None:
    """--dtype casts factors and tensors stored whole; the tokenizer and the config's other words stay."""
    models.peft_adapter("bert", tmp_path / "a", r=4, target_modules=["query"], modules_to_save=["pooler"], bias="all")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    report = rerank(tmp_path / "a", tmp_path / "out", RankChoice(rank=2), dtype="BF16")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert report.totals["error"] > 0
    old, new = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("a", "out"))
    assert all(new[k] == old[k] for k in ("target_modules", "modules_to_save", "bias", "task_type"))
    same = rerank(tmp_path / "a", tmp_path / "same", RankChoice(rank=4), dtype="BF16")
    dense, found = (models.peft_deltas("bert", tmp_path / n) for n in ("a", "same"))
    for module in same.modules:  # unchanged but for the dtype, and that is measured
        lost = float((found[module.name] - dense[module.name]).norm() / dense[module.name].norm())
        assert module.error == pytest.approx(lost, rel=1e-3)
    plain = rerank(tmp_path / "a", tmp_path / "plain", RankChoice(rank=2))
    assert plain.totals["full"] == len([k for k in load_file(tmp_path / "a" / WEIGHTS) if "lora" not in k])
    one, two = (PeftModel.from_pretrained(models.make("bert"), tmp_path / n).eval() for n in ("plain", "a"))
    for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert "lora" in name or torch.equal(p, q), name


def test_fresh_adapters_stay_fresh(tmp_path: Path) -> None:
    """B is zero at first: nothing is left of such a module, and of a whole adapter of them not even a file."""
    models.peft_adapter("llama", tmp_path / "a", r=4, target_modules=["q_proj", "k_proj"])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    half = {k: torch.zeros_like(v) if "k_proj.lora_B" in k else v for k, v in tensors.items()}
    save_file(half, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    report = rerank(tmp_path / "a", tmp_path / "out")
    assert [m.name.rpartition(".")[2] for m in report.left_out] == ["k_proj", "k_proj"]
    found = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    models.peft_deltas("llama", tmp_path / "out")
    with pytest.raises(SurgeryError, match="zero in every module"):
        save_file({k: torch.zeros_like(v) for k, v in half.items()}, tmp_path / "a" / WEIGHTS)
        rerank(tmp_path / "a", tmp_path / "none")


def test_nothing_dense_is_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """linear, cat and rerank never make a matrix of the module's size."""
    adapter = tmp_path / "adapter"
    models.peft_adapter("llama", adapter, r=2, target_modules="all-linear")
    shapes = {tuple(d.shape) for d in models.peft_deltas("llama", adapter).values()}
    made: list[tuple[int, ...]] = []
    plain = torch.Tensor.__matmul__

    def watch(self: Tensor, other: Tensor) -> Tensor:
        out = plain(self, other)
        made.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    rerank(adapter, tmp_path / "a", RankChoice(rank=1))
    blend([adapter, adapter], tmp_path / "b", BlendOptions(weights=[1.0, 0.5]))
    blend([adapter, adapter], tmp_path / "c", BlendOptions(method="cat"))
    assert made
    assert not shapes & set(made)


# extract's budget


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("alpha", [None, 16.0])
def test_extract_with_a_budget(tmp_path: Path, uniform: bool, alpha: float | None) -> None:
    """One pass over ΔW, then allocation: as good as extracting everything and reranking to the same bytes."""
    base = models.save(models.make("llama"), tmp_path / "base")
    tuned = models.save(models.perturb(models.make("llama"), only="proj"), tmp_path / "tuned")
    choice = RankChoice(budget=Budget(size=12_000), max_rank=32)
    options = ExtractOptions(choice, Selection(full=("none",)), alpha=alpha, uniform_rank=uniform, svd="exact")
    report = extract(base, tuned, tmp_path / "out", options)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= 12_000
    extract(base, tuned, tmp_path / "all", ExtractOptions(RankChoice(rank=32), Selection(full=("none",)), svd="exact"))
    after = rerank(tmp_path / "all", tmp_path / "after", choice, uniform_rank=uniform)
    assert report.totals["error"] == pytest.approx(after.totals["error"], rel=1e-3)
    found, expected = (models.peft_deltas("llama", tmp_path / n) for n in ("out", "after"))
    assert models.relative(found, expected) < 1e-3
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    if alpha is not None and not uniform:
        assert set(config["alpha_pattern"].values()) <= {16}
    full = models.peft_deltas("llama", tmp_path / "all")
    lost = sum(float((d - found.get(n, torch.zeros(()))).square().sum()) for n, d in full.items())
    total = sum(float(d.square().sum()) for d in full.values())
    assert report.totals["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_extract_says_when_a_cap_binds(tmp_path: Path) -> None:
    """A module that kept all it was allowed to bring might have had more of the budget."""
    base = models.save(models.make("llama"), tmp_path / "base")
    tuned = models.save(models.perturb(models.make("llama"), only="layers.1.mlp.up_proj"), tmp_path / "tuned")
    choice = RankChoice(budget=Budget(share=0.02), max_rank=2)
    report = extract(base, tuned, tmp_path / "out", ExtractOptions(choice))
    assert any("max_rank" in w for w in report.warnings)
