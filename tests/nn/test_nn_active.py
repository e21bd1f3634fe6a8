"""set_adapter and merge: several adapters with weights are what `lorasurgery merge` writes; unmerge is exact."""

from __future__ import annotations

import copy
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorasurgery import nn as surgery
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.nn import LoRALinear, apply_lora, load_adapter, set_adapter
from lorasurgery.nn.modules import layers_of, modules_of
from lorasurgery.ops.merge import merge as merge_files

TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "wpe"],
    "bert": ["query", "output.dense"],
}
FAMILIES = sorted(TARGETS)


def two(family: str, tmp: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Path, Path]:
    """A model with adapters `a` (norms and biases stored whole too) and `b`, and their folders."""
    norms = {"llama": ["norm"], "gpt2": ["ln_f"], "bert": ["LayerNorm"]}[family]
    models.peft_adapter(family, tmp / "a", r=4, target_modules=TARGETS[family], modules_to_save=norms)
    models.peft_adapter(family, tmp / "b", seed=2, r=2, lora_alpha=3, target_modules=TARGETS[family][:1])
    model = models.make(family, dtype)
    load_adapter(load_adapter(model, tmp / "a", "a"), tmp / "b", "b")
    return model, tmp / "a", tmp / "b"


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors by the names they had before adapters were put on."""
    found = {}
    for path, module in modules_of(model).items():
        plain = getattr(module, "original", module)
        found |= {f"{path}.{n}": p for n, p in plain.named_parameters(recurse=False)}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_lorasurgery_merge(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two adapters with weights: the outputs of the checkpoint that merge writes; merged here, its very tensors."""
    _, a, b = two(family, tmp_path, dtype)
    base = models.save(models.make(family, dtype), tmp_path / "base")
    model = models.load(family, base, dtype)
    load_adapter(load_adapter(model, a, "a"), b, "b")
    merge_files(base, [a, b], tmp_path / "merged", weights=[0.7, -0.4], device="cpu")  # where the model is
    expected = models.outputs(models.load(family, tmp_path / "merged", dtype))
    set_adapter(model, {"a": 0.7, "b": -0.4})
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(models.outputs(model), expected, **loose)
    surgery.merge(model)
    assert torch.equal(models.outputs(model), expected)
    ours, theirs = tensors_of(model), load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_switching(tmp_path: Path) -> None:
    """The first adapter acts at once, a later one when it is chosen; a list is weight 1; none leaves the base."""
    model, a, b = two("bert", tmp_path)
    alone = {n: models.outputs(load_adapter(models.make("bert"), p)) for n, p in (("a", a), ("b", b))}
    assert torch.equal(models.outputs(model), alone["a"])
    set_adapter(model, "b")
    assert torch.equal(models.outputs(model), alone["b"])
    set_adapter(model, ["a", "b"])
    both = models.outputs(model)
    set_adapter(model, {"a": 1, "b": 1.0})
    assert torch.equal(models.outputs(model), both)
    for none in (None, [], {}, {"a": 0.0}):
        set_adapter(model, none)
        assert torch.equal(models.outputs(model), models.outputs(models.make("bert")))
    load_adapter(model, a, "c")
    assert torch.equal(models.outputs(model), models.outputs(models.make("bert"))), "it waits for set_adapter"


def test_what_set_adapter_refuses(tmp_path: Path) -> None:
    """Unknown names with the nearest, weights that are not numbers, a merged model, and two values for one tensor."""
    model, a, _ = two("bert", tmp_path)
    models.peft_adapter("bert", tmp_path / "other", seed=5, target_modules=["key"], modules_to_save=["LayerNorm"])
    load_adapter(load_adapter(model, tmp_path / "other", "other"), a, "twin")
    for wrong, words in (
        ("othre", "nearest: other"),
        ({"a": float("nan")}, "nan; expected a finite"),
        ("zzz", "there are: a, b, other, twin"),
    ):
        with pytest.raises(UsageError, match=words):
            set_adapter(model, wrong)
    with pytest.raises(MismatchError, match=r"LayerNorm\.(weight|bias): adapters a and other both replace it"):
        set_adapter(model, ["a", "other"])
    with pytest.raises(MismatchError, match="a and twin"):
        set_adapter(model, {"a": 1, "twin": 0.5})
    set_adapter(model, ["a", "twin"])  # the same values with the same weight are no conflict
    surgery.merge(model)
    with pytest.raises(UsageError, match="unmerge"):
        set_adapter(model, "a")
    with pytest.raises(UsageError, match="the model has none"):
        set_adapter(models.make("bert"), "a")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_is_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """merge leaves the outputs, and unmerge brings the very Parameters back with every bit they had."""
    model, _, _ = two(family, tmp_path, dtype)
    set_adapter(model, {"a": 0.5, "b": 2.0})
    own = tensors_of(model)
    bits, before = {n: t.clone() for n, t in own.items()}, models.outputs(model)
    surgery.merge(model)
    assert sum(not torch.equal(t, bits[n]) for n, t in tensors_of(model).items()) >= 5
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(models.outputs(model), before, **loose)
    surgery.unmerge(model)
    assert torch.equal(models.outputs(model), before)
    after = tensors_of(model)
    assert all(after[n] is t and torch.equal(t, bits[n]) for n, t in own.items())


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_a_shared_table_is_merged_for_each_module(targets: list[str], tmp_path: Path) -> None:
    """With tied weights each module gets its own update once, none gets the other's, and unmerge ties them again."""
    models.peft_adapter("qwen2-tied", tmp_path / "adapter", target_modules=targets)
    model = load_adapter(models.make("qwen2-tied"), tmp_path / "adapter")
    before = models.outputs(model)
    surgery.merge(model)
    torch.testing.assert_close(models.outputs(model), before, rtol=1e-5, atol=1e-5)
    surgery.unmerge(model)
    assert torch.equal(models.outputs(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_twice_and_nothing(tmp_path: Path) -> None:
    """Merging what is merged, merging no adapter, and unmerging what is not merged are wrong usage."""
    model, _, _ = two("llama", tmp_path)
    with pytest.raises(UsageError, match="not merged"):
        surgery.unmerge(model)
    set_adapter(model, None)
    with pytest.raises(UsageError, match="no adapter is active"):
        surgery.merge(model)
    set_adapter(model, "a")
    surgery.merge(model)
    with pytest.raises(UsageError, match=r"unmerge\(model\) first"):
        surgery.merge(model)
    layer = next(layer for layer in layers_of(model).values() if layer.merged)
    with pytest.raises(UsageError, match="merged already"):
        layer.merge()


def test_a_merge_that_fails_changes_nothing() -> None:
    """Infinity in the last layer's factors is named, and the layers before it are as they were."""
    model = apply_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2)
    for layer in model:
        nn.init.ones_(layer.lora_B["default"])
    own = tensors_of(model)
    model[1].lora_A["default"].data[0, 0] = float("inf")
    with pytest.raises(SurgeryError, match=r"^1: the merged values are not finite in float32"):
        surgery.merge(model)
    assert not any(layer.merged for layer in layers_of(model).values())
    assert all(t is own[n] for n, t in tensors_of(model).items())


def test_quantized_weights_run_but_do_not_merge() -> None:
    """A linear layer that keeps its weight in integers takes an adapter, but nothing can be added to the weight."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T.float()

    model = apply_lora(nn.Sequential(Packed()), "0", r=2)
    nn.init.ones_(model[0].lora_B["default"])
    assert model(torch.ones(1, 4)).shape == (1, 2)
    with pytest.raises(SurgeryError, match=r"^0: its weight is quantized \(torch.int8\)"):
        surgery.merge(model)


def test_moving_while_merged(tmp_path: Path) -> None:
    """A cast while merged takes the kept tensors along; a copy unmerges by itself."""
    model, _, _ = two("llama", tmp_path)
    expected = models.outputs(copy.deepcopy(model).double())
    surgery.merge(model)
    other = copy.deepcopy(model).double()
    surgery.unmerge(other)
    assert torch.equal(models.outputs(other), expected)
    assert any(layer.merged for layer in layers_of(model).values())


def test_a_layer_made_by_hand_counts() -> None:
    """A LoRALinear that was put into a model by hand is found by the functions for whole models."""
    model = nn.Sequential(LoRALinear(nn.Linear(4, 3), r=2), nn.ReLU())
    set_adapter(model, None)
    assert model[0].active == {}
    set_adapter(model[0], {"default": 2})
    assert model[0].active == {"default": 2.0}
