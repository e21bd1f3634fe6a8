"""What a module is called in the files of each format, once its part and path are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorasurgery.adapters.adapter import Format
from lorasurgery.adapters.components import Part
from lorasurgery.adapters.dialects import Family

Naming = Literal["original", "diffusers"]
_KOHYA = {"denoiser": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_"}
_COMFYUI = {
    "denoiser": "diffusion_model.",
    "te1": "text_encoders.clip_l.transformer.",
    "te2": "text_encoders.clip_g.transformer.",
    "te3": "text_encoders.t5xxl.transformer.",
}
_FOLDER = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"}


@dataclass(frozen=True)
class NewNames:
    """The names of one format for one model.

    >>> NewNames("kohya", "unet", sdxl=True).name("te1", "encoder.layers.0.mlp.fc1")
    'lora_te1_text_model_encoder_layers_0_mlp_fc1'

    Args:
        to: The format. family: The denoiser's. sdxl: Whether a U-Net is SDXL's.
    """

    to: Format
    family: Family
    sdxl: bool = False

    @property
    def naming(self) -> Naming:
        """How the file names the denoiser: sd-scripts names SD 1 and 2 as diffusers does, all else originally."""
        if self.to in ("diffusers", "peft"):
            return "diffusers"
        return "original" if self.to == "comfyui" or self.family != "unet" or self.sdxl else "diffusers"

    def name(self, part: Part, path: str) -> str:
        """A module's whole name; sd-scripts numbers text encoders only where there are several."""
        clip = part in ("te1", "te2") and not path.startswith("text_projection")
        if self.to == "kohya":
            alone = part == "te1" and self.family == "unet" and not self.sdxl
            path = f"text_model.{path}" if clip else path
            return ("lora_te_" if alone else _KOHYA[part]) + path.replace(".", "_")
        if self.to == "comfyui":
            return _COMFYUI[part] + (f"text_model.{path}" if clip else path)
        if self.to == "diffusers" or self._has_projection(part):
            path = f"text_model.{path}" if clip else path
        return f"{self.folder(part)}.{path}"

    def folder(self, part: Part) -> str:
        """diffusers' name for a part, the folder it lies in; T5 is Flux's second encoder and SD3's third."""
        if part == "denoiser":
            return "unet" if self.family == "unet" else "transformer"
        return "text_encoder_3" if part == "te3" and self.family == "sd3" else _FOLDER[part]

    def _has_projection(self, part: Part) -> bool:
        """Whether a text encoder is a CLIPTextModelWithProjection, which alone kept `text_model` in transformers 5."""
        return part == "te2" or self.family == "sd3"
