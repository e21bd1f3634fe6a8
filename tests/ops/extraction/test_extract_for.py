"""extract --for: what a program takes, in the file that it reads, and what was left out for it in so many words."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lorasurgery import Budget, ExtractOptions, RankChoice, check, extract
from lorasurgery.errors import UsageError

UNET = {
    "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 8,
    "cross_attention_dim": 16, "attention_head_dim": 4, "sample_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and a fine-tune of all its weights, norms and embeddings too."""
    root = tmp_path_factory.mktemp("llama")
    models.save(models.make("llama"), root / "base")
    models.save(models.perturb(models.make("llama")), root / "tuned")
    return root


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small U-Net of which linear layers and convolutions moved by rank 4."""
    root = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                weight = module.weight
                weight += (0.1 * torch.randn(len(weight), 4) @ torch.randn(4, weight[0].numel())).view_as(weight)
    model.save_pretrained(root / "tuned")
    return root


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_servers_take_what_is_made_for_them(llama: Path, tmp_path: Path, server: str) -> None:
    """The same pair for PEFT has findings; for the server it has none, and the loss is a warning with its share."""
    options = ExtractOptions(RankChoice(rank=4))
    extract(llama / "base", llama / "tuned", tmp_path / "peft", options)
    assert not check(tmp_path / "peft", server).totals["serves"]
    made = extract(llama / "base", llama / "tuned", tmp_path / "own", ExtractOptions(RankChoice(rank=4), client=server))
    assert check(tmp_path / "own", server, base=llama / "base").totals["serves"]
    assert any("left out" in w and server in w for w in made.warnings)
    assert made.totals["left_out_share"] > 0
    assert not [k for k in load_file(tmp_path / "own" / "adapter_model.safetensors") if ".lora_" not in k]


@pytest.mark.parametrize("client", ["diffusers", "comfyui", "kohya"])
def test_image_tools_get_their_file(unet: Path, tmp_path: Path, client: str) -> None:
    """One file, of which the tool's own rules find nothing wrong, and no folder is left beside it."""
    out = tmp_path / "style.safetensors"
    report = extract(unet / "base", unet / "tuned", out, ExtractOptions(RankChoice(rank=4), client=client))
    assert report.output == str(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["style.safetensors"]
    assert report.totals["error"] < 1e-4
    if client != "kohya":
        assert check(out, client, base=unet / "base").totals["serves"]


def test_the_file_is_what_diffusers_fuses_to_the_tuned_weights(unet: Path, tmp_path: Path) -> None:
    """diffusers' own loader and fuse_lora give the fine-tune from the base and the file."""
    out = tmp_path / "style.safetensors"
    extract(unet / "base", unet / "tuned", out, ExtractOptions(RankChoice(rank=4), client="diffusers"))
    model = UNet2DConditionModel.from_pretrained(unet / "base")
    model.load_lora_adapter(load_file(out), prefix="unet")
    model.fuse_lora()
    tuned = UNet2DConditionModel.from_pretrained(unet / "tuned").state_dict()
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            torch.testing.assert_close(value, tuned[name.replace(".base_layer.", ".")], rtol=0, atol=1e-4)


def test_the_name_must_fit(unet: Path, tmp_path: Path) -> None:
    """A folder for an image tool, or a file for PEFT, is refused with what to give instead."""
    with pytest.raises(UsageError, match=r"an adapter for comfyui is one \.safetensors file"):
        extract(unet / "base", unet / "tuned", tmp_path / "folder", ExtractOptions(client="comfyui"))
    with pytest.raises(UsageError, match="an adapter for peft is a folder"):
        extract(unet / "base", unet / "tuned", tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="client nobody: expected one of peft, vllm"):
        extract(unet / "base", unet / "tuned", tmp_path / "a", ExtractOptions(client="nobody"))


def test_ranks_are_one_for_sglang(llama: Path, tmp_path: Path) -> None:
    """Ranks chosen by energy are padded to one, for SGLang reads r alone."""
    options = ExtractOptions(RankChoice(energy=0.9), client="sglang")
    extract(llama / "base", llama / "tuned", tmp_path / "a", options)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} and config["alpha_pattern"] == {}


@pytest.mark.parametrize("client", ["comfyui", "kohya", "diffusers"])
def test_a_budget_that_the_file_exceeds_is_said(unet: Path, tmp_path: Path, client: str) -> None:
    """The budget is kept for the factors; where names and joined modules take more, the report gives both numbers."""
    for budget in (40_000, 80_000, 200_000):
        out = tmp_path / f"{budget}.safetensors"
        options = ExtractOptions(RankChoice(budget=Budget(size=budget)), client=client)
        made = extract(unet / "base", unet / "tuned", out, options)
        size = out.stat().st_size
        assert size < 1.05 * budget
        said = [w for w in made.warnings if f"{budget:,}" in w and f"{size:,}" in w and "does not hold" in w]
        assert bool(said) == (size > budget)
