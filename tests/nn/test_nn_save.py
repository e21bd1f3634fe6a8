"""save_adapter: PEFT loads the folder to the same outputs, and the factors come back to the bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_nn_load import LINEAR, config_of, in_peft
from torch import nn

from lorasurgery import nn as surgery
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.errors import OutputError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.nn import apply_lora, load_adapter, save_adapter, set_adapter
from lorasurgery.nn.modules import layers_of
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge as merge_files


def trained(family: str, **kwargs: Any) -> nn.Module:
    """A model with a LoRA whose B is no longer zero."""
    model = apply_lora(models.make(family), LINEAR[family], **({"r": 4, "alpha": 6} | kwargs))
    for layer in layers_of(model).values():
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    return model


@pytest.mark.parametrize("family", models.FAMILIES)
def test_peft_loads_what_was_trained_here(family: str, tmp_path: Path) -> None:
    """apply_lora, save: PeftModel has equal outputs, open_adapter the very factors, and lorasurgery merge merges it."""
    model = trained(family)
    save_adapter(model, tmp_path / "adapter")
    expected = models.outputs(model)
    torch.testing.assert_close(in_peft(family, tmp_path / "adapter"), expected, rtol=1e-6, atol=1e-6)
    adapter = open_adapter(tmp_path / "adapter")
    layers = layers_of(model)
    assert adapter.deltas.keys() == layers.keys()
    for path, layer in layers.items():
        found = adapter.load(adapter.deltas[path])
        assert torch.equal(found.up, layer.lora_B["default"])
        assert torch.equal(found.down, layer.lora_A["default"])
        assert found.scale == layer.scaling["default"]
    merge_files(models.save(models.make(family), tmp_path / "base"), [tmp_path / "adapter"], tmp_path / "merged")
    merged = models.outputs(models.load(family, tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["rslora", "patterns", "bias-all", "bias-lora-only", "modules-to-save"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_was_loaded_can_be_saved(family: str, variant: str, tmp_path: Path) -> None:
    """Load and save: other ranks and scales by module, biases and modules stored whole; PEFT's outputs as before."""
    models.peft_adapter(family, tmp_path / "one", **config_of(family, variant))
    save_adapter(load_adapter(models.make(family), tmp_path / "one"), tmp_path / "two")
    same = in_peft(family, tmp_path / "one"), in_peft(family, tmp_path / "two")
    torch.testing.assert_close(*same, rtol=1e-6, atol=1e-6)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() <= two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_what_extract_wrote_can_be_saved(family: str, tmp_path: Path) -> None:
    """extract's adapter, loaded and saved: the same tensors, and PEFT's outputs."""
    base = models.save(models.make(family), tmp_path / "base")
    tuned = models.save(models.perturb(models.make(family)), tmp_path / "tuned")
    extract(base, tuned, tmp_path / "one", ExtractOptions(RankChoice(energy=0.8)))
    save_adapter(load_adapter(models.make(family), tmp_path / "one"), tmp_path / "two")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() <= two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    torch.testing.assert_close(
        in_peft(family, tmp_path / "two"), in_peft(family, tmp_path / "one"), rtol=1e-6, atol=1e-6
    )


def test_the_config_says_what_peft_reads(tmp_path: Path) -> None:
    """The smallest exact target_modules, the task of the model's class, and r and alpha as they were given."""
    save_adapter(trained("gpt2"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 6, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_one_of_several_and_while_merged(tmp_path: Path) -> None:
    """Only the named adapter is saved, without the weight it has now, and a merge makes no difference."""
    model = trained("llama")
    apply_lora(model, "o_proj", r=2, name="second")
    save_adapter(model, tmp_path / "plain")
    set_adapter(model, {"default": 0.3, "second": 1.0})
    surgery.merge(model)
    save_adapter(model, tmp_path / "merged")
    save_adapter(model, tmp_path / "second", "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert all(".o_proj." in k for k in load_file(tmp_path / "second/adapter_model.safetensors"))


def test_a_norm_merged_by_another_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    """PEFT wants a saved module's every tensor; those an adapter does not replace are the model's own, merged or not."""
    model = models.make("bert")
    path = "encoder.layer.0.output.LayerNorm"
    models.peft_adapter("bert", tmp_path / "all", target_modules=["query"], modules_to_save=["LayerNorm"])
    load_adapter(model, tmp_path / "all", "all")
    layers_of(model)[path].add_whole("norm", "weight", torch.full((32,), 2.0))
    surgery.merge(model)
    save_adapter(model, tmp_path / "norm", "norm")
    found = load_file(tmp_path / "norm/adapter_model.safetensors")
    assert set(found) == {f"base_model.model.{path}.{leaf}" for leaf in ("weight", "bias")}
    assert torch.equal(found[f"base_model.model.{path}.bias"], models.make("bert").get_submodule(path).bias)
    surgery.unmerge(model)
    set_adapter(model, "norm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = PeftModel.from_pretrained(models.make("bert"), tmp_path / "norm").eval()
    torch.testing.assert_close(models.outputs(model), models.outputs(reference))


def test_what_is_refused(tmp_path: Path) -> None:
    """An unknown adapter, a file's name, and a folder that holds something, unless it may be replaced."""
    model = trained("llama")
    with pytest.raises(UsageError, match="nearest: default"):
        save_adapter(model, tmp_path / "adapter", "defualt")
    with pytest.raises(UsageError, match="an adapter is a folder"):
        save_adapter(model, tmp_path / "adapter.safetensors")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(OutputError, match="not empty"):
        save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
