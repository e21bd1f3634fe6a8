"""The grammar of keys in adapter files without a config."""

from __future__ import annotations

import pytest

from lorasurgery.adapters.single_file.keys import group_keys, is_adapter_key, parse_key
from lorasurgery.errors import FormatError, UnsupportedError

KNOWN = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ("lora_unet_mid_block_attentions_0_proj_in", "down"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "alpha"),
    "lora_unet_x.lora_mid.weight": ("lora_unet_x", "mid"),
    "lora_unet_x.hada_w2_b": ("lora_unet_x", "hada_w2_b"),
    "lora_unet_x.lokr_t2": ("lora_unet_x", "lokr_t2"),
    "lora_unet_x.dora_scale": ("lora_unet_x", "dora_scale"),
    "lora_unet_x.diff_b": ("lora_unet_x", "diff_b"),
    "unet.mid_block.attentions.0.to_q.lora_A.weight": ("unet.mid_block.attentions.0.to_q", "down"),
    "unet.mid_block.attentions.0.to_q.lora_B.default.weight": ("unet.mid_block.attentions.0.to_q", "up"),
    "transformer.x.lora_magnitude_vector": ("transformer.x", "magnitude"),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1", "up"),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "down"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora.up.weight": (
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj", "up"),
    "double_blocks.7.processor.proj_lora1.up.weight": ("double_blocks.7.img_attn.proj", "up"),
    "single_blocks.7.processor.proj_lora.down.weight": ("single_blocks.7.linear2", "down"),
}  # fmt: skip


@pytest.mark.parametrize("key", KNOWN)
def test_every_family_is_parsed(key: str) -> None:
    """A key says its module, as the file writes it, and which part of the update it is."""
    assert parse_key(key) == KNOWN[key]
    assert is_adapter_key(key)


@pytest.mark.parametrize(
    "key", ["model.norm.weight", "lora_unet_x.lora_down", "lora_unet_x.lora_sideways.weight", "", "alpha"]
)
def test_other_keys_are_no_adapter_tensors(key: str) -> None:
    """What is of no family is an error that names it."""
    assert parse_key(key) is None
    with pytest.raises(FormatError, match="is not an adapter tensor"):
        group_keys([key], "a.safetensors")


def test_one_tensor_for_each_part() -> None:
    """Two spellings of one part in a file are an error: which is meant?"""
    with pytest.raises(FormatError, match="are both down of x"):
        group_keys(["x.lora_down.weight", "x.lora_A.weight"], "a.safetensors")


@pytest.mark.parametrize(("key", "name"), [("lora_unet_x.oft_blocks", "OFT"), ("lora_unet_x.on_input", "IA3"),
                                           ("lora_unet_x.a1.weight", "GLoRA"), ("lora_controlnet", "Control-LoRA")])  # fmt: skip
def test_what_is_no_sum_is_refused_by_name(key: str, name: str) -> None:
    """Families without an additive update are known, and said so."""
    with pytest.raises(UnsupportedError, match=name):
        group_keys([key], "a.safetensors")
