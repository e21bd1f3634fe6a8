"""Adapter files as trainers write them, for tiny image models: kohya's and LyCORIS's families, one a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import images
import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
RANK = 4


def factors(
    name: str, shape: tuple[int, ...], rank: int = RANK, alpha: float | None = 2.0, std: float = 0.1
) -> Weights:
    """lora_down, lora_up and alpha of one module, always the same for a name."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    out, into, *kernel = shape
    found = {
        f"{name}.lora_down.weight": std * torch.randn(rank, into, *kernel, generator=g),
        f"{name}.lora_up.weight": std * torch.randn(out, rank, *[1] * len(kernel), generator=g),
    }
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


def kohya(
    kind: str,
    path: Path,
    *,
    text: bool = True,
    only: Callable[[str], bool] = lambda _: True,
    alpha: float = 2.0,
) -> Path:
    """A LoRA on every linear layer and convolution, named as sd-scripts names them."""
    state = images.original(images.denoiser(kind)) if kind != "sd1" else images.denoiser(kind).state_dict()
    shapes = {n.removesuffix(".weight"): tuple(t.shape) for n, t in state.items() if n.endswith(".weight")}
    weights: Weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1 and only(name):
            weights |= factors(f"lora_unet_{name.replace('.', '_')}", shape, alpha=alpha)
    if text:
        weights |= text_part("lora_te_" if kind == "sd1" else "lora_te1_", images.text_encoder())
        weights |= text_part("lora_te2_", images.text_encoder(True)) if kind == "sdxl" else {}
    metadata = {"ss_network_dim": str(RANK), "ss_network_alpha": "2.0", "ss_base_model_version": kind}
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata)
    return path


def text_part(prefix: str, model: torch.nn.Module) -> Weights:
    """A LoRA on CLIP's attention and MLP, with the `text_model` that its names have had for years."""
    found: Weights = {}
    for name, shape in images.modules(model).items():
        if "layers" in name:
            path = f"text_model.{name.removeprefix('text_model.')}".replace(".", "_")
            found |= factors(prefix + path, shape)
    return found
