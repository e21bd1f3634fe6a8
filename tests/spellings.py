"""One adapter in all the spellings in which people hold it: the same ΔW under other names, split or fused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import images
import torch
from loose import factors
from safetensors.torch import save_file
from torch import Tensor

from lorasurgery.adapters.image_names.dialects import dialect, family_of
from lorasurgery.adapters.image_names.dictionary import split_leaf

Weights = dict[str, Tensor]
RANK, ALPHA = 4, 2.0


@dataclass(frozen=True)
class Piece:
    """One module's factors; the update is 0.5 · up @ down (alpha 2, rank 4)."""

    down: Tensor
    up: Tensor

    @property
    def delta(self) -> Tensor:
        """The dense update, in the shape of a linear layer's or a convolution's weight."""
        found = (ALPHA / RANK) * self.up.flatten(1) @ self.down.flatten(1)
        return found.reshape(self.up.shape[0], *self.down.shape[1:])


Pieces = dict[str, Piece]


def piece(name: str, shape: tuple[int, ...]) -> Piece:
    """The factors of loose.factors, which are always the same for a name."""
    found = factors(name, shape)
    return Piece(found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"])


def native(kind: str, only: Callable[[str], bool]) -> Pieces:
    """Factors for the denoiser's matrices, by the original's dotted names."""
    state = images.original(images.denoiser(kind))
    named = {split_leaf(k)[0]: tuple(v.shape) for k, v in state.items() if k.endswith("weight") and v.ndim > 1}
    return {name: piece(name, shape) for name, shape in sorted(named.items()) if only(name)}


def split(pieces: Pieces) -> Pieces:
    """The same by diffusers' names: of a fused module every part gets its rows of up and all of down."""
    names = dialect(family_of(pieces))
    found: Pieces = {}
    for name, one in pieces.items():
        spelling = names.spell(name)
        heights = spelling.heights(one.up.shape[0], one.down.shape[1])
        for atom, up in zip(spelling.atoms, one.up.split(heights), strict=True):
            found[atom] = Piece(one.down, up)
    for half in [name for name in found if name.endswith("#scale")]:  # diffusers has the scale above the shift
        whole = half.removesuffix("#scale")
        scale, shift = found.pop(half), found.pop(f"{whole}#shift")
        found[whole] = Piece(scale.down, torch.cat([scale.up, shift.up]))
    return found


def text(model: torch.nn.Module, prefix: str) -> Pieces:
    """Factors for CLIP's attention and MLP by transformers' dotted names, `text_model.` in front."""
    shapes = {n: s for n, s in images.modules(model).items() if "layers" in n}
    names = {n: f"text_model.{n.removeprefix('text_model.')}" for n in shapes}
    return {names[n]: piece(prefix + names[n], s) for n, s in sorted(shapes.items())}


def keys(
    pieces: Pieces,
    prefix: str = "",
    *,
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    alpha: bool = False,
    baked: bool = False,
    dots: str = ".",
) -> Weights:
    """Tensors by key. alpha: with alpha tensors. baked: the scale of ½ is in the factors. dots: what they become."""
    found: Weights = {}
    for name, one in pieces.items():
        path = prefix + name.replace(".", dots)
        found[f"{path}.{down}"] = one.down
        found[f"{path}.{up}"] = one.up * (ALPHA / RANK if baked else 1)
        if alpha:
            found[f"{path}.alpha"] = torch.tensor(ALPHA)
    return found


def kohya(pieces: Pieces, prefix: str) -> Weights:
    """sd-scripts' keys."""
    return keys(pieces, prefix, down="lora_down.weight", up="lora_up.weight", alpha=True, dots="_")


def processors(pieces: Pieces, prefix: str = "unet.") -> Weights:
    """diffusers' keys before it used PEFT: `attn1.processor.to_q_lora.down.weight`."""
    found: Weights = {}
    for name, one in pieces.items():
        block, _, leaf = name.removesuffix(".0").rpartition(".")
        found[f"{prefix}{block}.processor.{leaf}_lora.down.weight"] = one.down
        found[f"{prefix}{block}.processor.{leaf}_lora.up.weight"] = one.up * (ALPHA / RANK)
    return found


def xlabs(pieces: Pieces) -> Weights:
    """XLabs' keys, of Flux's double blocks: stream 1 is the image's, 2 the text's."""
    found: Weights = {}
    for name, one in pieces.items():
        head, number, attention, leaf = name.split(".")
        stem = f"{head}.{number}.processor.{leaf}_lora{1 if attention == 'img_attn' else 2}"
        found |= {f"{stem}.down.weight": one.down, f"{stem}.up.weight": one.up * (ALPHA / RANK)}
    return found


def header(*prefixes: str) -> dict[str, str]:
    """diffusers' metadata that tells alpha for each part."""
    flat = {f"{p}.{k}": v for p in prefixes for k, v in (("r", RANK), ("lora_alpha", ALPHA))}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}


def save(weights: Weights, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a file."""
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, path, metadata)
    return path
