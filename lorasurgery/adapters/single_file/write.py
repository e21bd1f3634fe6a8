"""Writing adapters in one file: kohya's keys with alpha tensors, diffusers' with alpha in the header.

kohya's files say alpha by a tensor for each module and are read so by ComfyUI, sd-scripts and diffusers. diffusers'
own files can't: it refuses them with alpha tensors (0.42.1), and ComfyUI does not look at the header. So the scale goes
into the factors wherever that is exact (a power of two; float32 holds what float16 can't), and strength 1 means the
same to both; where it is not, the header keeps alpha to the bit, and `unseen` tells that ComfyUI would not see it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Format, Module
from lorasurgery.adapters.image_names.components import FOLDER_NAMES
from lorasurgery.adapters.peft.write import rank_fields, with_kernel
from lorasurgery.adapters.single_file.header import KEY, with_hashes
from lorasurgery.checkpoint.json_text import parse_object
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.errors import FormatError
from lorasurgery.lowrank import LowRank, widened

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "comfyui": ("lora_A.weight", "lora_B.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
}


@dataclass
class LooseFile:
    """All that goes into one file.

    Args:
        style: Whose keys.
        modules: With factors.
        extra: Tensors by their whole key, such as `….diff_b` and `….set_weight`.
        metadata: The header's, as it was; what the new tensors make untrue is set right.
    """

    style: Format
    modules: Sequence[Module]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by key, in the order in which the safetensors library would lay them out."""
        from lorasurgery.checkpoint.dtypes import dtype_name
        from lorasurgery.checkpoint.header import DTYPE_BITS

        found = {key: t.contiguous() for m in self._modules for key, t in module_tensors(m, self.style).items()}
        found |= self.extra
        return dict(sorted(found.items(), key=lambda item: (-DTYPE_BITS[dtype_name(item[1].dtype)], item[0])))

    def plan(self, name: str, tensors: Mapping[str, Tensor]) -> PlannedFile:
        """The file, with its metadata and hashes brought up to date."""
        from lorasurgery.checkpoint.dtypes import dtype_name

        planned = tuple(PlannedTensor(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items())
        metadata = {k: v for k, v in self.metadata.items() if k not in (KEY, "alpha")}
        if self.style == "kohya":
            metadata = training_metadata(metadata, self._modules)
        elif self.style == "diffusers":
            metadata |= {"format": "pt", KEY: json.dumps(diffusers_config(self._modules), indent=2, sort_keys=True)}
        return with_hashes(PlannedFile(name, planned, metadata), tensors)

    @property
    def unseen(self) -> list[str]:
        """Modules whose alpha ComfyUI would not see, for only the header says it."""
        return [m.path for m in self._modules if m.update.scale != 1] if self.style == "diffusers" else []

    @cached_property
    def _modules(self) -> list[Module]:
        if self.style != "diffusers":
            return list(self.modules)
        found = [replace(m, update=baked(m.update)) for m in self.modules]
        if any(m.bias is not None for m in found):  # PEFT then expects one in every module
            found = [
                m if m.bias is not None else replace(m, bias=m.update.up.new_zeros(len(m.update.up))) for m in found
            ]
        return found


def module_tensors(module: Module, style: Format) -> dict[str, Tensor]:
    """One module's tensors by key.

    >>> import torch
    >>> list(module_tensors(Module("lora_unet_x", LowRank(torch.ones(2, 1), torch.ones(1, 2))), "kohya"))
    ['lora_unet_x.lora_down.weight', 'lora_unet_x.lora_up.weight', 'lora_unet_x.alpha']
    """
    a, b = _KEYS[style]
    down, up = with_kernel(module.update.down, module.update.up, module.kernel)
    found = {f"{module.path}.{a}": down, f"{module.path}.{b}": up}
    if style != "diffusers":
        found[f"{module.path}.alpha"] = alpha_tensor(module.alpha, module.update)
    if module.bias is not None and style == "diffusers":
        found[f"{module.path}.lora_B.bias"] = module.bias / module.update.scale
    elif module.bias is not None:
        found[f"{module.path}.diff_b"] = module.bias
    if module.magnitude is not None:
        leaf = "lora_magnitude_vector" if style == "diffusers" else "dora_scale"
        found[f"{module.path}.{leaf}"] = module.magnitude
    return found


def alpha_tensor(alpha: float, update: LowRank) -> Tensor:
    """alpha as a scalar tensor, wide enough that alpha/r gives the scale to the bit."""
    import torch

    narrow = torch.tensor(alpha, dtype=torch.float32)
    exact = not update.rank or narrow.item() / update.rank == update.scale
    return narrow if exact else torch.tensor(alpha, dtype=torch.float64)


def baked(update: LowRank) -> LowRank:
    """The scale multiplied into up where no bit of ΔW changes by it: a power of two that overflows nothing.

    float16 has few bits for small numbers; where it would lose some, up is held in float32.

    >>> import torch
    >>> [baked(LowRank(torch.ones(2, 1), torch.ones(1, 2), s)).scale for s in (0.5, 0.3)]
    [1.0, 0.3]
    >>> baked(LowRank(torch.full((2, 1), 6e-8, dtype=torch.float16), torch.ones(1, 2), 0.5)).up.dtype
    torch.float32
    """

    if update.scale == 1 or math.frexp(abs(update.scale))[0] != 0.5:
        return update
    wide = widened(update.up.dtype)
    for held in (update.up, update.up.to(wide)):
        up = held * update.scale
        if bool((up / update.scale == held).all()):
            return LowRank(up, update.down)
    return update


def training_metadata(metadata: Mapping[str, str], modules: Sequence[Module]) -> dict[str, str]:
    """sd-scripts' ss_network_*: dim, alpha and arguments as they are now, `Dynamic` where they differ by module."""
    flat = [m for m in modules if math.prod(m.kernel) == 1]
    found = dict(metadata)
    found.setdefault("ss_network_module", "networks.lora")
    found["ss_network_dim"] = _one({m.update.rank for m in flat or modules})
    found["ss_network_alpha"] = _one({float(m.alpha) for m in flat or modules})
    args = _object(found.get("ss_network_args"))
    convs = [m for m in modules if math.prod(m.kernel) > 1]
    for key in ("algo", "use_tucker", "use_cp", "disable_conv_cp", "factor", "decompose_both", "full_matrix"):
        if args.pop(key, None) is not None and key == "algo":
            args["algo"] = "locon"
    if convs:
        args |= {"conv_dim": _one({m.update.rank for m in convs}), "conv_alpha": _one({float(m.alpha) for m in convs})}
    if args:
        found["ss_network_args"] = json.dumps(args)
    return found


def diffusers_config(modules: Sequence[Module]) -> dict[str, Any]:
    """lora_adapter_metadata: a PEFT config for each component, flat, with the component's prefix.

    Paths are written without the text encoders' `text_model.`, which transformers 5 has dropped: PEFT matches endings.
    """
    found: dict[str, Any] = {}
    for part in FOLDER_NAMES:
        mine = {
            m.path[len(part) + 1 :].removeprefix("text_model."): m for m in modules if m.path.startswith(f"{part}.")
        }
        if mine:
            config = {
                **rank_fields({p: m.update.rank for p, m in mine.items()}, {p: m.alpha for p, m in mine.items()}),
                "target_modules": sorted(mine),
                "use_rslora": False,
                "use_dora": any(m.magnitude is not None for m in mine.values()),
                "lora_bias": any(m.bias is not None for m in mine.values()),
                "peft_type": "LORA",
            }
            found |= {f"{part}.{key}": value for key, value in config.items()}
    return found


def _one(values: set[Any]) -> str:
    return str(values.pop()) if len(values) == 1 else "Dynamic"


def _object(text: str | None) -> dict[str, Any]:
    try:
        return parse_object((text or "{}").encode(), "metadata")
    except FormatError:
        return {}
