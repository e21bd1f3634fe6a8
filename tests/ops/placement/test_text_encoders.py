"""Text encoders of single files: each checkpoint's prefix and names, against the sum of base and ΔW."""

from __future__ import annotations

from pathlib import Path

import images
import loose
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

Weights = dict[str, Tensor]


def t5() -> torch.nn.Module:
    torch.manual_seed(3)
    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()


def plain(model: torch.nn.Module) -> Weights:
    """The weights under transformers' names, as single files keep them."""
    state = {k.removeprefix("text_model."): v.detach() for k, v in model.state_dict().items()}
    clip = not any(k.startswith("shared") for k in state)
    return {f"text_model.{k}" if clip and not k.startswith("text_projection") else k: v for k, v in state.items()}


ENCODERS = {
    "sd1": ("cond_stage_model.transformer.", "lora_te_", lambda: images.text_encoder(), False),
    "sd2": ("cond_stage_model.model.", "lora_te_", lambda: images.text_encoder(True), True),
    "sdxl": ("conditioner.embedders.1.model.", "lora_te2_", lambda: images.text_encoder(True), True),
    "refiner": ("conditioner.embedders.0.model.", "lora_te1_", lambda: images.text_encoder(True), True),
    "sd3-l": ("text_encoders.clip_l.transformer.", "lora_te1_", lambda: images.text_encoder(), False),
    "sd3-g": ("text_encoders.clip_g.transformer.", "lora_te2_", lambda: images.text_encoder(True), False),
    "sd3-t5": ("text_encoders.t5xxl.transformer.", "lora_te3_", t5, False),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_prefix(kind: str, tmp_path: Path) -> None:
    """An adapter on all linear layers adds its ΔW to the encoder's weights and to nothing else; unmerge takes it back."""
    prefix, key, make, openclip = ENCODERS[kind]
    model = make()
    base = images.openclip(model) if openclip else plain(model)
    denoiser = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}
    save_file({k: v.contiguous().clone() for k, v in ({prefix + k: v for k, v in base.items()} | denoiser).items()},
              tmp_path / "base.safetensors")  # fmt: skip
    weights: Weights = {}
    for name, shape in images.modules(model).items():
        path = name.removeprefix("text_model.")
        if "layer" in name:
            clip = not path.startswith("encoder.block")
            weights |= loose.factors(key + ("text_model_" if clip else "") + path.replace(".", "_"), shape)
    save_file(weights, tmp_path / "in.safetensors")
    merge(tmp_path / "base.safetensors", [tmp_path / "in.safetensors"], tmp_path / "out.safetensors")
    found, before = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "base.safetensors")

    adapter = open_adapter(tmp_path / "in.safetensors")
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for path, delta in adapter.deltas.items():
        name = next(n for n in images.modules(model) if path.endswith(n.removeprefix("text_model.").replace(".", "_")))
        state[f"{name}.weight"] += adapter.load(delta).dense()
    model.load_state_dict(state)
    expected = images.openclip(model) if openclip else plain(model)
    assert len(found) == len(before)
    assert all(torch.allclose(found[prefix + k], v, atol=1e-6) for k, v in expected.items())
    assert torch.equal(found[next(iter(denoiser))], denoiser[next(iter(denoiser))])
    changed = sum(not torch.equal(found[k], before[k]) for k in found)
    assert changed >= len(adapter.deltas) // (3 if openclip else 1) > 0
    unmerge(tmp_path / "out.safetensors", [tmp_path / "in.safetensors"], tmp_path / "back.safetensors")
    again = load_file(tmp_path / "back.safetensors")
    assert all(torch.allclose(again[k], v, atol=1e-6) for k, v in before.items())
