"""blend against the weighted sum of what PEFT loads, for every method and every way adapters can differ."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.linalg.methods import METHODS
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.blend import BlendOptions, blend
from lorasurgery.ops.merge import merge

ALL = "all-linear"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of one Llama that differ in rank, scaling and modules."""
    root = tmp_path_factory.mktemp("pair")
    models.peft_adapter("llama", root / "a", r=4, lora_alpha=16, target_modules=ALL)
    models.peft_adapter(
        "llama", root / "b", seed=2, r=6, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj", "lm_head"]
    )
    return root / "a", root / "b"


def weighted(parts: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    names = {name for part in parts for name in part}
    return {n: sum(w * p[n] for p, w in zip(parts, weights, strict=True) if n in p) for n in names}  # type: ignore[misc]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_linear_is_the_weighted_sum(family: str, tmp_path: Path) -> None:
    """To 1e-6, with different ranks, alphas, rsLoRA, patterns and dtypes; PEFT reloads the ranks it finds."""
    common = {"target_modules": ALL}
    models.peft_adapter(family, tmp_path / "a", r=4, lora_alpha=16, **common)
    models.peft_adapter(family, tmp_path / "b", seed=2, r=5, lora_alpha=2, use_rslora=True, **common)
    models.peft_adapter(
        family, tmp_path / "c", seed=3, r=3, rank_pattern={r".*[kov].*": 2}, alpha_pattern={r".*[kq].*": 1.5}, **common
    )
    paths, weights = [tmp_path / n for n in "abc"], [0.7, -0.3, 1.6]
    report = blend(paths, tmp_path / "out", BlendOptions(weights=weights))
    expected = weighted([models.peft_deltas(family, p) for p in paths], weights)
    found = models.peft_deltas(family, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert models.relative(found, expected) < 1e-6
    assert report.totals["error"] < 1e-6


def test_embeddings_blend_too(tmp_path: Path) -> None:
    """lora_embedding factors lie the other way round."""
    for i, name in enumerate("ab"):
        models.peft_adapter("llama", tmp_path / name, seed=i, r=3 + i, target_modules=["embed_tokens", "v_proj"])
    blend([tmp_path / "a", tmp_path / "b"], tmp_path / "out", BlendOptions(weights=[0.5, 2.0]))
    parts = [models.peft_deltas("llama", tmp_path / n) for n in "ab"]
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), weighted(parts, [0.5, 2.0])) < 1e-6


def test_bfloat16_adapters_add_up_exactly(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An untruncated sum of 16-bit factors is written in float32, so that nothing of it is rounded away."""
    for source, name, dtype in zip(pair, "ab", (torch.bfloat16, torch.float16), strict=True):
        shrink(source, tmp_path / name, dtype)
    paths = [tmp_path / "a", tmp_path / "b"]
    blend(paths, tmp_path / "out", BlendOptions(weights=[0.7, 0.3]))
    parts = [models.peft_deltas("llama", p) for p in paths]
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), weighted(parts, [0.7, 0.3])) < 1e-6
    report = blend([paths[0]] * 2, tmp_path / "short", BlendOptions(choice=RankChoice(rank=2)))
    assert {t.dtype for t in load_file(tmp_path / "short/adapter_model.safetensors").values()} == {torch.bfloat16}
    measured = models.peft_deltas("llama", tmp_path / "short")
    doubled = weighted([parts[0]] * 2, [1.0, 1.0])
    for module in report.modules:
        lost = float((measured[module.name] - doubled[module.name]).norm() / doubled[module.name].norm())
        assert module.error == pytest.approx(lost, rel=1e-4)  # the rounding is in the stated error


def shrink(source: Path, target: Path, dtype: torch.dtype) -> None:
    target.mkdir()
    tensors = {k: v.to(dtype) for k, v in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncated_linear_is_optimal(pair: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    """Each module is the SVD truncation of the dense sum to 1e-5, with the error as stated."""
    report = blend(pair, tmp_path / "out", BlendOptions(choice=RankChoice(rank=rank), weights=[0.7, -0.4]))
    dense = weighted([models.peft_deltas("llama", p) for p in pair], [0.7, -0.4])
    found = models.peft_deltas("llama", tmp_path / "out")
    for module in report.modules:
        s = torch.linalg.svdvals(dense[module.name])
        best = references.best(dense[module.name], rank)
        assert float((found[module.name] - best).norm() / dense[module.name].norm()) < 1e-5
        tail = float(s[rank:].norm() / s.norm())
        assert module.error == pytest.approx(tail, rel=1e-5, abs=1e-6)


def reference(method: str, parts: list[Tensor], weights: list[float], density: float) -> Tensor:
    """The methods without randomness, on the dense updates in float64."""
    function = {"ties": merge_utils.ties, "magnitude-prune": merge_utils.magnitude_prune}[method]
    found: Tensor = function(parts, torch.tensor(weights, dtype=torch.float64), density)
    return found


@pytest.mark.parametrize("method", ["ties", "magnitude-prune"])
@pytest.mark.parametrize("rank", [3, 32])
def test_dense_methods_are_truncated_optimally(pair: tuple[Path, Path], tmp_path: Path, method: str, rank: int) -> None:
    """TIES and pruning of the dense updates, then the best approximation of the asked-for rank."""
    options = BlendOptions(method=method, choice=RankChoice(rank=rank), weights=[0.7, 0.4], density=0.3)  # type: ignore[arg-type]
    report = blend(pair, tmp_path / "out", options)
    a, b = (models.peft_deltas("llama", p) for p in pair)
    found = models.peft_deltas("llama", tmp_path / "out")
    for module in report.modules:
        name = module.name
        parts = [p[name] for p in (a, b) if name in p]
        dense = reference(method, parts, [0.7, 0.4][: len(parts)] if name in a else [0.4], 0.3)
        s = torch.linalg.svdvals(dense)
        turn = float(s[rank - 1] / (s[rank - 1] - s[rank])) if rank < len(s) else 1.0
        slack = max(10.0, turn)  # directions turn by rounding over the gap (Wedin 1972)
        assert float((found[name] - references.best(dense, rank)).norm() / dense.norm()) < 1e-6 * slack
        assert module.error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
def test_knots_is_the_papers(pair: tuple[Path, Path], tmp_path: Path, rank: int | None) -> None:
    """SVD of the dense updates side by side, TIES on the Vᵢᵀ, and back; then the best approximation."""
    choice = None if rank is None else RankChoice(rank=rank)
    blend(pair, tmp_path / "out", BlendOptions(method="knots-ties", weights=[0.7, -0.4], density=0.4, choice=choice))
    a, b = (models.peft_deltas("llama", p) for p in pair)
    found = models.peft_deltas("llama", tmp_path / "out")
    for name in a.keys() | b.keys():
        parts = [(p[name], w) for p, w in ((a, 0.7), (b, -0.4)) if name in p]
        dense = references.knots([d for d, _ in parts], [w for _, w in parts], 0.4)
        expected = dense if rank is None else references.best(dense, rank)
        assert float((found[name] - expected).norm() / dense.norm()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reloads_and_repeats(pair: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    """PEFT loads what every method writes; the same seed gives the same bytes; the default rank is the inputs'."""
    options = BlendOptions(method=method, weights=[0.7, -0.4], seed=5)  # type: ignore[arg-type]
    report = blend(pair, tmp_path / "one", options)
    blend(pair, tmp_path / "two", options)
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    found = models.peft_deltas("llama", tmp_path / "one")
    assert {m.name for m in report.modules} == found.keys()
    shared = next(m for m in report.modules if m.name.endswith("0.self_attn.q_proj"))
    assert shared.rank == (6 if method in ("ties", "dare-linear", "dare-ties", "magnitude-prune") else 10)
    if method.startswith("dare"):
        other = BlendOptions(method=method, weights=[0.7, -0.4], seed=6)  # type: ignore[arg-type]
        blend(pair, tmp_path / "three", other)
        assert (tmp_path / "three/adapter_model.safetensors").read_bytes() != one.read_bytes()


def test_cat_keeps_every_factor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The factors side by side: A as it is, B times weight and scale."""
    blend(pair, tmp_path / "out", BlendOptions(method="cat", weights=[0.7, -0.4]))
    expected = weighted([models.peft_deltas("llama", p) for p in pair], [0.7, -0.4])
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), expected) < 1e-6
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    parts = [load_file(p / "adapter_model.safetensors")[key] for p in pair]
    assert torch.equal(load_file(tmp_path / "out/adapter_model.safetensors")[key], torch.cat(parts))


@settings(max_examples=12)
@given(st.lists(st.floats(-3, 3).filter(lambda w: w == 0 or abs(w) > 1e-30), min_size=2, max_size=2))
def test_linear_in_its_weights(
    pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, weights: list[float]
) -> None:
    """Any weights that float32 can tell, either order: Σ wᵢ ΔWᵢ; beyond it, tests/trust/test_edges.py."""
    root = tmp_path_factory.mktemp("w")
    if not any(weights):
        return
    blend(pair, root / "one", BlendOptions(weights=weights))
    blend(pair[::-1], root / "two", BlendOptions(weights=weights[::-1]))
    parts = [models.peft_deltas("llama", p) for p in pair]
    expected = weighted([p for p, w in zip(parts, weights, strict=True) if w], [w for w in weights if w])
    for name in ("one", "two"):
        assert models.relative(models.peft_deltas("llama", root / name), expected) < 1e-6


def test_an_adapter_minus_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Negative weights subtract exactly: what cancels is not written, and if all does, that is an error."""
    report = blend([pair[0], pair[1], pair[0]], tmp_path / "b", BlendOptions(weights=[1.0, 1.0, -1.0]))
    assert models.relative(models.peft_deltas("llama", tmp_path / "b"), models.peft_deltas("llama", pair[1])) < 1e-6
    assert {m.rank for m in report.modules} == {6}
    assert len(report.left_out) == 14 - 4  # the modules that only the first adapter has
    with pytest.raises(MismatchError, match="zero in every module"):
        blend([pair[0], pair[0]], tmp_path / "none", BlendOptions(weights=[0.5, -0.5]))
    assert not (tmp_path / "none").exists()


def test_a_merged_blend_is_merging_one_by_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """merge(blend(a, b)) and merge(a, b) give the same weights; truncated, they differ by the stated error."""
    base = models.save(models.make("llama"), tmp_path / "base")
    weights = [0.7, -0.4]
    merge(base, pair, tmp_path / "each", weights=weights)
    blend(pair, tmp_path / "whole", BlendOptions(weights=weights))
    report = blend(pair, tmp_path / "short", BlendOptions(weights=weights, choice=RankChoice(rank=4)))
    each = load_file(tmp_path / "each/model.safetensors")
    before = load_file(base / "model.safetensors")
    for name in ("whole", "short"):
        merge(base, [tmp_path / name], tmp_path / f"m-{name}")
        found = load_file(tmp_path / f"m-{name}/model.safetensors")
        lost = sum(float((found[k] - each[k]).double().square().sum()) for k in each) ** 0.5
        change = sum(float((each[k] - before[k]).double().square().sum()) for k in each) ** 0.5
        stated = report.totals["error"] if name == "short" else 0.0
        assert lost / change == pytest.approx(stated, rel=1e-4, abs=1e-5)


def test_normalize(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Weights are divided by their sum, which must not be 0."""
    report = blend(pair, tmp_path / "out", BlendOptions(weights=[3.0, 1.0], normalize=True))
    assert report.totals["weights"] == [0.75, 0.25]
    expected = weighted([models.peft_deltas("llama", p) for p in pair], [0.75, 0.25])
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), expected) < 1e-6
    with pytest.raises(UsageError, match="sum to 0"):
        blend(pair, tmp_path / "no", BlendOptions(weights=[1.0, -1.0], normalize=True))


def test_budget_is_global(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The file fits, all bytes that buy a direction are spent, and the error beats one rank for all."""
    free = blend(pair, tmp_path / "free", BlendOptions(choice=RankChoice(budget=Budget(size=12_000))))
    alike = blend(
        pair, tmp_path / "alike", BlendOptions(choice=RankChoice(budget=Budget(size=12_000)), uniform_rank=True)
    )
    for name in ("free", "alike"):
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size <= 12_000
    assert (tmp_path / "free/adapter_model.safetensors").stat().st_size > 11_000
    assert free.totals["error"] < alike.totals["error"]
    assert len({m.rank for m in alike.modules}) == 1
    dense = weighted([models.peft_deltas("llama", p) for p in pair], [1.0, 1.0])
    found = models.peft_deltas("llama", tmp_path / "free")
    lost = sum(float((found.get(n, torch.zeros(())) - d).square().sum()) for n, d in dense.items())
    total = sum(float(d.square().sum()) for d in dense.values())
    assert free.totals["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["ties", "knots-ties", "dare-linear"])
def test_budget_for_every_kind_of_method(pair: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    """Dense results and factored ones compete in the same way."""
    choice = RankChoice(budget=Budget(size=15_000))
    report = blend(pair, tmp_path / "out", BlendOptions(method=method, choice=choice))  # type: ignore[arg-type]
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_size <= 15_000
    assert 0 < report.totals["error"] < 0.9
    models.peft_deltas("llama", tmp_path / "out")


# What adapters store whole


def saved(root: Path, name: str, seed: int, **config: object) -> Path:
    models.peft_adapter("bert", root / name, seed=seed, r=2, target_modules=["query"], **config)
    return root / name


def test_equal_replaced_tensors_pass(tmp_path: Path) -> None:
    """The same pooler in both: it goes along as it is."""
    a = saved(tmp_path, "a", 1, modules_to_save=["pooler"])
    b = saved(tmp_path, "b", 1, modules_to_save=["pooler"])
    report = blend([a, b], tmp_path / "out", BlendOptions(weights=[0.7, 0.3]))
    old, new = (load_file(p / "adapter_model.safetensors") for p in (a, tmp_path / "out"))
    names = [n for n in old if "pooler" in n]
    assert names
    assert all(torch.equal(old[n], new[n]) for n in names)
    assert len(report.full) == len(names)
    PeftModel.from_pretrained(models.make("bert"), tmp_path / "out")


def test_different_replaced_tensors(tmp_path: Path) -> None:
    """An error that names the option, or the weighted mean."""
    a, b = (saved(tmp_path, n, i, modules_to_save=["pooler"]) for i, n in enumerate("ab"))
    with pytest.raises(MismatchError, match="average_replaced=True takes"):
        blend([a, b], tmp_path / "no")
    blend([a, b], tmp_path / "out", BlendOptions(weights=[3.0, 1.0], average_replaced=True))
    one, two, new = (load_file(p / "adapter_model.safetensors") for p in (a, b, tmp_path / "out"))
    for name in (n for n in one if "pooler" in n):
        assert torch.allclose(new[name], 0.75 * one[name] + 0.25 * two[name], atol=1e-7)
    with pytest.raises(UsageError, match="sum to 0"):
        blend([a, b], tmp_path / "no", BlendOptions(weights=[1.0, -1.0], average_replaced=True))


def test_a_replaced_tensor_of_one_adapter_is_told(tmp_path: Path) -> None:
    """It goes along, with a warning: nobody knows what the other adapter would have said."""
    a, b = saved(tmp_path, "a", 1, modules_to_save=["pooler"]), saved(tmp_path, "b", 2)
    report = blend([a, b], tmp_path / "out")
    assert any("not in every adapter" in w for w in report.warnings)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["pooler"]


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases(tmp_path: Path, kind: str) -> None:
    """bias=all and lora_only store biases whole; a blend of equal ones runs as before in PEFT."""
    a = saved(tmp_path, "a", 1, bias=kind)
    blend([a, a], tmp_path / "out", BlendOptions(weights=[0.5, 0.5]))
    one, two = (PeftModel.from_pretrained(models.make("bert"), p).eval() for p in (a, tmp_path / "out"))
    assert torch.allclose(models.outputs(one), models.outputs(two), atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_biases_of_factors(tmp_path: Path, method: str) -> None:
    """lora_B.bias is blended like the matrix; a module without one gets zeros, for PEFT expects one in each."""
    a = saved(tmp_path, "a", 1, lora_bias=True)
    models.peft_adapter("bert", tmp_path / "b", seed=2, r=3, lora_alpha=5, target_modules=["query", "key"])
    options = BlendOptions(method=method, weights=[0.7, 0.3], density=1.0 if method == "ties" else None)  # type: ignore[arg-type]
    blend([a, tmp_path / "b"], tmp_path / "out", options)
    model = PeftModel.from_pretrained(models.make("bert"), tmp_path / "out")
    first = PeftModel.from_pretrained(models.make("bert"), a)
    for name, module in model.named_modules():
        if name.endswith("query"):
            source = dict(first.named_modules())[name]
            expected = 0.7 * source.scaling["default"] * source.lora_B["default"].bias
            found = module.scaling["default"] * module.lora_B["default"].bias
            assert torch.allclose(found, expected, atol=1e-6)
        elif name.endswith("self.key"):
            assert not module.lora_B["default"].bias.any()


# What does not belong together


def test_different_base_models_warn_and_different_shapes_fail(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A name is only a name; a shape is not."""
    shrink(pair[0], tmp_path / "a", torch.float32)
    config = json.loads((pair[0] / "adapter_config.json").read_text())
    for name, base in (("a", "org/one"), ("b", "org/two")):
        shrink(pair[0], tmp_path / name, torch.float32) if name == "b" else None
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    report = blend([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert any("org/one, org/two" in w for w in report.warnings)
    models.peft_adapter("qwen2-tied", tmp_path / "q", r=2, target_modules=["up_proj"])
    tensors = load_file(tmp_path / "q/adapter_model.safetensors")
    short = {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    save_file(short, tmp_path / "q/adapter_model.safetensors")
    with pytest.raises(MismatchError, match="different base models"):
        blend([pair[0], tmp_path / "q"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_tied_and_untied_embeddings(tmp_path: Path) -> None:
    """One file can't tie and not tie the head to the embedding."""
    common = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
    models.peft_adapter("qwen2-tied", tmp_path / "a", ensure_weight_tying=True, **common)
    models.peft_adapter("qwen2-tied", tmp_path / "b", seed=2, **common)
    with pytest.raises(MismatchError, match="ensure_weight_tying"):
        blend([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    blend([tmp_path / "a", tmp_path / "a"], tmp_path / "out", BlendOptions(weights=[0.5, 0.25]))
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["ensure_weight_tying"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "cat", "choice": RankChoice(rank=2)}, "keeps every direction"),
        ({"density": 0.5}, "keeps every entry"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "ties", "density": 1.5}, "up to 1"),
        ({"method": "magic"}, "expected one of"),
        ({"weights": [0.0, 0.0]}, "every weight is 0"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 weights for 2"),
        ({"weights": [float("nan")]}, "not a finite"),
        ({"dtype": "F8_E4M3"}, "float32, bfloat16 or float16"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_meaningless_options(pair: tuple[Path, Path], tmp_path: Path, words: dict[str, object], message: str) -> None:
    """One line, and no output."""
    with pytest.raises(UsageError, match=message):
        blend(pair, tmp_path / "out", BlendOptions(**words))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Named by file and module; and float16 that can't hold the factors says so."""
    for name, value in (("nan", float("nan")), ("big", 3e6)):
        shrink(pair[0], tmp_path / name, torch.float32)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        tensors[key][0, 0] = value
        if name == "big":
            tensors[key] *= 1e6
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SurgeryError, match=r"nan: model\.layers\.1\.mlp\.up_proj: .*not finite"):
        blend([tmp_path / "nan"], tmp_path / "out")
    for method in METHODS:
        with pytest.raises(SurgeryError, match="not finite"):
            blend([pair[0], tmp_path / "nan"], tmp_path / "out", BlendOptions(method=method))
    with pytest.raises(SurgeryError, match=r"do not fit float16: their numbers would be about .*; try dtype='float32'"):
        blend([tmp_path / "big", pair[1]], tmp_path / "out", BlendOptions(dtype="F16"))
    assert not (tmp_path / "out").exists()


def test_dry_run_reads_headers_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Ranks are upper bounds; nothing is written."""
    report = blend(pair, tmp_path / "out", BlendOptions(choice=RankChoice(rank=7)), dry_run=True)
    assert {m.rank for m in report.modules} == {4, 6, 7}
    assert not (tmp_path / "out").exists()
    assert report.bytes_read == 0


# PEFT's own combinations


def both(pair: tuple[Path, Path]) -> PeftModel:
    model = PeftModel.from_pretrained(models.make("llama"), pair[0], adapter_name="a")
    model.load_adapter(pair[1], "b")
    return model


def combined(model: PeftModel, weights: list[float], **how: object) -> dict[str, Tensor]:
    model.add_weighted_adapter(["a", "b"], weights, "m", **how)
    return {
        n.removeprefix("base_model.model."): m.get_delta_weight("m").detach().double()
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight") and "m" in m.lora_A
    }


@pytest.fixture(scope="module")
def plain_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the same modules and rank, without rsLoRA: what PEFT can combine."""
    root = tmp_path_factory.mktemp("plain")
    for i, name in enumerate("ab"):
        models.peft_adapter("llama", root / name, seed=i, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    return root / "a", root / "b"


@pytest.mark.parametrize(
    ("ours", "peft"),
    [("linear", "svd"), ("cat", "cat"), ("ties", "ties_svd"), ("magnitude-prune", "magnitude_prune_svd")],
)
def test_what_peft_gets_right(plain_pair: tuple[Path, Path], tmp_path: Path, ours: str, peft: str) -> None:
    """PEFT 0.21's dense combinations without rsLoRA give the same ΔW."""
    density = 0.4 if "ties" in ours or "prune" in ours else None
    how = {"combination_type": peft} | ({"density": density} if density else {})
    if peft.endswith("svd"):
        how["svd_rank"] = 8
    expected = combined(both(plain_pair), [0.7, 0.3], **how)
    choice = None if ours == "cat" else RankChoice(rank=8)
    blend(plain_pair, tmp_path / "out", BlendOptions(method=ours, weights=[0.7, 0.3], density=density, choice=choice))  # type: ignore[arg-type]
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), expected) < 1e-5


def test_what_peft_gets_wrong_linear(plain_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """`linear` mixes one adapter's A with the other's B, and the worse with negative weights (#1907, #2796, #3004)."""
    parts = [models.peft_deltas("llama", p) for p in plain_pair]
    for weights in ([0.7, 0.3], [1.0, -0.5]):
        truth = weighted(parts, weights)
        try:
            found = combined(both(plain_pair), weights, combination_type="linear")
            assert models.relative(found, truth) > 0.5
        except ValueError:  # some versions refuse negative weights
            assert min(weights) < 0
        blend(plain_pair, tmp_path / f"{weights}", BlendOptions(weights=weights))
        assert models.relative(models.peft_deltas("llama", tmp_path / f"{weights}"), truth) < 1e-6


def test_what_peft_gets_wrong_rslora(tmp_path: Path) -> None:
    """Its svd of rsLoRA adapters is √r too large (#3449, #3761): the new adapter inherits use_rslora."""
    for i, name in enumerate("ab"):
        models.peft_adapter("llama", tmp_path / name, seed=i, r=4, use_rslora=True, target_modules=["q_proj"])
    paths = (tmp_path / "a", tmp_path / "b")
    truth = weighted([models.peft_deltas("llama", p) for p in paths], [0.7, 0.3])
    found = combined(both(paths), [0.7, 0.3], combination_type="svd", svd_rank=8)
    for name, delta in found.items():
        assert float(delta.norm() / truth[name].norm()) == pytest.approx(8**0.5, rel=1e-4)
    blend(paths, tmp_path / "out", BlendOptions(weights=[0.7, 0.3]))
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), truth) < 1e-6


def test_what_peft_gets_wrong_patterns(tmp_path: Path) -> None:
    """Its combinations of adapters with rank_pattern fail to reload (#3737); ours reload."""
    config = LoraConfig(r=4, rank_pattern={"up_proj": 2}, target_modules=["q_proj", "up_proj"])
    for i, name in enumerate("ab"):
        models.peft_adapter(
            "llama", tmp_path / name, seed=i, **{k: getattr(config, k) for k in ("r", "rank_pattern", "target_modules")}
        )
    paths = (tmp_path / "a", tmp_path / "b")
    model = both(paths)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "m", combination_type="linear")
    model.save_pretrained(tmp_path / "peft", selected_adapters=["m"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(models.make("llama"), tmp_path / "peft/m")
    truth = weighted([models.peft_deltas("llama", p) for p in paths], [0.7, 0.3])
    blend(paths, tmp_path / "out", BlendOptions(weights=[0.7, 0.3]))
    found = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert len(found["rank_pattern"]) == 2
    assert models.relative(models.peft_deltas("llama", tmp_path / "out"), truth) < 1e-6
