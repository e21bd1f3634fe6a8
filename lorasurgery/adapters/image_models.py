"""What tells an image model's checkpoint from a language model's, and which of its tensors PEFT has no LoRA for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorasurgery.adapters.components import checkpoint_place
from lorasurgery.adapters.dialects import family_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint

# Layers of diffusers' own that look like linear layers and convolutions on disk: PEFT refuses to adapt them.
_OWN_LAYERS = {
    "WanAnimateTransformer3DModel": ("motion_encoder.",),
    "RFD4ProteinaTransformer": ("init_repr_factory.", "cond_factory."),
}


def is_image_model(checkpoint: Checkpoint) -> bool:
    """Tell a denoiser, a VAE or a whole image model: by config.json, by a pipeline's parts, else by its names.

    A config with transformers' `architectures` is a language or vision model's, whatever its tensors are called.
    """
    config = checkpoint.config
    if checkpoint.parts or "_class_name" in config or "_diffusers_version" in config:
        return True
    if config.get("architectures") or config.get("model_type"):
        return False
    return _has_image_names(checkpoint.tensors)


def _has_image_names(tensors: Mapping[str, TensorInfo]) -> bool:
    if any(name.startswith("first_stage_model.") or checkpoint_place(name, pipeline=False)[1] for name in tensors):
        return True
    return family_of(tensors) not in ("plain", "openclip") or any(n.startswith("transformer_blocks.") for n in tensors)


def is_own_layer(class_name: object, path: str) -> bool:
    """Whether a module of a diffusers class is of a kind that PEFT can store whole but has no LoRA for."""
    return isinstance(class_name, str) and path.startswith(_OWN_LAYERS.get(class_name, ()))


def is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Tell a convolution's weight by its name and shape.

    >>> is_convolution("conv_in.weight", (8, 4, 3, 3)), is_convolution("pos_embed", (1, 8, 32))
    (True, False)
    """
    return len(shape) in (3, 4, 5) and name.endswith(".weight")


def not_factored(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> str:
    """Why a convolution can't become factors, in a few words; empty where it can.

    >>> not_factored((8, 1, 3, 3), None)
    'a depthwise convolution, which PEFT can not merge a LoRA into'

    Args:
        shape: Its weight's. bias: Its bias's shape, which tells a transposed one, stored (in, out, *kernel).
    """
    if shape[1] == 1 and math.prod(shape[2:]) > 1:
        return "a depthwise convolution, which PEFT can not merge a LoRA into"
    if bias is not None and bias != shape[:1]:
        return "a transposed convolution, which PEFT has no LoRA for"
    return ""
