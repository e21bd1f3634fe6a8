"""The adapter that extract has found so far, and how it is laid out as a PEFT folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.naming import BaseNames, is_head, module_of
from lorasurgery.adapters.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft_write import PeftLayout, factor_keys
from lorasurgery.checkpoint.dtypes import dtype_name, torch_dtype
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.pairs import Pair

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class AdapterDraft:
    """Factors in PEFT's orientation (on the CPU), and the pairs that will be stored whole.

    Args:
        factors: (pair, update with up (out, r) and down (r, in), alpha), in the order found.
        full: pairs whose tuned tensor is stored whole.
    """

    base: Checkpoint
    tuned: Checkpoint
    rslora: bool
    dtype: str | None
    factors: list[tuple[Pair, LowRank, float]] = field(default_factory=list)
    full: list[Pair] = field(default_factory=list)

    def factor_dtype(self, pair: Pair) -> torch.dtype:
        """What factors are written in: --dtype, else the tuned weight's; 8-bit floats hold no factors, so BF16."""
        name = self.dtype or pair.tuned.dtype
        return torch_dtype("BF16" if name.startswith("F8") else name)

    def add(self, pair: Pair, update: LowRank, alpha: float) -> None:
        """Keep one module's factors, on the CPU and contiguous as they will be written."""
        cpu = LowRank(update.up.cpu().contiguous(), update.down.cpu().contiguous(), update.scale)
        self.factors.append((pair, cpu, alpha))

    def pad(self) -> None:
        """Zero-pad every module to the largest rank; alpha grows with it so that the scale stays."""
        from torch.nn.functional import pad

        top = max((u.rank for _, u, _ in self.factors), default=0)
        for i, (pair, update, alpha) in enumerate(self.factors):
            more = top - update.rank
            ratio = (top / update.rank) ** (0.5 if self.rslora else 1.0)
            wide = LowRank(pad(update.up, (0, more)), pad(update.down, (0, 0, 0, more)), update.scale)
            self.factors[i] = (pair, wide, alpha * ratio)

    @property
    def names(self) -> BaseNames:
        """The base's names, for what is tied to what."""
        return BaseNames(self.base.tensors, self.base.config, str(self.base.path))


def write_adapter(draft: AdapterDraft, tuned: Checkpoint, out: Path, overwrite: bool) -> int:
    """Write adapter_model.safetensors and, last, adapter_config.json; returns the bytes written."""
    layout = PeftLayout(
        paths=_all_paths(draft),
        rslora=draft.rslora,
        base_model=_base_name(draft.base),
        architectures=tuple(a for a in draft.base.config.get("architectures") or [] if isinstance(a, str)),
        fan_in_fan_out=any(pair.treatment == "conv1d" for pair, _, _ in draft.factors),
    )
    tensors = _factor_tensors(draft, layout)
    whole = _full_tensors(draft, layout)
    planned = [PlannedTensor(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()]
    for key, name in whole.items():
        info = tuned.tensors[name]
        planned.append(PlannedTensor(key, (draft.dtype or info.dtype) if info.is_float else info.dtype, info.shape))
    planned.sort(key=lambda t: t.name)
    file = PlannedFile(WEIGHTS_NAME, tuple(planned), {"format": "pt"})
    with Output(out, overwrite=overwrite) as output:
        with output.tensor_file(file) as writer:
            for item in file.tensors:
                data = tensors.get(item.name)
                writer.write(item.name, _whole(tuned, whole[item.name], item) if data is None else data)
        output.write_bytes(CONFIG_NAME, (json.dumps(layout.config(), indent=2) + "\n").encode())
        output.commit(last=CONFIG_NAME)
        return output.bytes_written


def _whole(tuned: Checkpoint, name: str, planned: PlannedTensor) -> Tensor:
    return tuned.read(name).to(torch_dtype(planned.dtype))


def _factor_tensors(draft: AdapterDraft, layout: PeftLayout) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for pair, update, alpha in draft.factors:
        kind = "embedding" if pair.treatment == "embedding" else "linear"
        aliases = _tied_paths(draft, pair) if kind == "embedding" else []
        layout.tied |= bool(aliases)
        for path in [pair.path, *aliases]:
            as_head = is_head(path) and kind == "embedding"
            factors = update.transposed if as_head else update  # the head's weight is the table itself
            a, b = factor_keys(path, "linear" if as_head else kind)
            tensors[a], tensors[b] = factors.down.contiguous(), factors.up.contiguous()
            layout.ranks[path], layout.alphas[path] = update.rank, alpha
    return tensors


def _tied_paths(draft: AdapterDraft, pair: Pair) -> list[str]:
    """Modules that share the pair's table in memory; PEFT adapts each on its own, so each gets the update."""
    own_head = any(is_head(p.path) for p, _, _ in draft.factors) or any(is_head(p.path) for p in draft.full)
    untied = own_head or any(is_head(module_of(n)) for n in draft.tuned.tensors)
    paths = draft.names.tied_paths(pair.base.name) if pair.base else []
    return [p for p in paths if not (is_head(p) and untied)]


def _full_tensors(draft: AdapterDraft, layout: PeftLayout) -> dict[str, str]:
    """Adapter key -> tuned tensor, for all that is stored whole; the layout learns how PEFT will load it."""
    keys: dict[str, str] = {}
    factored = {pair.path for pair, _, _ in draft.factors}
    stored_whole = {p.path for p in draft.full if p.leaf == "weight"}
    for pair in draft.full:
        if pair.leaf == "bias" and _is_matrix(draft, pair.path) and pair.path not in stored_whole:
            inside = "base_layer." if pair.path in factored else ""
            keys[f"{PREFIX}{pair.path}.{inside}bias"] = pair.tuned.name
            layout.bias = "all" if not inside or layout.bias == "all" else "lora_only"
        elif pair.leaf in ("weight", "bias"):
            layout.saved.add(pair.path)
            keys |= _module_tensors(draft, pair)
        else:  # a bare parameter: no module to save, PEFT loads it by its name
            keys[f"{PREFIX}{pair.path}.{pair.leaf}" if "." in pair.name else PREFIX + pair.name] = pair.tuned.name
    return keys


def _module_tensors(draft: AdapterDraft, pair: Pair) -> dict[str, str]:
    """PEFT's modules_to_save wants every parameter of the module, changed or not."""
    stem = pair.tuned.name.rpartition(".")[0]
    found = (f"{stem}.{leaf}" for leaf in ("weight", "bias"))
    return {f"{PREFIX}{pair.path}.{n.rpartition('.')[2]}": n for n in found if n in draft.tuned.tensors}


def _is_matrix(draft: AdapterDraft, path: str) -> bool:
    name = draft.names.find(path)
    return name is not None and len(draft.base.tensors[name].shape) >= 2


def _all_paths(draft: AdapterDraft) -> set[str]:
    names = draft.names
    paths = {module_of(n) for n in draft.tuned.tensors} | {module_of(n) for n in draft.base.tensors}
    paths |= {p.path for p, _, _ in draft.factors} | {p.path for p in draft.full}
    return paths | (set(names.tied_paths(names.input_embedding)) if names.input_embedding else set())


def _base_name(base: Checkpoint) -> str:
    recorded = base.config.get("_name_or_path")
    return recorded if isinstance(recorded, str) and recorded else str(base.path)
