"""PEFT files that hold little: nothing at all, saved modules alone, single rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.peft.read import read_peft
from lorasurgery.errors import FormatError
from lorasurgery.ops.merge import merge

PREFIX = "base_model.model."


def folder(path: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """An adapter folder with just these tensors."""
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    words = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (path / "adapter_config.json").write_text(json.dumps(words))
    return path


def test_no_tensors(tmp_path: Path) -> None:
    """A file without tensors is not an adapter that changes nothing, but an error."""
    path = folder(tmp_path / "adapter", {})
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: holds no tensors, so there is nothing to merge"):
        read_peft(path)


@pytest.mark.parametrize("key", ["model.norm.weight", "model.norm.modules_to_save.default.weight"])
def test_saved_modules_alone(key: str, tmp_path: Path) -> None:
    """Modules stored whole need no factors beside them: they replace the base's, and nothing else changes."""
    base = models.save(models.make("llama"), tmp_path / "base")
    old = load_file(base / "model.safetensors")
    norm = old["model.norm.weight"] + 1
    adapter = read_peft(folder(tmp_path / "adapter", {PREFIX + key: norm}, modules_to_save=["norm"]))
    assert (adapter.deltas, adapter.tokens) == ({}, {})
    assert adapter.replaced == {"model.norm.weight": PREFIX + key}
    assert adapter.added == {"model.norm.weight"}
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    new = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(new.pop("model.norm.weight"), norm)
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())


def test_a_saved_parameter_of_the_model_itself(tmp_path: Path) -> None:
    """A name without a dot, such as CLIP's logit_scale, is the base's name as it stands."""
    weights = {f"{PREFIX}logit_scale": torch.ones(1)}
    assert read_peft(folder(tmp_path / "adapter", weights)).replaced == {"logit_scale": f"{PREFIX}logit_scale"}


def test_rows_alone(tmp_path: Path) -> None:
    """New rows of an embedding need no factors either."""
    base = models.save(models.make("llama"), tmp_path / "base")
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rows = torch.ones(2, old.shape[1])
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    path = folder(tmp_path / "adapter", {key: rows}, trainable_token_indices=[3, 1])
    assert list(read_peft(path).tokens) == ["model.embed_tokens.weight"]
    merge(base, [path], tmp_path / "merged")
    new = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(new[[3, 1]], rows)
    others = [i for i in range(len(old)) if i not in (1, 3)]
    assert torch.equal(new[others], old[others])
