"""Tiny image models with their true names: SD 1, SDXL, Flux, SD3, Wan and HunyuanVideo, as pipelines and as single files."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lorasurgery.adapters.image_names.dialects import dialect, family_of
from lorasurgery.adapters.image_names.dictionary import split_leaf

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
Weights = dict[str, Tensor]


def denoiser(kind: str) -> torch.nn.Module:
    """A tiny U-Net or transformer, always with the same weights."""
    torch.manual_seed(0)
    if kind in ("sd1", "sdxl"):
        xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
              "projection_class_embeddings_input_dim": 32 + 6 * 8, "transformer_layers_per_block": (1, 2, 2),
              "use_linear_projection": True} if kind == "sdxl" else {}  # fmt: skip
        first = "DownBlock2D" if kind == "sdxl" else "CrossAttnDownBlock2D"
        last = "UpBlock2D" if kind == "sdxl" else "CrossAttnUpBlock2D"
        middle = "CrossAttnDownBlock2D" if kind == "sdxl" else "DownBlock2D"
        second = "CrossAttnUpBlock2D" if kind == "sdxl" else "UpBlock2D"
        model: torch.nn.Module = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32, 64), layers_per_block=2, norm_num_groups=8,
            down_block_types=(first, "CrossAttnDownBlock2D", middle), up_block_types=(second, "CrossAttnUpBlock2D", last),
            cross_attention_dim=64 if kind == "sdxl" else 32, attention_head_dim=8, **xl,
        )  # fmt: skip
    elif kind == "flux":
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    elif kind == "sd3":
        model = SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
    elif kind == "hunyuan":
        model = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=1, text_embed_dim=24, pooled_projection_dim=20,
            rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
    else:
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, cross_attn_norm=True, image_dim=16, added_kv_proj_dim=24,
        )  # fmt: skip
    with torch.no_grad():
        for value in model.state_dict().values():  # no two norms or biases alike, or a mix-up would not show
            if value.is_floating_point():
                value.add_(0.02 * torch.randn_like(value))
    return model.eval()


def text_encoder(second: bool = False) -> torch.nn.Module:
    """CLIP, or CLIP with its projection, which SDXL's second encoder has."""
    torch.manual_seed(2 if second else 1)
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(CLIPTextConfig(**_TEXT, projection_dim=32)).eval()


def pipeline(kind: str) -> object:
    """A diffusers pipeline of tiny parts, without tokenizers."""
    torch.manual_seed(4)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        norm_num_groups=4,
    )  # fmt: skip
    common = {"vae": vae, "tokenizer": None, "text_encoder": text_encoder()}
    if kind == "sd1":
        return StableDiffusionPipeline(
            **common, unet=denoiser(kind), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    if kind == "sdxl":
        return StableDiffusionXLPipeline(
            **common,
            tokenizer_2=None,
            text_encoder_2=text_encoder(True),
            unet=denoiser(kind),
            scheduler=DDIMScheduler(),
        )
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    return FluxPipeline(
        **common, text_encoder_2=t5.eval(), tokenizer_2=None, transformer=denoiser(kind),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def smaller(function: Callable[..., Any], width: int) -> Callable[..., Any]:
    """A converter of diffusers with the width 3072, a constant of its code, made as small as the tiny models."""
    sizes = {3072: width, 12288: 4 * width, (3072, 3072, 3072, 12288): (width, width, width, 4 * width)}

    def code(old: CodeType) -> CodeType:
        new = (code(c) if isinstance(c, CodeType) else sizes.get(c, c) for c in old.co_consts)
        return old.replace(co_consts=tuple(new))

    return FunctionType(code(function.__code__), function.__globals__, closure=function.__closure__)


CONVERTERS = {
    "flux": smaller(theirs.convert_flux_transformer_checkpoint_to_diffusers, 32),
    "hunyuan": smaller(theirs.convert_hunyuan_video_transformer_to_diffusers, 32),
    "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "wan": theirs.convert_wan_transformer_to_diffusers,
}


def diffusers_names(kind: str, weights: Weights) -> Weights:
    """An original denoiser's weights as diffusers' own converter names them."""
    if kind in CONVERTERS:
        return CONVERTERS[kind](dict(weights))  # type: ignore[no-any-return]
    config = denoiser(kind).config
    return theirs.convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in weights.items()}, config)  # type: ignore[no-any-return]


def original(model: torch.nn.Module) -> Weights:
    """A denoiser's weights under the original checkpoint's names; test_dialects holds this against diffusers' own."""
    state = {k: v.detach() for k, v in model.state_dict().items()}
    paths = {split_leaf(k)[0] for k in state}
    family = family_of(paths)
    names = dialect(family, len(model.transformer_blocks) if family == "sd3" else None)
    rows: dict[tuple[str, str], Tensor] = {}
    for key, value in state.items():
        path, leaf = split_leaf(key)
        atoms = names.spell(path).atoms
        rows |= {(atom, leaf): part for atom, part in zip(atoms, value.chunk(len(atoms)), strict=True)}
    found: Weights = {}
    for name in names.originals(atom for atom, _ in rows):
        if _other_upsampler(name, names.spell(name).atoms[0], paths):
            continue
        for leaf in ("weight", "bias", ""):
            parts = [rows.pop((atom, leaf), None) for atom in names.spell(name).atoms]
            if parts[0] is not None:
                scaled = leaf == "weight" and name.endswith(("query_norm", "key_norm"))
                found[_join(name, "scale" if scaled else leaf)] = torch.cat(parts)
    return found | {_join(path, leaf): value for (path, leaf), value in rows.items()}


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if leaf else path


def _other_upsampler(name: str, atom: str, paths: set[str]) -> bool:
    """Upsamplers stand after the attention where their level has one: number 2, else 1."""
    if not name.startswith("output_blocks") or not name.endswith(".conv"):
        return False
    level = atom.split(".upsamplers")[0]
    return name.endswith(".1.conv") == any(p.startswith(f"{level}.attentions") for p in paths)


def openclip(model: torch.nn.Module) -> Weights:
    """CLIP's weights as OpenCLIP stores them: q, k and v in one tensor, the projection turned."""
    state = {k.removeprefix("text_model."): v.detach() for k, v in model.state_dict().items()}
    found: Weights = {"text_projection": state.pop("text_projection.weight").T, "logit_scale": torch.tensor(4.6)}
    names = dialect("openclip")
    found["positional_embedding"] = state.pop("embeddings.position_embedding.weight")
    state.pop("embeddings.position_ids", None)
    for name in names.originals(k.rpartition(".")[0] for k in state):
        for leaf in ("weight", "bias"):
            parts = [state.get(f"{atom}.{leaf}") for atom in names.spell(name).atoms]
            if parts[0] is not None:
                found[f"{name}_{leaf}" if name.endswith("in_proj") else f"{name}.{leaf}"] = torch.cat(parts)
    return found


def single_file(kind: str, path: Path) -> Path:
    """The whole model in one file, with the original's names, markers and metadata."""
    weights = {f"model.diffusion_model.{k}": v for k, v in original(denoiser(kind)).items()}
    text = {k: v.detach() for k, v in text_encoder().state_dict().items()}
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    if kind == "sdxl":
        weights |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text.items()}
        weights |= {f"conditioner.embedders.1.model.{k}": v for k, v in openclip(text_encoder(True)).items()}
    elif kind == "sd1":
        weights |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    weights["v_pred"] = torch.tensor([])
    weights["edm_vpred.sigma_max"] = torch.tensor(120.0)
    weights = {k: v.contiguous().clone() for k, v in weights.items()}
    save_file(weights, path, {"modelspec.architecture": kind, "prompt": "a cat"})
    return path


def modules(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every linear layer and convolution that trainers adapt, with its weight's shape."""
    wanted = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, wanted)}


def quiet(function, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Call a library that warns about what is none of our business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def save_pipeline(pipe: object, path: Path) -> Path:
    """save_pretrained, whatever the pipeline."""
    quiet(pipe.save_pretrained, path)  # type: ignore[attr-defined]
    return path


def accepts(function: object, name: str) -> bool:
    """Whether a library's function has this argument."""
    return name in inspect.signature(function).parameters  # type: ignore[arg-type]
