"""The merged checkpoint is PEFT's merge_and_unload, and loads in transformers to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

LINEAR = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2-tied": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
    "opt": ["q_proj", "v_proj", "fc2"],
}
NORMS = {
    "llama": ["norm"], "qwen2-tied": ["norm"], "gpt2": ["ln_f"], "bert": ["LayerNorm"],
    "t5": ["final_layer_norm"], "opt": ["final_layer_norm"],
}  # fmt: skip
LAST = {"gpt2": r"h\.1\..*c_attn", "bert": r"layer\.1\..*query", "t5": r"encoder\.block\.1\..*\.q", "opt": r"layers\.1\..*q_proj"}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": "last:2", "alpha_pattern": "last:3"},
    "bias-all": {"r": 4, "bias": "all"},
    "bias-lora-only": {"r": 4, "bias": "lora_only"},
    "lora-bias": {"r": 4, "lora_bias": True},
    "modules-to-save": {"r": 4, "modules_to_save": "norms"},
}
# Llama, T5 and Qwen2's down_proj have no bias for lora_bias to be added to.
NO_BIAS = {("llama", "lora-bias"), ("t5", "lora-bias"), ("qwen2-tied", "lora-bias")}
CASES = [(f, v) for f in models.FAMILIES for v in VARIANTS if (f, v) not in NO_BIAS]


def config_of(family: str, variant: str) -> dict[str, Any]:
    config = {"target_modules": LINEAR[family]} | VARIANTS[variant]
    for key in ("rank_pattern", "alpha_pattern"):
        if key in config:
            config[key] = {LAST.get(family, r"layers\.1\..*q_proj"): int(config[key].split(":")[1])}
    if config.get("modules_to_save"):
        config["modules_to_save"] = NORMS[family]
    return config


def check_parity(family: str, tmp: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Merge by both, compare every tensor to 1e-6 and the logits; returns the merged tensors."""
    base = models.save(models.make(family), tmp / "base")
    adapted = models.peft_adapter(family, tmp / "adapter", **config)
    merge(base, [tmp / "adapter"], tmp / "merged")
    reference = PeftModel.from_pretrained(models.make(family), tmp / "adapter").merge_and_unload().eval()
    models.save(reference, tmp / "reference")
    ours, theirs = (load_file(tmp / d / "model.safetensors") for d in ("merged", "reference"))
    assert set(ours) == set(theirs)
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(ours[n], before[n]) for n in before), "the merge must have changed something"
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(models.outputs(models.load(family, tmp / "merged")), models.outputs(reference))
    del adapted
    return ours


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_float32_merge_equals_peft(family: str, variant: str, tmp_path: Path) -> None:
    """Every family with every kind of adapter: the same tensors to 1e-6 in float32, and the same logits."""
    check_parity(family, tmp_path, **config_of(family, variant))


@pytest.mark.parametrize(
    ("family", "target"),
    [("bert", ["word_embeddings", "position_embeddings"]), ("gpt2", ["wpe"]), ("llama", ["embed_tokens", "q_proj"])],
)
def test_embedding_lora_equals_peft(family: str, target: list[str], tmp_path: Path) -> None:
    """An embedding's LoRA is transposed: ΔW = s·(B@A)ᵀ."""
    check_parity(family, tmp_path, r=4, lora_alpha=6, target_modules=target)


def test_tied_embedding_lora_moves_the_shared_tensor(tmp_path: Path) -> None:
    """On a tied model PEFT's merge adds an embedding's update to the shared tensor; so do we, once."""
    ours = check_parity("qwen2-tied", tmp_path, r=4, target_modules=["embed_tokens", "q_proj"])
    assert "lm_head.weight" not in ours


def test_untied_head_lora_equals_peft(tmp_path: Path) -> None:
    """lm_head with a weight of its own is a linear layer like any other."""
    check_parity("llama", tmp_path, r=4, target_modules=["lm_head", "q_proj"])


@pytest.mark.parametrize("family", ["qwen2-tied", "gpt2", "opt"])
def test_tied_head_lora_unties(family: str, tmp_path: Path) -> None:
    """A tied lm_head's update becomes a tensor of its own, and config.json says so: the logits are the adapter's."""
    base = models.save(models.make(family), tmp_path / "base")
    adapted = models.peft_adapter(family, tmp_path / "adapter", r=4, target_modules=["lm_head", LINEAR[family][0]])
    expected = models.outputs(adapted)
    report = merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert report.totals["untied"]
    merged = models.load(family, tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(models.outputs(merged), expected)


def test_saved_tied_embedding_leaves_the_head_alone(tmp_path: Path) -> None:
    """modules_to_save copies a tied embedding, so PEFT's merge unties; ours equals it, config included."""
    ours = check_parity("qwen2-tied", tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert "lm_head.weight" in ours
    assert models.load("qwen2-tied", tmp_path / "merged").config.tie_word_embeddings is False


def test_saved_head_equals_peft(tmp_path: Path) -> None:
    """A whole lm_head in modules_to_save replaces the base's."""
    check_parity("llama", tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bfloat16_is_the_reference_rounded_once(family: str, tmp_path: Path) -> None:
    """In bfloat16 at least 99.99% of elements are the float64 sum rounded once."""
    from lorasurgery.adapters.formats import open_adapter

    base = models.save(models.make(family, torch.bfloat16), tmp_path / "base")
    models.peft_adapter(family, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=LINEAR[family])
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "merged"))
    adapter, total, same = open_adapter(tmp_path / "adapter"), 0, 0
    for delta in adapter.deltas.values():
        update = adapter.load(delta)
        dense = update.scale * (update.up.double() @ update.down.double())
        name = next(n for n in before if n.endswith(f"{delta.path}.weight"))
        dense = dense.T if family == "gpt2" else dense
        expected = (before[name].double() + dense).to(torch.bfloat16)
        total, same = total + expected.numel(), same + int((expected == after[name]).sum())
    assert same / total >= 0.9999


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """Two adapters of different rank and scaling, one subtracted: W + 0.7·s₁B₁A₁ − 0.3·s₂B₂A₂."""
    base = models.save(models.make("llama"), tmp_path / "base")
    models.peft_adapter("llama", tmp_path / "one", r=4, lora_alpha=6, target_modules=["q_proj"])
    models.peft_adapter("llama", tmp_path / "two", r=2, use_rslora=True, target_modules=["q_proj", "up_proj"])
    merge(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "merged", weights=[0.7, -0.3])
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "merged"))
    name = "model.layers.0.self_attn.q_proj"
    expected = before[f"{name}.weight"].double()
    for folder, weight, scale in (("one", 0.7, 6 / 4), ("two", -0.3, 8 / 2**0.5)):
        f = load_file(tmp_path / folder / "adapter_model.safetensors")
        a, b = (f[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected += weight * scale * (b @ a)
    torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_unmerge_is_the_inverse(family: str, tmp_path: Path) -> None:
    """merge then unmerge --base gives the base's tensors to rounding, replaced ones to the bit, config too."""
    base = models.save(models.make(family), tmp_path / "base")
    config = {"r": 4, "target_modules": LINEAR[family], "modules_to_save": NORMS[family]}
    models.peft_adapter(family, tmp_path / "adapter", **config)
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", weights=[1.0])
    report = unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "restored", base=base)
    assert not report.left_out
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "restored"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
        if "norm" in name.lower() or "ln_f" in name:
            assert torch.equal(after[name], tensor)
    assert (tmp_path / "restored/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_unmerge_names_what_it_could_not_restore(tmp_path: Path) -> None:
    """Without --base replaced tensors stay, and the report and a warning name them."""
    base = models.save(models.make("llama"), tmp_path / "base")
    models.peft_adapter("llama", tmp_path / "adapter", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "restored")
    assert "model.norm.weight" in {m.name for m in report.left_out}
    assert any("base=BASE" in w for w in report.warnings)
