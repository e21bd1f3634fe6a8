"""extract on whole models: it loads in PEFT unchanged, and with merge gives the tuned weights back."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lorasurgery.errors import MismatchError, UnsupportedError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.merge import merge

FULL = ExtractOptions(RankChoice(rank=64))


def pair(family: str, tmp: Path, dtype: torch.dtype = torch.float32, only: str = "") -> tuple[Path, Path]:
    """(base, tuned) on disk, with every parameter whose name holds `only` moved."""
    base = models.save(models.make(family, dtype), tmp / "base")
    return base, models.save(models.perturb(models.make(family, dtype), only=only), tmp / "tuned")


def config_of(adapter: Path) -> dict[str, object]:
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_full_rank_gives_the_tuned_model_back(family: str, tmp_path: Path) -> None:
    """extract at full rank, then merge: the tuned tensors to 1e-6, the tuned logits, nothing left out."""
    base, tuned = pair(family, tmp_path)
    report = extract(base, tuned, tmp_path / "adapter", FULL)
    assert report.totals["error"] < 1e-5
    assert not report.left_out
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    expected, found = (load_file(tmp_path / d / "model.safetensors") for d in ("tuned", "merged"))
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        models.outputs(models.load(family, tmp_path / "merged")), models.outputs(models.load(family, tuned))
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_adapter_loads_in_peft_unchanged(family: str, tmp_path: Path) -> None:
    """PeftModel.from_pretrained takes every tensor, gives each back to the bit, and runs as the tuned model does."""
    base, tuned = pair(family, tmp_path)
    extract(base, tuned, tmp_path / "adapter", FULL)
    model = PeftModel.from_pretrained(models.make(family), tmp_path / "adapter").eval()
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(written) == set(loaded)
    assert all(torch.equal(written[k], loaded[k]) for k in written)
    torch.testing.assert_close(models.outputs(model), models.outputs(models.load(family, tuned)), rtol=1e-4, atol=1e-5)


def test_mixed_ranks_reload_in_peft(tmp_path: Path) -> None:
    """Ranks chosen by energy differ by module; the full-path patterns are what PEFT rebuilds the shapes from."""
    base, tuned = pair("llama", tmp_path)
    report = extract(base, tuned, tmp_path / "adapter", ExtractOptions(RankChoice(energy=0.6)))
    ranks = {m.rank for m in report.modules}
    assert len(ranks) > 1
    model = PeftModel.from_pretrained(models.make("llama"), tmp_path / "adapter").eval()
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    torch.testing.assert_close(models.outputs(model), models.outputs(models.load("llama", tmp_path / "merged")))


@pytest.mark.parametrize(
    "options",
    [{"alpha": 5.0}, {"alpha": 5.0, "rslora": True}, {"rslora": True}, {"uniform_rank": True},
     {"uniform_rank": True, "rslora": True, "alpha": 3.0}],
    ids=str,
)  # fmt: skip
def test_alpha_rslora_and_padding_say_the_same_update(options: dict[str, object], tmp_path: Path) -> None:
    """However the scale is written, scale·B·A is the same ΔW, for PEFT's merge as for ours."""
    base, tuned = pair("llama", tmp_path)
    choice = RankChoice(energy=0.7)
    extract(base, tuned, tmp_path / "plain", ExtractOptions(choice))
    extract(base, tuned, tmp_path / "other", ExtractOptions(choice, **options))  # type: ignore[arg-type]
    merge(base, [tmp_path / "plain"], tmp_path / "merged")
    other = PeftModel.from_pretrained(models.make("llama"), tmp_path / "other").eval()
    torch.testing.assert_close(
        models.outputs(other), models.outputs(models.load("llama", tmp_path / "merged")), rtol=1e-4, atol=1e-5
    )
    if options.get("uniform_rank"):
        assert config_of(tmp_path / "other")["rank_pattern"] == {}
    if "alpha" in options and not options.get("uniform_rank"):
        assert config_of(tmp_path / "other")["lora_alpha"] == options["alpha"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stated_error_is_measured(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each module's error is ‖ΔW − s·BA‖/‖ΔW‖ of the files written, by float64 arithmetic; the total too."""
    base, tuned = pair("llama", tmp_path, dtype)
    report = extract(base, tuned, tmp_path / "adapter", ExtractOptions(RankChoice(rank=6)))
    before, after, factors = (
        load_file(tmp_path / f) for f in ("base/model.safetensors", "tuned/model.safetensors",
                                          "adapter/adapter_model.safetensors")
    )  # fmt: skip
    lost = whole = 0.0
    for m in report.modules:
        delta = after[f"{m.name}.weight"].double() - before[f"{m.name}.weight"].double()
        stem = f"base_model.model.{m.name}."
        if m.kind == "embedding":
            product = (factors[stem + "lora_embedding_B"].double() @ factors[stem + "lora_embedding_A"].double()).T
        else:
            product = factors[stem + "lora_B.weight"].double() @ factors[stem + "lora_A.weight"].double()
        assert factors[stem + ("lora_embedding_A" if m.kind == "embedding" else "lora_A.weight")].dtype == dtype
        error = float((delta - product).norm() / delta.norm())
        assert m.error == pytest.approx(error, rel=1e-4)
        assert m.energy == pytest.approx(1 - error**2, rel=1e-4)
        assert m.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        lost, whole = lost + float((delta - product).square().sum()), whole + float(delta.square().sum())
    assert report.totals["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_what_is_equal_is_not_in_the_adapter(tmp_path: Path) -> None:
    """Only what changed is written; the rest is counted as unchanged."""
    base, tuned = pair("llama", tmp_path, only="layers.1.self_attn.q_proj")
    report = extract(base, tuned, tmp_path / "adapter")
    assert [m.name for m in report.modules] == ["model.layers.1.self_attn.q_proj"]
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 2
    assert config_of(tmp_path / "adapter")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert report.totals["unchanged"] == len(load_file(base / "model.safetensors")) - 1


def test_identical_models_are_an_error(tmp_path: Path) -> None:
    """Nothing to extract is said, not written."""
    base = models.save(models.make("llama"), tmp_path / "base")
    other = models.save(models.make("llama"), tmp_path / "other")
    with pytest.raises(MismatchError, match="nothing to extract"):
        extract(base, other, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_full_none_leaves_out_and_says_how_much(tmp_path: Path) -> None:
    """--full none: norms are left out, and the warning states their measured share of the change."""
    base, tuned = pair("llama", tmp_path)
    report = extract(base, tuned, tmp_path / "adapter", ExtractOptions(selection=Selection(full=("none",))))
    before, after = (load_file(p / "model.safetensors") for p in (base, tuned))
    squares = {n: float((after[n].double() - t.double()).square().sum()) for n, t in before.items()}
    norms = sum(v for n, v in squares.items() if "norm" in n)
    assert report.totals["left_out_share"] == pytest.approx((norms / sum(squares.values())) ** 0.5, rel=1e-5)
    assert any("left out" in w for w in report.warnings)
    assert not any("norm" in k for k in load_file(tmp_path / "adapter/adapter_model.safetensors"))


def test_full_pattern_stores_matrices_whole(tmp_path: Path) -> None:
    """--full lm_head stores that matrix whole beside the factors of the others."""
    base, tuned = pair("llama", tmp_path)
    extract(base, tuned, tmp_path / "adapter", ExtractOptions(selection=Selection(full=("auto", "lm_head"))))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(stored, load_file(tuned / "model.safetensors")["lm_head.weight"])
    assert "lm_head" in config_of(tmp_path / "adapter")["modules_to_save"]  # type: ignore[operator]


def test_target_and_exclude(tmp_path: Path) -> None:
    """Suffix, regular expression and preset select modules; an exclusion wins."""
    base, tuned = pair("llama", tmp_path)

    def names(target: tuple[str, ...], exclude: tuple[str, ...] = ()) -> set[str]:
        options = ExtractOptions(selection=Selection(target, exclude))
        report = extract(base, tuned, tmp_path / "adapter", options, overwrite=True)
        return {m.name.removeprefix("model.layers.") for m in report.modules}

    assert names(("q_proj",)) == {f"{i}.self_attn.q_proj" for i in (0, 1)}
    assert names((r"model\.layers\.1\..*",), ("mlp",)) == {f"1.self_attn.{p}_proj" for p in "qkvo"}
    assert names(("attention",), ("o_proj",)) == {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    assert len(names(("all-linear",))) == 14


def test_unknown_target_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt --target is wrong usage and gets the names that exist."""
    base, tuned = pair("llama", tmp_path)
    with pytest.raises(UsageError, match="q_proj"):
        extract(base, tuned, tmp_path / "adapter", ExtractOptions(selection=Selection(("q_porj",))))


def test_grown_vocabulary_is_stored_whole_and_merged(tmp_path: Path) -> None:
    """Added tokens: embedding and head are stored whole, merge takes them and updates vocab_size and tokenizer."""
    base, _ = pair("llama", tmp_path)
    grown = models.make("llama")
    grown.resize_token_embeddings(70)
    tuned = models.save(models.perturb(grown), tmp_path / "grown")
    (base / "tokenizer.json").write_text('{"of": "base"}')
    extract(base, tuned, tmp_path / "adapter", FULL)
    (tmp_path / "adapter/tokenizer.json").write_text('{"of": "adapter"}')
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.load("llama", tmp_path / "merged")
    assert merged.config.vocab_size == 70
    torch.testing.assert_close(models.outputs(merged), models.outputs(models.load("llama", tuned)))
    assert (tmp_path / "merged/tokenizer.json").read_text() == '{"of": "adapter"}'


def test_grown_tied_vocabulary_stays_tied(tmp_path: Path) -> None:
    """On a tied model the grown table serves both ends; no lm_head appears."""
    base, _ = pair("qwen2-tied", tmp_path)
    grown = models.make("qwen2-tied")
    grown.resize_token_embeddings(70)
    tuned = models.save(models.perturb(grown), tmp_path / "grown")
    extract(base, tuned, tmp_path / "adapter", FULL)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    torch.testing.assert_close(
        models.outputs(models.load("qwen2-tied", tmp_path / "merged")),
        models.outputs(models.load("qwen2-tied", tuned)),
    )


def test_a_head_untied_by_training(tmp_path: Path) -> None:
    """Base tied, tuned with a head of its own: the head's ΔW is against the shared table, and merging unties."""
    base, _ = pair("qwen2-tied", tmp_path)
    tuned = models.make("qwen2-tied")
    tuned.config.tie_word_embeddings = False
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach().clone())
    models.save(models.perturb(tuned, only="lm_head"), tmp_path / "untied")
    report = extract(base, tmp_path / "untied", tmp_path / "adapter", FULL)
    assert [m.name for m in report.modules] == ["lm_head"]
    assert merge(base, [tmp_path / "adapter"], tmp_path / "merged").totals["untied"]
    torch.testing.assert_close(
        models.outputs(models.load("qwen2-tied", tmp_path / "merged")),
        models.outputs(models.load("qwen2-tied", tmp_path / "untied")),
    )


def test_shape_mismatch_names_tensor_shapes_and_way_out(tmp_path: Path) -> None:
    """Another shape is refused from headers alone, with the option that leaves it out."""
    base, tuned = pair("llama", tmp_path)
    weights = load_file(tuned / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, tuned / "model.safetensors")
    path = name.removesuffix(".weight")
    with pytest.raises(
        MismatchError, match=rf"up_proj.weight is 47×32 but the base has 48×32.*exclude=.{path}. leaves"
    ):
        extract(base, tuned, tmp_path / "adapter")
    extract(base, tuned, tmp_path / "adapter", ExtractOptions(selection=Selection(exclude=(path,))))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    """An int8 matrix has no ΔW that means anything; it is named."""
    base, tuned = pair("llama", tmp_path)
    for folder in (base, tuned):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="quantized"):
        extract(base, tuned, tmp_path / "adapter")


def test_sharded_models_without_config(tmp_path: Path) -> None:
    """Sharding and config.json don't matter: the same adapter comes out of one file and of many shards."""
    base, tuned = pair("gpt2", tmp_path)
    extract(base, tuned, tmp_path / "one", FULL)
    shards = tmp_path / "shards"
    models.load("gpt2", tuned).save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    (shards / "config.json").unlink()
    (base / "config.json").write_text("")
    extract(base, shards, tmp_path / "two", FULL)
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("one", "two"))
    shared = set(one) & set(two)
    assert {k for k in one if "lm_head" not in k} <= shared
    assert all(torch.equal(one[k], two[k]) for k in shared)


def test_names_that_differ_by_a_prefix(tmp_path: Path) -> None:
    """gpt2 on disk says h.0…, a saved GPT2LMHeadModel transformer.h.0…: the pair is matched all the same."""
    base, tuned = pair("gpt2", tmp_path)
    weights = {n.removeprefix("transformer."): t for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    report = extract(base, tuned, tmp_path / "adapter", FULL)
    assert report.totals["error"] < 1e-5
    model = PeftModel.from_pretrained(models.make("gpt2"), tmp_path / "adapter").eval()
    torch.testing.assert_close(models.outputs(model), models.outputs(models.load("gpt2", tuned)), rtol=1e-4, atol=1e-5)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in load_file(tuned / "model.safetensors").items():
        torch.testing.assert_close(found[name.removeprefix("transformer.")], tensor, rtol=0, atol=1e-6)


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    """The same inputs, options and seed give the same files."""
    base, tuned = pair("llama", tmp_path)
    for name in ("one", "two"):
        extract(base, tuned, tmp_path / name, ExtractOptions(RankChoice(rank=4), svd="randomized", seed=7))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
