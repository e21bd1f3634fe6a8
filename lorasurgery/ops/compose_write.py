"""The adapter that rerank and blend put together, and how it is laid out as a PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft_derive import derived_config
from lorasurgery.adapters.peft_write import factor_keys, with_kernel
from lorasurgery.checkpoint.dtypes import dtype_name
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.ops.carry import tokenizer_files
from lorasurgery.ops.compose import Joint, Whole
from lorasurgery.ops.factored import Factored, fit, hold, unit_scale
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Composed:
    """Modules with their factors, tensors stored whole, and the adapters they came from.

    Args:
        sources: In the order given; the first one's config is the pattern for the new one.
        whole: Tensors stored whole.
        dtype: safetensors name of what factors are written in.
        cast: Whether tensors stored whole are written in that dtype too.
        dropped: modules without any direction: nothing is left of them, or the budget has no room.
    """

    sources: Sequence[Adapter]
    whole: Sequence[Whole]
    dtype: str
    cast: bool = False
    modules: list[tuple[Joint, Factored]] = field(default_factory=list)
    dropped: list[ModuleReport] = field(default_factory=list)

    def add(self, joint: Joint, found: Factored) -> None:
        """Keep one module, unless it vanished: then it is only reported."""
        kept = _alive(found)
        if kept is None:
            self.dropped.append(found.report)
        else:
            self.modules.append((joint, kept))

    def hold(self, budget: int, *, uniform: bool) -> None:
        """Keep memory near the budget while modules come in."""
        cut = hold([f for _, f in self.modules], budget, unit_scale, uniform=uniform)
        if cut is not None:
            self._keep(cut)

    def spend(self, budget: int, *, uniform: bool) -> None:
        """Cut the factors so that the file takes at most `budget` bytes, all else in it counted."""
        self._keep(fit([f for _, f in self.modules], self.file(), budget, unit_scale, uniform=uniform))

    def pad(self) -> None:
        """Zero-pad every module to the largest rank."""
        top = max((f.update.rank for _, f in self.modules), default=0)
        self.modules = [(joint, f.pad(top)) for joint, f in self.modules]

    def _keep(self, found: list[Factored]) -> None:
        joints, self.modules = [joint for joint, _ in self.modules], []
        for joint, f in zip(joints, found, strict=True):
            self.add(joint, f)

    @property
    def has_bias(self) -> bool:
        """Whether any module's lora_B has a bias, so that PEFT expects one in every linear module."""
        return any(f.bias is not None for _, f in self.modules)

    def tensors(self) -> dict[str, Tensor]:
        """Factors and their biases by key in the file."""
        import torch

        found: dict[str, Tensor] = {}
        for joint, f in self.modules:
            a, b = factor_keys(joint.path, joint.kind)
            found[a], found[b] = with_kernel(f.update.down, f.update.up, joint.kernel)
            if self.has_bias and joint.kind == "linear":
                bias = f.bias if f.bias is not None else torch.zeros(joint.shape[0], dtype=f.update.up.dtype)
                found[b.removesuffix("weight") + "bias"] = (bias.float() / f.update.scale).to(bias.dtype)
        return found

    def file(self) -> PlannedFile:
        """The weight file, planned: every tensor's name, dtype and shape, in order of name."""
        planned = [PlannedTensor(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in self.tensors().items()]
        for item in self.whole:
            info = item.copies[0][0].weights.tensors[item.key]
            dtype = self.dtype if self.cast and info.is_float else info.dtype
            planned.append(PlannedTensor(self._whole_key(item.name), dtype, info.shape))
        metadata = {"format": "pt"} | next(iter(self.sources[0].weights.files.values())).metadata
        return PlannedFile(WEIGHTS_NAME, tuple(sorted(planned, key=lambda t: t.name)), metadata)

    def _whole_key(self, name: str) -> str:
        """PEFT keeps a targeted layer's own tensors under base_layer."""
        path, _, leaf = name.rpartition(".")
        inside = any(joint.path == path for joint, _ in self.modules)
        return f"{PREFIX}{path}.base_layer.{leaf}" if inside else PREFIX + name

    def write(self, out: Path, overwrite: bool) -> int:
        """Write weights, tokenizer files and, last, adapter_config.json; returns the bytes written."""
        config = derived_config(
            self.sources,
            {joint.path: f.update.rank for joint, f in self.modules},
            {joint.path: f.report.alpha or 0.0 for joint, f in self.modules},
            bias=self.has_bias,
        )
        file, factors = self.file(), self.tensors()
        whole = {self._whole_key(item.name): item for item in self.whole}
        with Output(out, overwrite=overwrite) as output:
            with output.tensor_file(file) as writer:
                for item in file.tensors:
                    data = factors[item.name] if item.name in factors else _mean(whole[item.name], item)
                    writer.write(item.name, data)
            for name, source in tokenizer_files(self.sources).items():
                output.copy_file(name, source)
            output.write_bytes(CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
            output.commit(last=CONFIG_NAME)
            return output.bytes_written


def _alive(found: Factored) -> Factored | None:
    """None for a module that has neither directions nor a bias; PEFT wants a direction for the bias to hang on."""
    if found.update.rank:
        return found
    return found.pad(1) if found.bias is not None else None


def _mean(item: Whole, planned: PlannedTensor) -> Tensor:
    from lorasurgery.checkpoint.dtypes import torch_dtype

    (first, share), *others = item.copies
    value = first.load_replaced(item.name)
    if others:
        value = value.float() * share
        for adapter, weight in others:
            value += adapter.load_replaced(item.name).float() * weight
    return value.to(torch_dtype(planned.dtype))
