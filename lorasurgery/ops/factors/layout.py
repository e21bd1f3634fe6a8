"""An adapter laid out for the disk, whatever its format: the planned weight file, its tensors, the small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter, Module
from lorasurgery.adapters.peft.read import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft.write import derived_config, factor_keys, with_kernel
from lorasurgery.adapters.single_file.write import LooseFile
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "pytorch_lora_weights.safetensors"  # what diffusers calls a LoRA in a folder


@dataclass
class Layout:
    """What will be written: weight files and the files beside them, the last of which makes it complete.

    Args:
        files: Planned; a file of a part of the model lies in that part's folder and has its prefix.
        tensors: By planned name, prefix included.
        beside: Name -> content.
        loose: The weight file stands alone, so the output may be a file as well as a folder.
    """

    files: tuple[PlannedFile, ...]
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    loose: bool = False


def peft_layout(sources: Sequence[Adapter], modules: Sequence[Module], whole: Mapping[str, Tensor]) -> Layout:
    """A PEFT folder whose config follows the sources', or one for each part of an image model.

    Args:
        whole: Tensors stored whole, by name in memory.
    """
    parts = list(dict.fromkeys(p for a in sources for p in a.members))
    if not parts:
        config = derived_config(
            sources, {m.path: m.update.rank for m in modules}, {m.path: m.alpha for m in modules},
            bias=any(m.bias is not None for m in modules), dora=any(m.magnitude is not None for m in modules),
        )  # fmt: skip
        metadata = {k: v for k, v in sources[0].metadata.items() if sources[0].format == "peft"}
        return peft_folder(modules, whole, config, metadata)
    found = {}
    for part in parts:
        own = [replace(m, path=m.path[len(part) + 1 :]) for m in modules if m.path.startswith(f"{part}.")]
        mine = {name[len(part) + 1 :]: t for name, t in whole.items() if name.startswith(f"{part}.")}
        found[part] = peft_layout([a.members[part] for a in sources if part in a.members], own, mine)
    return by_part({part: layout for part, layout in found.items() if layout.tensors})


def peft_folder(
    modules: Sequence[Module], whole: Mapping[str, Tensor], config: Mapping[str, object], metadata: Mapping[str, str]
) -> Layout:
    """A PEFT folder with this config."""
    from lorasurgery.checkpoint.dtypes import dtype_name

    tensors = peft_tensors(modules) | {_whole_key(name, modules): t for name, t in whole.items()}
    planned = tuple(PlannedTensor(k, dtype_name(t.dtype), tuple(t.shape)) for k, t in sorted(tensors.items()))
    beside = {CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    return Layout((PlannedFile(WEIGHTS_NAME, planned, {"format": "pt"} | dict(metadata)),), tensors, beside)


def by_part(layouts: Mapping[str, Layout]) -> Layout:
    """Several PEFT folders as one output, each in the folder of its part."""
    files: list[PlannedFile] = []
    tensors: dict[str, Tensor] = {}
    beside: dict[str, bytes] = {}
    for part, layout in layouts.items():
        for file in layout.files:
            named = tuple(replace(t, name=f"{part}.{t.name}") for t in file.tensors)
            files.append(replace(file, name=f"{part}/{file.name}", tensors=named, prefix=f"{part}."))
        tensors |= {f"{part}.{key}": t for key, t in layout.tensors.items()}
        beside |= {f"{part}/{name}": data for name, data in layout.beside.items()}
    return Layout(tuple(files), tensors, beside)


def peft_tensors(modules: Sequence[Module]) -> dict[str, Tensor]:
    """Factors, their biases and magnitudes by PEFT's keys."""
    import torch

    found: dict[str, Tensor] = {}
    biased = any(m.bias is not None for m in modules)
    for m in modules:
        a, b = factor_keys(m.path, m.kind)
        found[a], found[b] = with_kernel(m.update.down, m.update.up, m.kernel)
        if biased and m.kind == "linear":  # PEFT then expects one in every linear module
            bias = m.bias if m.bias is not None else torch.zeros(len(m.update.up), dtype=m.update.up.dtype)
            found[b.removesuffix("weight") + "bias"] = (bias.float() / m.update.scale).to(bias.dtype)
        if m.magnitude is not None:
            found[f"{PREFIX}{m.path}.lora_magnitude_vector"] = m.magnitude
    return {key: t.contiguous() for key, t in found.items()}


def _whole_key(name: str, modules: Sequence[Module]) -> str:
    """PEFT keeps a targeted layer's own tensors under base_layer."""
    path, _, leaf = name.rpartition(".")
    inside = any(m.path == path for m in modules)
    return f"{PREFIX}{path}.base_layer.{leaf}" if inside else PREFIX + name


def loose_layout(file: LooseFile) -> Layout:
    """One file without a config."""
    tensors = file.tensors()
    return Layout((file.plan(SINGLE, tensors),), tensors, loose=True)


def write_layout(layout: Layout, output: Output, copies: Mapping[str, Path]) -> None:
    """Write a layout to a folder, or to a file where the format is one.

    Args:
        copies: Files that go along: name in the output -> source.
    """
    files = [replace(f, name=output.name) for f in layout.files] if output.single else layout.files
    for file in files:
        with output.tensor_file(file) as writer:
            for item in file.tensors:
                writer.write(item.name, layout.tensors[item.name])
    if not output.single:
        for name, source in copies.items():
            output.copy_file(name, source)
        for name, data in layout.beside.items():
            output.write_bytes(name, data)
    output.commit(last=next(iter(layout.beside), files[0].name))


def check_name(out: Path, *, loose: bool) -> None:
    """Refuse a file's name for a format that is a folder."""
    if out.suffix == ".safetensors" and not loose:
        raise UsageError(f"{out}: a PEFT adapter is a folder (config and weights); give a folder name")
