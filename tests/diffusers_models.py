"""Tiny models of diffusers' classes, and tuned copies of them on disk."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
_CHANNELS: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
    "attention_head_dim": 4,
}  # fmt: skip
_LTX2: dict[str, Any] = {
    **_ATTENTION, **_CHANNELS, "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
    "caption_channels": 32,
}  # fmt: skip
_WAN: dict[str, Any] = {**_ATTENTION, **_CHANNELS, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 32, "model_dim": 32, "ff_dim": 64, "num_visual_blocks": 1,
    "axes_dims": (4, 4, 8),
}  # fmt: skip
_KANDINSKY_TEXT: dict[str, Any] = {**_KANDINSKY, "in_text_dim": 32, "in_text_dim2": 32, "num_text_blocks": 1}
# Classes whose sizes the words in _SMALL don't say.
CONFIGS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {
        **_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8,
    },
    "UNetMotionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"), "num_attention_heads": 4,
        "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"), "motion_num_attention_heads": 4,
    },
    "DreamLiteUNetModel": {
        **_UNET, "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "sample_size": 8,
    },
    "ControlNetModel": {
        **_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (8, 16),
    },
    "FluxControlNetModel": {
        **_ATTENTION, "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
    },
    "SD3ControlNetModel": {
        **_ATTENTION, **_CHANNELS, "sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": 32,
        "pooled_projection_dim": 32, "pos_embed_max_size": 8,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 32,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    },
    "SanaControlNetModel": {
        **_ATTENTION, **_CHANNELS, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "cross_attention_dim": 32, "caption_channels": 32, "sample_size": 8,
    },
    "AutoencoderKL": {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLFlux2": {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "UNet2DModel": {
        **{k: v for k, v in _UNET.items() if k != "cross_attention_dim"}, "sample_size": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "ChromaTransformer2DModel": {
        **_ATTENTION, "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 64, "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    },
    "WanVACETransformer3DModel": {**_WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 8},
    "WanAnimateTransformer3DModel": {
        **_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 32, "motion_encoder_size": 16,
        "motion_style_dim": 16, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 32,
        "face_encoder_num_heads": 2, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    },
    "WanAnimate2Transformer3DModel": {
        "in_dim": 4, "dim": 32, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32, "out_dim": 4, "num_heads": 2,
        "num_layers": 1,
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 32, "vocab_size": 64, "codebook_size": 32, "in_channels": 32, "block_out_channels": 32,
        "num_res_blocks": 1, "downsample": True, "upsample": True, "block_num_heads": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "sample_size": 8,
    },
    "HunyuanImageTransformer2DModel": {
        **_ATTENTION, **_CHANNELS, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
        "text_embed_dim": 32, "text_embed_2_dim": 32, "rope_axes_dim": (8, 8),
    },
    "HiDreamImageTransformer2DModel": {
        **_ATTENTION, **_CHANNELS, "patch_size": 2, "num_single_layers": 1, "caption_channels": [32, 32],
        "text_emb_dim": 32, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 4, 8),
        "max_resolution": (16, 16), "llama_layers": [0, 1],
    },
    "Kandinsky5Transformer3DModel": _KANDINSKY_TEXT,
    "Kandinsky6Transformer3DModel": {**_KANDINSKY_TEXT, "in_audio_dim": 4, "out_audio_dim": 4},
    "Kandinsky6SRTransformer3DModel": _KANDINSKY,
    "Ideogram4Transformer2DModel": {
        **_ATTENTION, "in_channels": 4, "intermediate_size": 64, "adaln_dim": 32, "llm_features_dim": 64,
        "mrope_section": (2, 3, 3),
    },
    "Krea2Transformer2DModel": {
        **_ATTENTION, "in_channels": 4, "num_key_value_heads": 2, "intermediate_size": 64, "timestep_embed_dim": 32,
        "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 64, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 4, 8),
    },
    "LTX2VideoTransformer3DModel": _LTX2,
    "SanaWMLTX2RefinerTransformer3DModel": _LTX2,
    "AnimaTextConditioner": {
        "source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_attention_heads": 2,
        "target_vocab_size": 64,
    },
    "Cosmos3OmniTransformer": {
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "latent_channel": 4, "num_attention_heads": 2,
        "num_hidden_layers": 1, "num_key_value_heads": 2, "patch_latent_dim": 16, "vocab_size": 64,
        "rope_scaling": {"mrope_section": [2, 3, 3]},
    },
    "NucleusMoEImageTransformer2DModel": {
        **_CHANNELS, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 64, "num_key_value_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (16, 24, 24), "num_experts": 2, "moe_intermediate_dim": 32,
        "capacity_factors": [2.0] * 4, "dense_moe_strategy": "leave_first_three_blocks_dense",
    },
    "RFD4ProteinaTransformer": {
        "nlayers": 1, "token_dim": 32, "nheads": 2, "dim_cond": 32, "pair_repr_dim": 32, "latent_dim": 8,
    },
}  # fmt: skip
_SMALL: dict[str, Any] = {
    **_ATTENTION, **_CHANNELS, **dict.fromkeys(
        ("num_single_layers", "num_double_layers", "num_refiner_layers", "n_refiner_layers", "n_layers", "depth",
         "num_blocks", "layers_per_block"), 1,
    ), **dict.fromkeys(
        ("n_heads", "n_kv_heads", "num_key_value_heads", "num_kv_heads", "num_cross_attention_heads", "patch_size"), 2,
    ), **dict.fromkeys(
        ("hidden_size", "dim", "inner_dim", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
         "caption_projection_dim", "caption_channels", "caption_channel", "cap_feat_dim", "text_dim", "text_embed_dim",
         "freq_dim", "text_embed_dim_2", "text_hidden_size", "time_embed_dim"), 32,
    ), **dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dim_rope", "axes_dims"), (4, 4, 8)),
    "ffn_dim": 64, "sample_size": 8, "cross_attention_head_dim": 16,
}  # fmt: skip
_MOST_PARAMETERS = 30_000_000


def adapter_classes() -> list[str]:
    """Every model class of diffusers that has load_lora_adapter."""
    found = [n for n in dir(diffusers) if n.endswith(("Model", "Transformer", "KL", "KLFlux2", "Conditioner"))]
    kinds = {n: getattr(diffusers, n, None) for n in found}
    return sorted(n for n, c in kinds.items() if inspect.isclass(c) and issubclass(c, PeftAdapterMixin))


def make(name: str) -> nn.Module | None:
    """A tiny model with weights of its own; None for classes that these words can't make small."""
    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    for left in ("", "sample_size", "patch_size"):
        known = inspect.signature(kind.__init__).parameters
        config = CONFIGS.get(name) or {k: v for k, v in _SMALL.items() if k in known and k != left}
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(**config).parameters())
            if size <= _MOST_PARAMETERS:
                return _spread(kind(**config).eval())
        except (TypeError, ValueError, AttributeError, AssertionError, IndexError):
            continue
    return None


def _spread(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.05, generator=generator)
    return model


def save_pair(name: str, folder: Path) -> dict[str, torch.Tensor] | None:
    """Write base/ and tuned/: linear layers and convolutions moved by updates of rank 4; the tuned weights."""
    model: Any = make(name)
    if model is None:
        return None
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, _LAYERS):
                up = torch.randn(len(layer.weight), 4, generator=generator)
                down = torch.randn(4, layer.weight[0].numel(), generator=generator)
                layer.weight += (0.025 * up @ down).reshape(layer.weight.shape)
    model.save_pretrained(folder / "tuned")
    return {k: v.clone() for k, v in load(name, folder / "tuned").state_dict().items()}


def load(name: str, folder: Path) -> Any:
    """A model of this class from its folder."""
    return getattr(diffusers, name).from_pretrained(folder)
