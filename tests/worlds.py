"""Tiny image models on disk, once for all tests, and what diffusers makes of their adapters."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import images
import loose
import pytest
from diffusers.loaders import lora_pipeline
from torch import Tensor

Weights = dict[str, Tensor]
PARTS = {"sd1": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2"),
         "flux": ("transformer", "text_encoder")}  # fmt: skip


class World:
    """A tiny pipeline of one kind on disk, as a folder and as a single file."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.base = images.save_pipeline(images.pipeline(kind), folder / "base")
        self.single = images.single_file(kind, folder / "single.safetensors")

    @cached_property
    def kohya(self) -> Path:
        """A LoRA on all that diffusers can load of a kohya file: of Flux it takes the blocks only."""
        only = (lambda name: "blocks" in name) if self.kind == "flux" else (lambda _: True)
        return loose.kohya(self.kind, self.folder / "kohya.safetensors", only=only)

    @cached_property
    def fused(self) -> dict[str, Weights]:
        """What diffusers makes of the kohya file."""
        return fuse(self.kind, self.kohya)


def fuse(kind: str, file: Path) -> dict[str, Weights]:
    """diffusers' load_lora_weights and fuse_lora; its converter for Flux knows no other width than 3072."""
    pipe = images.pipeline(kind)
    with pytest.MonkeyPatch.context() as patch:
        name = "_convert_kohya_flux_lora_to_diffusers"
        patch.setattr(lora_pipeline, name, images.smaller(getattr(lora_pipeline, name), 32))
        images.quiet(pipe.load_lora_weights, str(file))
    images.quiet(pipe.fuse_lora, components=list(PARTS[kind]))
    pipe.unload_lora_weights()
    return {part: getattr(pipe, part).state_dict() for part in PARTS[kind]}
