"""Thirty architectures: an adapter on all their linear layers (and fused experts) merges as PEFT's own merge does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lorasurgery.errors import MismatchError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge

# PEFT refuses what Mamba's fused kernels would pass by.
TARGETS = {"mamba": ["in_proj", "x_proj", "dt_proj"]}


def adapted(name: str, path: Path, seed: int = 1, **config: object) -> PeftModel:
    """A PEFT model of one architecture with random factors, saved to `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(zoo.make(name), LoraConfig(r=4, lora_alpha=6, **config)).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(path, save_embedding_layers=False)
    return model


def check(name: str, model: PeftModel, base: Path, adapter: Path, out: Path) -> None:
    """Merged offline and loaded again, every parameter equals that of merge_and_unload to 1e-6."""
    report = merge(base, [adapter], out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.merge_and_unload().state_dict()
        found = type(zoo.make(name)).from_pretrained(out).state_dict()
    before = zoo.make(name).state_dict()
    moved = 0
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-6, rtol=1e-6), key
        moved += not torch.equal(before[key], value)
    assert moved > 0
    assert report.totals["tensors_touched"] >= moved or name in zoo.FUSED_ON_DISK


@pytest.mark.parametrize("name", zoo.MAKERS)
def test_every_linear_layer(name: str, tmp_path: Path) -> None:
    """Names on disk that differ from those in memory are found by what is known of the family."""
    zoo.make(name).save_pretrained(tmp_path / "base")
    extra = {"target_parameters": zoo.parameters(name)} if name in zoo.EXPERTS else {}
    targets = TARGETS.get(name, "all-linear")
    model = adapted(name, tmp_path / "adapter", target_modules=targets, **extra)
    check(name, model, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", zoo.EXPERTS)
@pytest.mark.parametrize("which", [0, 1], ids=["first", "down_proj"])
def test_one_parameter_of_the_experts(name: str, which: int, tmp_path: Path) -> None:
    """With one parameter its factors have the plain key; the shapes tell which it is."""
    zoo.make(name).save_pretrained(tmp_path / "base")
    model = adapted(name, tmp_path / "adapter", target_modules=[], target_parameters=[zoo.parameters(name)[which]])
    check(name, model, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("pair", "said"),
    [(("mixtral", "qwen3_moe"), "layers.0.mlp.experts.base_layer: the factors have rank 32 but adapter_config.json says 4"),
     (("llava", "vit"), "28 of 28 modules match no tensor in .*: model.language_model.layers.0.mlp.down_proj"),
     (("qwen2_vl", "gpt_neox"), "24 of 24 modules match no tensor in .*: model.language_model.layers.0.mlp.down_proj"),
     (("vit", "beit"), "12 of 13 modules match no tensor in .*: vit.layers.0.attention.k_proj")],
)  # fmt: skip
def test_another_family_is_refused(pair: tuple[str, str], said: str, tmp_path: Path) -> None:
    """An adapter for another architecture names what it can't find, and nothing is written."""
    zoo.make(pair[1]).save_pretrained(tmp_path / "base")
    adapted(pair[0], tmp_path / "adapter", target_modules="all-linear")
    with pytest.raises(MismatchError, match=said):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "llava", "gemma3", "mllama", "qwen2_vl", "qwen2_5_vl", "gpt_neox", "gpt_oss"]
)
def test_extracted_adapters_have_names_in_memory(name: str, tmp_path: Path) -> None:
    """What extract finds under disk names is written under the names that PEFT looks for."""
    model = zoo.make(name)
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=128)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*")
        found = PeftModel.from_pretrained(zoo.make(name), tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(again[k], v, atol=1e-4) for k, v in model.state_dict().items())
    modules = dict(zoo.make(name).named_modules())
    linear = {
        n for n, m in modules.items()
        # nn.MultiheadAttention reads its out_proj's weight itself, so no factors there would ever run
        if isinstance(m, torch.nn.Linear) and type(modules[n.rpartition(".")[0]]) is not torch.nn.MultiheadAttention
    }  # fmt: skip
    adapted_here = {n.removeprefix("base_model.model.") for n, m in found.named_modules() if isinstance(m, LoraLayer)}
    assert len(linear - adapted_here) <= 2 * ("gpt_oss" in name)
