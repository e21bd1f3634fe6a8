"""convert: the same update in another format's names, bit for bit wherever both formats can say it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.image_names.components import FOLDER_NAMES, Part, adapter_place, has_parts, is_image_model
from lorasurgery.adapters.image_names.dialects import family_of
from lorasurgery.adapters.image_names.dictionary import Dictionary
from lorasurgery.adapters.image_names.translate import ModuleRows, NewModule, Translator
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.output import check_output
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import MismatchError
from lorasurgery.ops.asked import convert_options
from lorasurgery.ops.conversion.limits import check_place, check_sayable, check_whole
from lorasurgery.ops.conversion.options import Conversion, ConvertOptions, To
from lorasurgery.ops.factors.folders import find_adapters, run_each
from lorasurgery.ops.factors.layout import check_name
from lorasurgery.ops.placement.plan import plan_edits
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch


def convert(
    adapter: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    to: To | None = None,
    portable: bool = False,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write an adapter in another format; factors, alphas and metadata go along as they are.

    Examples:
        ```python
        convert("style.safetensors", "style", to="peft", base="sdxl")
        ```

    Args:
        adapter: Adapter folder or file of any format, or a folder of several.
        out: Folder, or a .safetensors file for all formats but PEFT's.
        options: All of this as an object; what a keyword says too must not be in it.
        to: The format that comes out: peft, kohya, diffusers or comfyui.
        portable: One rank for all (zero-padded), alpha = r, the scale in the factors: what every reader takes.
        rank: Of what has no LoRA factors of its own.
        dtype: What factors are written in, as "bf16", "bfloat16", "BF16" or torch.bfloat16.
        base: The adapter's model: it turns underscores back into dots, and every tensor must match it.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    given = {
        "adapter": adapter, "out": out, "options": options, "to": to, "portable": portable or None, "rank": rank,
        "dtype": dtype, "base": base, "device": device, "overwrite": overwrite, "dry_run": dry_run,
        "progress": progress,
    }  # fmt: skip
    with open_call("convert", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "adapter", "out", "device")
        check_device_name(device)
        settings = convert_options(options, given)
        adapter, model = call.local(adapter), call.local(base)
        several = find_adapters(adapter)
        if several:
            report = run_each(
                "convert", adapter, several,
                lambda one, target: convert(one, target, settings, base=model, device=device, overwrite=overwrite,
                                        dry_run=dry_run, progress=progress),  # which records each
                out, loose=settings.to != "peft", overwrite=overwrite, dry_run=dry_run,
            )  # fmt: skip
            return call.checked(report) if dry_run else call.named(report)
        report = convert_adapter(adapter, Path(out), settings, base=model, device=device, overwrite=overwrite,
                                 dry_run=dry_run, progress=progress)  # fmt: skip
        return call.checked(report) if dry_run else call.recorded(report, [adapter, model])


def convert_adapter(
    adapter: str | Path, out: Path, options: ConvertOptions, *, base: str | Path | None = None, device: str = "auto",
    overwrite: bool = False, dry_run: bool = False, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Convert one adapter, without fetching its inputs or recording the result."""
    clock = Clock()
    check_name(out, loose=options.to != "peft")
    opened = open_adapter(adapter)
    check_output(out, [Path(adapter)], overwrite)
    checkpoint = Checkpoint.open(base) if base is not None else None
    report = Report("convert", [str(adapter), *([str(base)] if base is not None else [])], str(out), dry_run=dry_run)
    plan = plan_conversion(opened, options, checkpoint)
    report.warnings += plan.warnings
    report.modules = [_line(plan, target) for target in plan.targets]
    report.totals = {"from": opened.format, "to": options.to, "modules_in": len(opened.deltas),
                     "modules": len(plan.targets), "matched": plan.matched}  # fmt: skip
    report.summary = f"{opened.format} to {options.to}: {len(opened.deltas)} modules become {len(plan.targets)}"
    if not dry_run:
        from lorasurgery.ops.conversion.write import carry_out  # imports torch

        report.device = str(resolve_device(device))
        carry_out(plan, report, out, overwrite, progress)
    return clock.stamp(report)


def _match(adapter: Adapter, translator: Translator | None, base: Checkpoint, warnings: list[str]) -> int:
    """Every tensor must match the base, save those of a text encoder that it has not."""
    places = translator.places if translator else {}
    out = {path for path, place in places.items() if translator and place.part in translator.lacking}
    left = adapter.without(out) if out else adapter
    if not (left.deltas or left.diffs or left.replaced or left.tokens):
        raise MismatchError(
            f"{base.path}: has no text encoder, and {adapter.path} is for nothing else; leave --base out"
        )
    if out:
        warnings.append(
            f"{base.path} has no text encoder for {len(out)} modules ({min(out)} …); they are translated by the names "
            "that all such encoders have, and their shapes are not checked"
        )
    return plan_edits(base, [left], [1.0]).matched


def plan_conversion(adapter: Adapter, options: ConvertOptions, base: Checkpoint | None) -> Conversion:
    """Settle from headers what each module becomes.

    Raises:
        UnsupportedError: what the new format can't say, by name.
        MismatchError: a module the base does not have.
    """
    plan = Conversion(adapter, options, base=base)
    plan.warnings += check_place(base, options.to, adapter.path)
    check_sayable(plan)
    if adapter.format == "peft" and options.to == "peft":
        if base is not None:
            plan.matched = _match(adapter, None, base, plan.warnings)
        plan.targets = [NewModule("any", path, (ModuleRows(d.shape[0], path),)) for path, d in adapter.deltas.items()]
        return plan
    dictionary = None
    if base is not None:
        dictionary = Dictionary(base.tensors, pipeline=bool(base.parts), config=base.config_of)
    plan.translator = translator = Translator(adapter, options.to, dictionary, _home(adapter, base))
    if base is not None and dictionary is not None:
        plan.matched = _match(adapter, translator, base, plan.warnings)
        plan.kernels = _flat_kernels(adapter, translator, dictionary, base)
    plan.targets = translator.targets({path: delta.shape for path, delta in adapter.deltas.items()})
    for target in plan.targets:
        check_whole(plan, target)
    return plan


def _flat_kernels(
    adapter: Adapter, translator: Translator, dictionary: Dictionary, base: Checkpoint
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path, delta in adapter.deltas.items():
        slots = dictionary.find(translator.places[path]) if not (delta.stores_factors or delta.kernel) else ()
        found |= {path: base.tensors[slots[0].tensor].shape[2:]} if slots else {}
    return found


def _home(adapter: Adapter, base: Checkpoint | None) -> Part | None:
    """The part that a PEFT adapter of one part is for: a base of one part or the folder's name says it, or its names.

    What stands beside a denoiser (a ControlNet, a VAE) goes by its names too: its own load_lora_adapter reads them.
    """
    if adapter.format != "peft":
        return None
    if base is not None and is_image_model(base) and not base.parts and not has_parts(base.tensors):
        return "denoiser"
    place = adapter_place(f"{adapter.folder.name}.") if adapter.folder.name in FOLDER_NAMES else None
    if place is not None:
        return place.part
    return "denoiser" if family_of(adapter.deltas) not in ("plain", "openclip") else None


def _line(plan: Conversion, target: NewModule) -> ModuleReport:
    sources = [plan.adapter.deltas[s] for s in target.sources]
    height, rank = sum(p.height for p in target.pieces), sum(d.rank for d in sources)
    return ModuleReport(plan.name(target), (height, sources[0].shape[1]), kind=sources[0].kind, rank=rank)
