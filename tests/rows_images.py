"""Rows of the table for image models' files: diffusers as the oracle where it reads them, else sums in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import images
import loose
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rows import Made, Row, Weights
from safetensors.torch import load_file, save_file
from torch import Tensor

ORACLE = f"diffusers {version('diffusers')}"


def fused(unet: torch.nn.Module) -> Weights:
    """The U-Net's weights after fuse_lora, by their plain names."""
    images.quiet(unet.fuse_lora)
    return {k.replace(".base_layer.", "."): v.detach() for k, v in unet.state_dict().items() if ".lora_" not in k}


def unet_of(path: Path, dtype: torch.dtype) -> tuple[Path, torch.nn.Module]:
    """A tiny SD 1 U-Net as a checkpoint folder, and the same in float64."""
    images.denoiser("sd1").to(dtype).save_pretrained(path / "base")
    return path / "base", images.denoiser("sd1").to(dtype).double()


def kohya(path: Path, adapter: torch.dtype, stored: torch.dtype) -> Made:
    """sd-scripts' keys on all linear layers and convolutions, fused by diffusers."""
    base, unet = unet_of(path, stored)
    file = loose.kohya("sd1", path / "adapter.safetensors", text=False)
    save_file({k: v.to(adapter) for k, v in load_file(file).items()}, file)
    wide = {k: v.double() for k, v in load_file(file).items()}
    converted, alphas = images.quiet(StableDiffusionPipeline.lora_state_dict, wide, unet_config=unet.config)
    images.quiet(unet.load_lora_adapter, converted, network_alphas=alphas, prefix="unet")
    return Made(base, file, fused(unet))


def diffusers(path: Path, adapter: torch.dtype, stored: torch.dtype) -> Made:
    """diffusers' own keys with ranks and alphas in the header, as save_lora_weights writes them."""
    base, unet = unet_of(path, stored)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"to_v": 3}, init_lora_weights=False
    )
    images.quiet(unet.add_adapter, config)
    found = {k: v.detach().to(adapter) for k, v in get_peft_model_state_dict(unet).items()}
    for name, p in unet.named_parameters():
        if ".lora_" in name:
            p.data = p.data.to(adapter).to(torch.float64)
    images.quiet(
        StableDiffusionPipeline.save_lora_weights, path / "adapter", unet_lora_layers=found,
        unet_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    return Made(base, path / "adapter", fused(unet))


def sums(
    names: Callable[[], dict[str, tuple[str, int]]], path: Path, adapter: torch.dtype, stored: torch.dtype
) -> Made:
    """A tiny Flux checkpoint and factors; each module adds up·down to rows of a fused tensor."""
    g = torch.Generator().manual_seed(5)
    base = {f"model.diffusion_model.double_blocks.0.{s}_attn.{leaf}": torch.randn(*shape, generator=g).to(stored)
            for s in ("img", "txt") for leaf, shape in (("qkv.weight", (24, 8)), ("qkv.bias", (24,)), ("proj.weight", (8, 8)))
            }  # fmt: skip
    save_file(base, path / "base.safetensors")
    expected, found = {k: v.double() for k, v in base.items()}, {}
    for template, (target, start) in names().items():
        name = f"model.diffusion_model.{target}"
        rows = 8 if "proj" in target or start >= 0 else 24
        down, up = (torch.randn(*s, generator=g).to(adapter) for s in ((2, 8), (rows, 2)))
        found |= {template.format("A", "down"): down, template.format("B", "up"): up}
        at = slice(start, start + 8) if start >= 0 else slice(None)
        expected[f"{name}.weight"][at] += up.double() @ down.double()
        if template.startswith("double_blocks") and "processor" not in template:  # BFL's own files
            bias = torch.randn(rows, generator=g).to(adapter)
            found[template.format("B", "").removesuffix("weight") + "bias"] = bias
            expected[f"{name}.bias"][at] += bias.double()
    return Made(path / "base.safetensors", _save(path, found), expected)


def _save(path: Path, found: dict[str, Tensor]) -> Path:
    save_file(found, path / "adapter.safetensors", {"note": json.dumps({})})
    return path / "adapter.safetensors"


_QKV, _PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"


def _native() -> dict[str, tuple[str, int]]:
    return {f"diffusion_model.{p}.lora_{{0}}.weight": (p, -1) for p in (_QKV, _PROJ)}


def _split() -> dict[str, tuple[str, int]]:
    stem = "transformer.transformer_blocks.0.attn"
    return {
        f"{stem}.{n}.lora_{{0}}.weight": (_QKV, 8 * i) for i, n in enumerate(("to_q", "to_k", "to_v")) if n != "to_k"
    }


def _xlabs() -> dict[str, tuple[str, int]]:
    stem = "double_blocks.0.processor"
    return {f"{stem}.qkv_lora1.{{1}}.weight": (_QKV, -1), f"{stem}.proj_lora1.{{1}}.weight": (_PROJ, -1)}


F32, HALF, WIDE = ("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")
ROWS = [Row("kohya", "linear and conv", ORACLE, kohya, *pair) for pair in (F32, HALF, WIDE)]
ROWS += [Row("diffusers", "linear", ORACLE, diffusers, *pair) for pair in (F32, HALF)]
ROWS += [
    Row("ComfyUI, original names", "fused qkv", "float64", partial(sums, _native), *F32),
    Row(
        "BFL, with biases",
        "fused qkv",
        "float64",
        partial(sums, lambda: {f"{_QKV}.lora_{{0}}.weight": (_QKV, -1)}),
        *F32,
    ),
    Row("diffusers", "q and v into fused qkv", "float64", partial(sums, _split), *F32),
    Row("diffusers", "q and v into fused qkv", "float64", partial(sums, _split), *WIDE),
    Row("XLabs", "fused qkv", "float64", partial(sums, _xlabs), *F32),
]
