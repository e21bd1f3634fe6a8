"""Carrying out a conversion: build every module, lay it out in the new format, write it whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorasurgery.adapters.adapter import Module
from lorasurgery.adapters.image_names.components import FOLDER_NAMES
from lorasurgery.adapters.image_names.dictionary import BaseRows
from lorasurgery.adapters.peft.write import PeftLayout
from lorasurgery.adapters.single_file.header import KEY
from lorasurgery.adapters.single_file.write import LooseFile
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.output import Output
from lorasurgery.engine.threads import load_solvers, thread_pool
from lorasurgery.errors import MismatchError, SurgeryError
from lorasurgery.linalg.norms import row_squares
from lorasurgery.ops.conversion.modules import Assembly, Reduced, factors_of, is_zero, join_vectors, padded, plain_lora
from lorasurgery.ops.conversion.options import Conversion
from lorasurgery.ops.factors.factored import common_dtype
from lorasurgery.ops.factors.layout import (
    Layout,
    by_part,
    check_name,
    loose_layout,
    peft_folder,
    peft_layout,
    write_layout,
)
from lorasurgery.ops.factors.losses import total_error
from lorasurgery.ops.factors.sidecars import not_followed, tokenizer_files
from lorasurgery.report import ModuleReport, Progress, Report


@torch.inference_mode()
def carry_out(plan: Conversion, report: Report, out: Path, overwrite: bool, progress: Progress | None) -> None:
    """Do what was planned and fill in the report."""
    copies = tokenizer_files([plan.adapter]) if plan.options.to == "peft" else {}
    modules, report.modules = _modules(plan, torch.device(report.device), progress)
    layout, unseen = _layout(plan, modules)
    report.warnings += not_followed(None, [plan.adapter] if plan.options.to == "peft" else [])
    check_name(out, loose=layout.loose)
    with Output(out, overwrite=overwrite, inputs=[plan.adapter.path]) as output:
        write_layout(layout, output, copies)
    report.bytes_written = output.bytes_written
    report.bytes_read = plan.adapter.weights.bytes_read
    total_error(report)
    _tell(plan, report, unseen)


def _modules(
    plan: Conversion, device: torch.device, progress: Progress | None
) -> tuple[list[Module], list[ModuleReport]]:
    """All modules of the new file; parts of a fused one in which nothing was ever trained are left out."""
    options, lycoris = plan.options, plan.options.to in ("kohya", "comfyui")
    assembly = Assembly(
        plan.adapter, _reduced(plan, device), options.dtype, plan.kernels, plan.undone, bake=options.portable
    )
    found: list[tuple[Module, float, float]] = []
    costs = [sum(plan.adapter.nbytes_of(s) for s in target.sources) for target in plan.targets]
    done = 0
    for target, cost in zip(plan.targets, costs, strict=True):
        name = plan.name(target)
        try:
            module, error, norm = assembly.build(target, name, lycoris=lycoris)
        except SurgeryError as problem:
            raise type(problem)(f"{plan.adapter.path}: {target.sources[0]}: {problem}") from None
        split = sum(p.height for p in target.pieces) < plan.adapter.deltas[target.sources[0]].shape[0]
        if not (split and is_zero(module)):
            found.append((module, error, norm))
        done += cost
        if progress:
            progress(name, done, sum(costs))
    modules = [m for m, _, _ in found]
    final = padded(modules) if options.portable else modules
    return final, [_line(new, *rest) for new, (_, *rest) in zip(final, found, strict=True)]


def _reduced(plan: Conversion, device: torch.device) -> dict[str, Reduced]:
    """Factors for what the file holds as LoHa, LoKr, Tucker or a whole difference, and for DoRA that is undone."""
    adapter, options = plan.adapter, plan.options
    dtype = torch_dtype(options.dtype or common_dtype([adapter]))
    found: dict[str, Reduced] = {}
    if plan.undone and plan.base is not None:
        found |= plain_lora(plan.base, adapter, dtype, device, options.rank)
    others = [d for d in adapter.deltas.values() if not d.stores_factors and d.path not in found]
    if others:
        load_solvers(device)
    with thread_pool():
        for delta in others:
            update = factors_of(adapter, delta, dtype, device, options.rank)
            if update.rank:  # what is zero keeps the factors that it has
                whole = adapter.load_update(delta).to(device)
                found[delta.path] = Reduced(update, *row_squares(whole, update.to(device)))
    return found


def _line(new: Module, error: float, norm: float) -> ModuleReport:
    flat = (len(new.update.up), new.update.down[0].numel())
    return ModuleReport(
        new.path, flat, kind=new.kind, rank=new.update.rank, alpha=new.alpha, delta_norm=norm, error=error,
        energy=1 - error**2,
    )  # fmt: skip


def _layout(plan: Conversion, modules: Sequence[Module]) -> tuple[Layout, list[str]]:
    """The new file, and the modules whose alpha ComfyUI would not see."""
    adapter, to = plan.adapter, plan.options.to
    metadata = {k: v for k, v in adapter.metadata.items() if k not in (KEY, "alpha")}
    if to == "peft" and plan.translator is None:
        whole = {name: adapter.load_replaced(name) for name in adapter.replaced}
        return peft_layout([adapter], modules, whole), []
    if to == "peft":
        return _peft(plan, modules, metadata), []
    file = LooseFile(to, modules, _vectors(plan), metadata)
    return loose_layout(file), file.unseen


def _peft(plan: Conversion, modules: Sequence[Module], metadata: Mapping[str, str]) -> Layout:
    """A PEFT folder for each part; the folder itself for a denoiser alone, as PeftModel.from_pretrained takes it."""
    assert plan.translator is not None
    parts: dict[str, list[Module]] = {}
    for module in modules:
        folder, _, path = module.path.partition(".")
        parts.setdefault(folder, []).append(
            Module(path, module.update, module.kernel, module.bias, module.magnitude, module.kind)
        )
    found: dict[str, Layout] = {}
    for folder, own in sorted(parts.items(), key=lambda item: FOLDER_NAMES.index(item[0])):
        layout = PeftLayout(
            paths=set(), ranks={m.path: m.update.rank for m in own}, alphas={m.path: m.alpha for m in own}
        )
        config = layout.config() | {
            "target_modules": sorted(m.path for m in own),
            "lora_bias": any(m.bias is not None for m in own),
            "use_dora": any(m.magnitude is not None for m in own),
        }
        found[folder] = peft_folder(own, {}, config, metadata if not found else {})
    alone = next(iter(found)) if len(found) == 1 else ""
    return found[alone] if alone in ("unet", "transformer") else by_part(found)


def _vectors(plan: Conversion) -> dict[str, Tensor]:
    """Tensors that belong to no factors, under their new keys: norms, biases, whole replacements."""
    adapter = plan.adapter
    found: dict[str, Tensor] = {}
    for names, leaves in ((adapter.diffs, ("weight", "bias")), (adapter.replaced, ("weight",))):
        for leaf in leaves if names is adapter.diffs or adapter.format != "peft" else ():
            own = {n.rpartition(".")[0]: key for n, key in names.items() if n.endswith(f".{leaf}")}
            own = {path: key for path, key in own.items() if leaf != "bias" or path not in adapter.deltas}
            tensors = {path: adapter.weights.read(key) for path, key in own.items()}
            found |= _renamed(plan, tensors, {path: key.rpartition(".")[2] for path, key in own.items()})
    if adapter.format == "peft" and adapter.replaced:
        for leaf, ending in (("weight", "diff"), ("bias", "diff_b")):
            tensors = differences(plan, leaf)
            new = _renamed(plan, tensors, dict.fromkeys(tensors, ending))
            found |= {key: t for key, t in new.items() if bool(t.any())}  # a module is stored with what didn't change
    return found


def _renamed(plan: Conversion, tensors: dict[str, Tensor], endings: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by their new keys, those of fused modules put together."""
    assert plan.translator is not None
    found: dict[str, Tensor] = {}
    sizes = {p: (t.shape[0] if t.ndim else 1, _width(plan, p)) for p, t in tensors.items()}
    for target in plan.translator.targets(sizes):
        first = target.sources[0]
        value = tensors[first]
        if len(target.pieces) > 1 or target.pieces[0].height != sizes[first][0]:
            value = join_vectors(target.pieces, dict(tensors))  # type: ignore[assignment]
        found[f"{plan.name(target)}.{endings[first]}"] = value
    return found


def _width(plan: Conversion, path: str) -> int:
    delta = plan.adapter.deltas.get(path)
    return delta.shape[1] if delta else 1


def _tell(plan: Conversion, report: Report, unseen: Sequence[str]) -> None:
    totals = report.totals
    grown = [t for t in plan.targets if len(t.sources) > 1]
    totals |= {"modules": len(report.modules), "fused": len(grown), "alpha_in_header_only": len(unseen)}
    wide = max((m.rank or 0 for m in report.modules), default=0)
    most = max((d.rank for d in plan.adapter.deltas.values()), default=0)
    if grown and wide > most and not plan.options.portable:
        report.warnings.append(
            f"{len(grown)} fused modules hold parts with a lora_A each, so their rank is up to {wide} instead of "
            f"{most}; lorasurgery rerank gives them the least rank that is exact, or any smaller one"
        )
    if unseen:
        report.warnings.append(
            f"alpha of {len(unseen)} modules ({', '.join(unseen[:2])} …) is in the header alone, where diffusers looks "
            "and ComfyUI does not; --portable writes it into the factors, up to rounding"
        )
    if plan.undone:
        report.warnings.append(
            f"{len(plan.undone)} modules were DoRA, which no LoRA is equal to; a higher --rank brings it nearer"
        )
    elif any(d.magnitude for d in plan.adapter.deltas.values()):
        report.warnings.append(
            "this is DoRA: at strength 1 both formats mean the same, at other strengths they do not (docs/formats.md)"
        )
    report.summary = (
        f"{totals['from']} to {totals['to']}: {totals['modules_in']} modules become {totals['modules']}, "
        f"{'bit for bit' if not totals['error'] else 'error {:.2e}'.format(totals['error'])}, "
        f"{report.bytes_written / 1e6:.2f} MB"
    )


def differences(plan: Conversion, leaf: str) -> dict[str, Tensor]:
    """Module path -> tuned − base of all its tensors named `leaf` that are stored whole, in float32 or --dtype.

    Raises:
        MismatchError: a tensor that the base has not, or in another shape.
    """
    dtype = torch_dtype(plan.options.dtype or "F32")
    own = {n.rpartition(".")[0]: n for n in plan.adapter.replaced if n.endswith(f".{leaf}")}
    return {path: _difference(plan, path, name, leaf).to(dtype) for path, name in own.items()}


def _difference(plan: Conversion, path: str, name: str, leaf: str) -> Tensor:
    assert plan.base is not None and plan.translator is not None and plan.translator.dictionary is not None
    value = plan.adapter.load_replaced(name).float()
    slots = plan.translator.dictionary.find(plan.translator.places[path], leaf)
    if not slots:
        raise MismatchError(f"{plan.adapter.path}: {name} is stored whole, and {plan.base.path} has no such tensor")
    for slot in slots:
        rows = slot.rows or slice(None)
        before = _before(plan, slot)
        if before.shape != value[rows].shape:
            raise MismatchError(
                f"{plan.adapter.path}: {name} is {list(value[rows].shape)} but {slot.tensor} of {plan.base.path} is "
                f"{list(before.shape)}, so their difference can't be said; merge the adapter into its base instead"
            )
        value[rows] -= before
    return value


def _before(plan: Conversion, slot: BaseRows) -> Tensor:
    assert plan.base is not None
    tensor = plan.base.read(slot.tensor).to(torch.float32)
    tensor = tensor.T if slot.transposed else tensor
    return tensor if slot.into is None else tensor[slot.into]
