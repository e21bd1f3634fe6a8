"""An adapter laid out for the disk, whatever its format: the planned weight file, its tensors, the small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.loose_write import LooseFile
from lorasurgery.adapters.module import Module
from lorasurgery.adapters.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft_derive import derived_config
from lorasurgery.adapters.peft_write import factor_keys, with_kernel
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.errors import UsageError
from lorasurgery.ops.compose import Whole

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "pytorch_lora_weights.safetensors"  # what diffusers calls a LoRA in a folder


@dataclass
class Layout:
    """What will be written: one weight file and the files beside it, the last of which makes it complete.

    Args:
        loose: The weight file stands alone, so the output may be a file as well as a folder.
    """

    file: PlannedFile
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    loose: bool = False


def peft_layout(
    sources: Sequence[Adapter], modules: Sequence[Module], whole: Sequence[Whole], cast: str | None = None
) -> Layout:
    """A PEFT folder whose config follows the sources'.

    Args:
        whole: Tensors stored whole. cast: safetensors dtype that floating ones of them are written in.
    """
    from lorasurgery.checkpoint.dtypes import dtype_name

    tensors = peft_tensors(modules)
    tensors |= {_whole_key(w.name, modules): w.value(cast) for w in whole}
    metadata = {"format": "pt"} | {k: v for k, v in sources[0].metadata.items() if sources[0].format == "peft"}
    planned = tuple(PlannedTensor(k, dtype_name(t.dtype), tuple(t.shape)) for k, t in sorted(tensors.items()))
    config = derived_config(
        sources, {m.path: m.update.rank for m in modules}, {m.path: m.alpha for m in modules},
        bias=any(m.bias is not None for m in modules),
    )  # fmt: skip
    if any(m.magnitude is not None for m in modules):
        config["use_dora"] = True
    beside = {CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    return Layout(PlannedFile(WEIGHTS_NAME, planned, metadata), tensors, beside)


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
    return Layout(file.plan(SINGLE, tensors), tensors, loose=True)


def write_layout(layout: Layout, out: Path, overwrite: bool, copies: Mapping[str, Path]) -> int:
    """Write a layout to a folder, or to a file where the format is one; returns the bytes written.

    Args:
        copies: Files that go along: name in the output -> source.
    """
    check_name(out, loose=layout.loose)
    single = out.suffix == ".safetensors"
    file = replace(layout.file, name=out.name) if single else layout.file
    with Output(out, overwrite=overwrite) as output:
        with output.tensor_file(file) as writer:
            for item in file.tensors:
                writer.write(item.name, layout.tensors[item.name])
        if not single:
            for name, source in copies.items():
                output.copy_file(name, source)
            for name, data in layout.beside.items():
                output.write_bytes(name, data)
        output.commit(last=next(iter(layout.beside), file.name) if not single else file.name)
        return output.bytes_written


def check_name(out: Path, *, loose: bool) -> None:
    """Refuse a file's name for a format that is a folder."""
    if out.suffix == ".safetensors" and not loose:
        raise UsageError(f"{out}: a PEFT adapter is a folder (config and weights); give a folder name")
