"""Which part of an image model a name belongs to: the denoiser (U-Net or transformer) or one of the text encoders.

One adapter file may hold updates for all of them, and one checkpoint may hold all of them, each under prefixes of its
own; this is the table that brings both to the same part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["denoiser", "te1", "te2", "te3", "any"]


@dataclass(frozen=True)
class Place:
    """Where a name points: a part of the model, and the module's path inside it.

    Args:
        dotted: False when the path's dots were turned into underscores, so that only a base can tell them apart.
    """

    part: Part
    path: str
    dotted: bool = True


# The order matters: longer prefixes first.
_CHECKPOINTS: tuple[tuple[str, Part], ...] = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("cond_stage_model.transformer.", "te1"),
    ("cond_stage_model.model.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"),
    ("conditioner.embedders.0.model.", "te1"),  # SDXL's refiner
    ("conditioner.embedders.1.model.", "te2"),
    ("text_encoders.clip_l.transformer.", "te1"),
    ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"),
)
_FOLDERS: tuple[tuple[str, Part], ...] = (
    ("unet.", "denoiser"),
    ("transformer.", "denoiser"),
    ("text_encoder.", "te1"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
)
_UNDERSCORED: tuple[tuple[str, Part], ...] = (
    ("lora_unet__", "denoiser"),  # Wan-Fun
    ("lora_unet_", "denoiser"),
    ("lora_transformer_", "denoiser"),  # OneTrainer
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
    ("lycoris_unet_", "denoiser"),
    ("lycoris_", "any"),  # SimpleTuner, and LyCORIS on any model
)
# The first words of denoisers' own names, which some files use without a prefix.
_BARE = {
    "double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "single_transformer_blocks", "blocks",
    "input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks", "final_layer",
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "conv_in", "conv_out", "time_embed", "time_embedding",
    "label_emb", "add_embedding", "out", "x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out",
    "t_embedder", "y_embedder", "condition_embedder", "text_embedding", "time_projection", "img_emb", "head",
    "patch_embedding", "pos_embed",
}  # fmt: skip
# The layers of CLIP's text model and of T5's encoder that trainers adapt.
_TEXT_PATHS = tuple(
    (re.compile(pattern), dotted)
    for pattern, dotted in (
        (r"encoder_layers_(\d+)_self_attn_([qkv]|out)_proj", r"encoder.layers.\1.self_attn.\2_proj"),
        (r"encoder_layers_(\d+)_mlp_(fc[12])", r"encoder.layers.\1.mlp.\2"),
        (r"(text_projection)", r"\1"),
        (r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_([qkvo]|w[io](?:_[01])?)",
         r"encoder.block.\1.layer.\2.\3.\4"),
    )
)  # fmt: skip
FOLDER_NAMES = tuple(prefix[:-1] for prefix, _ in _FOLDERS)
UNDERSCORED_PREFIXES = tuple(prefix for prefix, _ in _UNDERSCORED)


def adapter_place(path: str) -> Place | None:
    """The place that an adapter's module path names by its prefix; None when the prefix is of no image model.

    >>> adapter_place("lora_te2_text_model_encoder_layers_0_mlp_fc1").part
    'te2'
    >>> adapter_place("diffusion_model.double_blocks.0.img_attn.qkv").path
    'double_blocks.0.img_attn.qkv'
    """
    if "." not in path:
        for prefix, part in _UNDERSCORED:
            if path.startswith(prefix):
                return Place(part, path.removeprefix(prefix), dotted=False)
    for prefix, part in (*_CHECKPOINTS, *_FOLDERS):
        if path.startswith(prefix):
            return Place(part, path.removeprefix(prefix))
    return Place("denoiser", path) if path.split(".")[0] in _BARE else None


def text_path(path: str) -> str | None:
    """The dotted path of a text encoder's layer, of which every model has the same few: no base is needed to tell.

    >>> text_path("encoder_layers_0_self_attn_q_proj"), text_path("encoder_block_1_layer_0_SelfAttention_q")
    ('encoder.layers.0.self_attn.q_proj', 'encoder.block.1.layer.0.SelfAttention.q')
    """
    for pattern, dotted in _TEXT_PATHS:
        match = pattern.fullmatch(path)
        if match:
            return match.expand(dotted)
    return None


def checkpoint_place(tensor: str, *, pipeline: bool) -> tuple[Part, str]:
    """The part of a base's tensor and the prefix that says so; bare names are of a part that is yet to be told.

    Args:
        pipeline: The base is a diffusers folder, whose parts are its folders.
    """
    for prefix, part in _FOLDERS if pipeline else _CHECKPOINTS:
        if tensor.startswith(prefix):
            return part, prefix
    return "any", ""
