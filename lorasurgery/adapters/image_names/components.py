"""What tells an image model from a language model, and which of its parts a name belongs to.

One adapter file may hold updates for all of them, and one checkpoint may hold all of them, each under prefixes of its
own; this is the table that brings both to the same part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorasurgery.adapters.image_names.dialects import family_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint

Part = Literal["denoiser", "te1", "te2", "te3", "any"]


@dataclass(frozen=True)
class PartPath:
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


def adapter_place(path: str) -> PartPath | None:
    """The place that an adapter's module path names by its prefix; None when the prefix is of no image model.

    >>> adapter_place("lora_te2_text_model_encoder_layers_0_mlp_fc1").part
    'te2'
    >>> adapter_place("diffusion_model.double_blocks.0.img_attn.qkv").path
    'double_blocks.0.img_attn.qkv'
    """
    if "." not in path:
        for prefix, part in _UNDERSCORED:
            if path.startswith(prefix):
                return PartPath(part, path.removeprefix(prefix), dotted=False)
    for prefix, part in (*_CHECKPOINTS, *_FOLDERS):
        if path.startswith(prefix):
            return PartPath(part, path.removeprefix(prefix))
    return PartPath("denoiser", path) if path.split(".")[0] in _BARE else None


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


# Layers of diffusers' own that look like linear layers and convolutions on disk: PEFT refuses to adapt them.
_OWN_LAYERS = {
    "WanAnimateTransformer3DModel": re.compile(r"motion_encoder\..*"),
    "RFD4ProteinaTransformer": re.compile(
        r".*\.feature_modules\.(?:token_type|secondary_structure|atom_charge|atomic_element|cath_code\.[cat])"
    ),
}
# Classes whose causal convolutions PEFT can't make again for lora_A: their constructors take no `bias`.
_OWN_CONVOLUTIONS = {
    "AutoencoderKLCosmos", "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3", "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21", "AutoencoderKLWan", "Kandinsky6SRLatentUpscalerBank", "MMAudioVAE",
}  # fmt: skip
# Classes of diffusers 0.42.1 without load_lora_adapter.
_NO_ADAPTERS = re.compile(r"""
    Autoencoder(?!KL$|KLFlux2$).+|AsymmetricAutoencoderKL|.+VAE|.+Vae|VQModel|RFD4ProteinaAutoencoder|.+Vocoder
    |ControlNetUnionModel|ControlNetXSAdapter|CosmosControlNetModel|SparseControlNetModel|UNetControlNetXSModel
    |(?:Flux|SD3)?MultiControlNetModel|HunyuanDiT2D(?:(?:Multi)?ControlNet)?Model|MotionAdapter|MultiAdapter|T2IAdapter
    |AudioLDM2UNet2DConditionModel|I2VGenXLUNet|Kandinsky3UNet|StableCascadeUNet|UNet(?:1D|2D|3DCondition)Model
    |UNetSpatioTemporalConditionModel|UniDiffuserModel|LTX2VideoDiffusionDecoderModel|MiniMaxMusic3.+|StableAudio.+
    |(?:Allegro|EasyAnimate|JoyImageEdit|JoyImageEditPlus|Latte|SanaWM)Transformer3DModel|LongCatAudioDiTTransformer
    |(?:CogView3Plus|DiT|DreamLite|OmniGen|PRX|PixArt)?Transformer2DModel|LuminaNextDiT2DModel|TransformerTemporalModel
    |AceStep(?:AudioTokenDetokenizer|AudioTokenizer|ConditionEncoder)|Cosmos3AVAEAudioTokenizer|T5FilmDecoder
    |AudioLDM2ProjectionModel|CLIPImageProjection|Ideogram4PromptEnhancerHead|Kandinsky6SRLatentUpscalerBank
    |ReduxImageEncoder|UniDiffuserTextDecoder
""", re.VERBOSE)  # fmt: skip
# Denoisers whose original names are known: by a table (dialects.py), or as ComfyUI builds Qwen-Image with diffusers'
# own names (ComfyUI 01f4512, comfy/ldm/qwen_image/model.py).
_KNOWN_NAMES = {
    "UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel",
}  # fmt: skip
_BESIDE = re.compile(r"(?P<vae>Autoencoder|VQModel|.*VAE|.*Vae$)|.*ControlNet")  # models that stand beside a denoiser


def takes_adapters(class_name: str) -> bool:
    """Whether a model class of diffusers has load_lora_adapter.

    >>> takes_adapters("FluxTransformer2DModel"), takes_adapters("AutoencoderKLWan"), takes_adapters("AutoencoderKL")
    (True, False, True)
    """
    return _NO_ADAPTERS.fullmatch(class_name) is None


def beside_denoiser(class_name: str) -> str:
    """What a model is that pipelines and web UIs load no LoRA into: a VAE or a ControlNet; empty for denoisers.

    >>> beside_denoiser("FluxControlNetModel"), beside_denoiser("FluxTransformer2DModel")
    ('a ControlNet', '')
    """
    match = _BESIDE.match(class_name)
    return "" if match is None else "a VAE" if match["vae"] else "a ControlNet"


def has_known_originals(class_name: str) -> bool:
    """Whether the names that ComfyUI and kohya have for a denoiser of diffusers are known here.

    >>> has_known_originals("FluxTransformer2DModel"), has_known_originals("SanaTransformer2DModel")
    (True, False)
    """
    return class_name in _KNOWN_NAMES


def class_of(config: Mapping[str, object]) -> str:
    """The diffusers class that config.json names; empty when none."""
    name = config.get("_class_name")
    return name if isinstance(name, str) else ""


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


def has_parts(tensors: Iterable[str]) -> bool:
    """Whether a single file holds a whole image model, each part under its prefix."""
    return any(n.startswith("first_stage_model.") or checkpoint_place(n, pipeline=False)[1] for n in tensors)


def _has_image_names(tensors: Mapping[str, TensorInfo]) -> bool:
    return (
        has_parts(tensors)
        or family_of(tensors) not in ("plain", "openclip")
        or any(n.startswith("transformer_blocks.") for n in tensors)
    )


def is_own_layer(class_name: str, path: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of a diffusers class is of a layer that PEFT can store whole but has no LoRA for.

    >>> is_own_layer("AutoencoderKLWan", "encoder.conv_in", (8, 3, 3, 3, 3))
    True
    """
    if class_name in _OWN_CONVOLUTIONS and len(shape) in (3, 5):
        return True
    own = _OWN_LAYERS.get(class_name)
    return own is not None and own.fullmatch(path) is not None


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
        shape: Its weight's.
        bias: Its bias's shape, which tells a transposed one, stored (in, out, *kernel).
    """
    if shape[1] == 1 and math.prod(shape[2:]) > 1:
        return "a depthwise convolution, which PEFT can not merge a LoRA into"
    if bias is not None and bias != shape[:1]:
        return "a transposed convolution, which PEFT has no LoRA for"
    return ""
