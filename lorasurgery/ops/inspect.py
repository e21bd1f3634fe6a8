"""inspect: what the headers of a checkpoint or an adapter tell, and what in them is allowed but seldom meant."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.model_names.naming import BaseNames, commonest_dtype, count_parameters, is_head, module_of
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.header import PICKLE_SUFFIXES
from lorasurgery.checkpoint.inplace.recover import in_the_middle, unfinished
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.atomic_file import PARTIAL
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import SurgeryError, UsageError, some
from lorasurgery.module_location import location_of
from lorasurgery.ops.factors.folders import find_adapters, run_each
from lorasurgery.ops.merging.undo.record import read_undo_record, stack
from lorasurgery.ops.placement.plan import plan_edits
from lorasurgery.ops.placement.quantized import scale_of
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import ModuleReport, Progress, Report, Spectrum, Stored

if TYPE_CHECKING:
    from torch import Tensor


def inspect_checkpoint(path: str | Path) -> Report:
    """Say what a checkpoint is; the arguments and what can go wrong are inspect's."""
    model = Checkpoint.open(path, unfinished=True)
    report = Report("inspect", [str(path)], "")
    report.modules = [
        Stored(_module(t.name), t.shape, kind=location_of(_module(t.name)).kind, dtype=t.dtype, bytes=t.nbytes,
               file=model.file_of[t.name])
        for t in model.tensors.values()
    ]  # fmt: skip
    report.totals = _totals(model)
    report.totals["undo"] = [[a.name for a in read_undo_record(p).adapters] for p in stack(Path(path))]
    about = unfinished(Path(path))
    if about is not None:
        report.totals["unfinished"] = str(about.get("call", ""))
        report.totals["odd"].insert(0, in_the_middle(Path(path), about))
    report.summary = _summary(report.totals)
    return report


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _totals(model: Checkpoint) -> dict[str, Any]:
    names = BaseNames(model.tensors, model.config, str(model.path))
    layers: dict[str, set[int]] = defaultdict(set)
    for name in model.tensors:
        place = location_of(_module(name))
        if place.layer is not None:
            layers[place.stack].add(place.layer)
    architectures = model.config.get("architectures")
    dtypes: Counter[str] = Counter()
    for info in model.tensors.values():
        dtypes[info.dtype] += info.nbytes
    embedding = names.input_embedding
    return {
        "what": "checkpoint", "layout": _layout(model), "files": len(model.files),
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": model.config.get("model_type"), "tensors": len(model.tensors),
        "parameters": count_parameters(model), "bytes": model.nbytes, "dtypes": dict(dtypes.most_common()),
        "layers": {stack: len(found) for stack, found in layers.items()},
        "tied": bool(embedding and names.tied_paths(embedding)), "by_kind": _by_kind(model),
        "odd": odd_in_checkpoint(model),
    }  # fmt: skip


def _layout(model: Checkpoint) -> str:
    if model.parts:
        return "diffusers folder"
    return "sharded folder" if model.index_name else "single file"


def _by_kind(model: Checkpoint) -> list[dict[str, Any]]:
    """A row for each kind of tensor, those of the most bytes first."""
    groups: dict[str, dict[str, Any]] = {}
    for info in model.tensors.values():
        kind = location_of(_module(info.name)).kind
        row = groups.setdefault(kind, {"kind": kind, "tensors": 0, "parameters": 0, "bytes": 0, "shape": info.shape})
        row["tensors"] += 1
        row["parameters"] += prod(info.shape)
        row["bytes"] += info.nbytes
        row["shape"] = row["shape"] if row["shape"] == info.shape else None
    whole = max(model.nbytes, 1)
    ordered = sorted(groups.values(), key=lambda row: -row["bytes"])
    return [row | {"share": row["bytes"] / whole} for row in ordered]


def _summary(t: dict[str, Any]) -> str:
    what = t["architecture"] or t["model_type"] or "a checkpoint"
    layers = " + ".join(str(n) for n in t["layers"].values())
    dtypes = ", ".join(t["dtypes"])
    return (
        f"{what}, {t['layout']} ({t['files']} file{'s' if t['files'] > 1 else ''}): {t['parameters']:,} parameters in "
        f"{t['tensors']} tensors of {dtypes}, {t['bytes'] / 1e6:,.1f} MB"
        + (f"; {layers} layers" if layers else "")
        + ("; embedding and head are tied" if t["tied"] else "")
        + "".join(f"; {', '.join(names)} merged, which can be undone to the bit" for names in t["undo"])
    )


RANKS = (4, 8, 16, 32, 64)
_FORMATS = {"peft": "PEFT", "kohya": "kohya's", "diffusers": "diffusers'", "comfyui": "ComfyUI's"}


def inspect_adapter(
    path: str | Path,
    *,
    spectrum: bool = False,
    base: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Say what an adapter is; the arguments and what can go wrong are inspect's."""
    adapter = open_adapter(path)
    model = Checkpoint.open(base) if base is not None else None
    report = Report("inspect", [str(path), *([str(base)] if base is not None else [])], "")
    report.modules = [
        ModuleReport(d.path, d.shape, kind=d.kind, rank=d.rank, alpha=d.alpha) for d in adapter.deltas.values()
    ]
    report.full = [
        ModuleReport(name, adapter.weights.tensors[key].shape, kind="whole") for name, key in adapter.replaced.items()
    ]
    report.totals = _adapter_totals(adapter)
    if model:
        report.totals |= {"matched": plan_edits(model, [adapter], [1.0]).matched} | _beside(report.totals, model)
    report.totals["odd"] = odd_in_adapter(adapter, model)
    report.summary = _adapter_summary(report, adapter)
    if spectrum:
        report.device = str(resolve_device(device))
        report.modules = _spectra(adapter, report.device, progress)
        _add_energy(report)
        if any(d.magnitude for d in adapter.deltas.values()):
            report.warnings.append("this is DoRA: the spectra are those of B·A, before the weight's norm is set")
    report.bytes_read = adapter.weights.bytes_read
    return report


def _beside(totals: dict[str, Any], model: Checkpoint) -> dict[str, Any]:
    """The adapter's size beside its model's."""
    parameters = count_parameters(model)
    return {
        "base_parameters": parameters, "base_bytes": model.nbytes,
        "parameter_share": totals["parameters"] / parameters if parameters else None,
        "byte_share": totals["adapter_bytes"] / model.nbytes if model.nbytes else None,
    }  # fmt: skip


def _adapter_totals(adapter: Adapter) -> dict[str, Any]:
    deltas = list(adapter.deltas.values())
    ranks = [d.rank for d in deltas]
    return {
        "what": "adapter",
        "format": adapter.format,
        "forms": sorted({d.form for d in deltas}),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "modules": len(deltas),
        "full": len(adapter.replaced),
        "rank_min": min(ranks, default=0),
        "rank_max": max(ranks, default=0),
        "rslora": bool(adapter.config.get("use_rslora")),
        "dtypes": sorted({t.dtype for t in adapter.weights.tensors.values()}),
        "parameters": sum(math.prod(adapter.weights.tensors[n].shape) for d in deltas for n in d.names),
        "adapter_bytes": adapter.weights.nbytes,
    }


def _adapter_summary(report: Report, adapter: Adapter) -> str:
    t = report.totals
    ranks = f"{t['rank_min']}" if t["rank_min"] == t["rank_max"] else f"{t['rank_min']} to {t['rank_max']}"
    return (
        f"{_FORMATS[t['format']]} {_forms(adapter, t)} on {t['modules']} modules, rank {ranks}, "
        f"{t['parameters']:,} parameters in {', '.join(t['dtypes'])}, {t['adapter_bytes'] / 1e6:.2f} MB"
        + (f" ({t['parameter_share']:.2%} and {t['byte_share']:.2%} of the base's)" if "base_bytes" in t else "")
        + (f"; {t['full']} tensors stored whole" if t["full"] else "")
        + (f"; for {t['base_model']}" if t["base_model"] else "")
    )


def _forms(adapter: Adapter, totals: dict[str, Any]) -> str:
    titles = {delta.form: delta.title for delta in adapter.deltas.values()}
    found = " and ".join(titles[form] for form in totals["forms"]) or "nothing of lower rank"
    return f"{found} (rsLoRA)" if totals["rslora"] else found


def _spectra(adapter: Adapter, device: str, progress: Progress | None) -> list[ModuleReport]:
    import torch

    found: list[ModuleReport] = []
    total = sum(d.rows * sum(d.shape) for d in adapter.deltas.values())
    done = 0
    with torch.inference_mode():
        for delta in adapter.deltas.values():
            found += [_spectrum(adapter, delta, e, device) for e in (range(delta.experts) if delta.experts else [None])]
            done += delta.rows * sum(delta.shape)
            if progress:
                progress(delta.path, done, total)
    return found


def _spectrum(adapter: Adapter, delta: Delta, expert: int | None, device: str) -> Spectrum:
    from lorasurgery.linalg.core import recompress
    from lorasurgery.lowrank import LowRank

    name = delta.path if expert is None else f"{delta.path}[{expert}]"
    try:
        update = adapter.load(delta) if expert is None else adapter.load_expert(delta, expert)
        core = recompress([LowRank(update.up.to(device), update.down.to(device), update.scale)])
    except SurgeryError as problem:
        text = str(problem)  # what can't be read says so by itself
        raise type(problem)(text if delta.path in text else f"{adapter.path}: {delta.path}: {text}") from None
    values = core.singular[: core.rank]
    return Spectrum(
        name, delta.shape, kind=delta.kind, rank=delta.rank, alpha=delta.alpha, delta_norm=core.total**0.5,
        singular_values=values.tolist(), **_shares(values),
    )  # fmt: skip


def _shares(values: Tensor) -> dict[str, Any]:
    """Effective rank, stable rank and energies of singular values in falling order; nothing for a zero update."""
    if not len(values):
        return {}
    values = values / values[0]  # the squares of very small ones would be nothing
    share, energy = values / values.sum(), values.square()
    total = float(energy.sum())
    return {
        "effective_rank": float((-share * share.log()).sum().exp()),
        "stable_rank": total,
        "energy_at": {r: float(energy[:r].sum()) / total for r in RANKS},
    }


def _add_energy(report: Report) -> None:
    spectra = [m for m in report.modules if isinstance(m, Spectrum)]
    whole = sum((m.delta_norm or 0) ** 2 for m in spectra)
    kept = {r: sum(m.energy_at.get(r, 0.0) * (m.delta_norm or 0) ** 2 for m in spectra) for r in RANKS}
    report.totals |= {"delta_norm": whole**0.5, "energy_at": {r: e / whole for r, e in kept.items()} if whole else {}}
    if whole:
        report.summary += "; energy " + ", ".join(f"{e / whole:.1%} at rank {r}" for r, e in kept.items())


def inspect(
    path: str | Path,
    *,
    spectrum: bool = False,
    base: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Say what an adapter or a checkpoint is: format, modules, ranks, scaling, dtypes, sizes, and anything odd.

    Examples:
        ```python
        inspect("adapter", spectrum=True).modules[0].singular_values
        inspect("llama").totals["parameters"]
        ```

    Args:
        path: Adapter or checkpoint, a folder or a file; or a folder of several adapters.
        spectrum: Read an adapter's factors and give singular values, effective rank (entropy and stable rank) and the
            energy at ranks 4, 8, 16, 32 and 64. Without it only headers are read and torch is not imported.
        base: The adapter's checkpoint: its sizes stand beside the adapter's, and every tensor must match it.

    Raises:
        SurgeryError: neither, or broken, in one line.
        UsageError: an option that belongs to adapters.
    """
    given = {"path": path, "spectrum": spectrum, "base": base, "device": device, "progress": progress}
    with open_call("inspect", given, headers_only=not spectrum, progress=progress) as call:
        check_kinds(given, "path", "device")
        check_device_name(device)
        path, model = call.local(path), call.local(base)
        several = find_adapters(path)
        if not several:
            return call.checked(_inspect(path, spectrum, model, device, progress))
        return call.checked(run_each(
            "inspect", path, several,
            lambda p, _: inspect(p, spectrum=spectrum, base=model, device=device, progress=progress),
        ))  # fmt: skip


def _inspect(
    path: str | Path, spectrum: bool, base: str | Path | None, device: str, progress: Progress | None
) -> Report:
    """Inspect one adapter or checkpoint."""
    clock = Clock()
    if not _is_adapter(path):
        if spectrum or base is not None:
            option = "--spectrum" if spectrum else "--base"
            raise UsageError(f"{path}: is not an adapter; {option} belongs to adapters")
        return clock.stamp(inspect_checkpoint(path))
    return clock.stamp(inspect_adapter(path, spectrum=spectrum, base=base, device=device, progress=progress))


def _is_adapter(path: str | Path) -> bool:
    return Path(path).exists() and is_adapter(Path(path))


_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_LOUD, _FAINT = 8.0, 0.01  # scales beyond these are more often a mistake in alpha than meant


def odd_in_checkpoint(model: Checkpoint) -> list[str]:
    """Sentences on what is odd about a checkpoint, as headers, config and folder tell it."""
    return [*_tensors(model), *_folder(model.folder, model.is_file), *_config(model), *_index(model)]


def _tensors(model: Checkpoint) -> Iterator[str]:
    empty = [t.name for t in model.tensors.values() if not prod(t.shape)]
    if empty:
        yield f"{len(empty)} tensors hold no elements ({some(empty)})"
    main = commonest_dtype(model)
    scaled = [t.name for t in model.tensors.values() if scale_of(model, t)]
    other = [t.name for t in model.tensors.values() if t.is_float and t.dtype != main and len(t.shape) > 1]
    other = [name for name in other if name not in scaled]
    if other and not model.parts:
        yield f"{len(other)} matrices are not {main} like the rest ({some(other)})"
    if scaled:
        yield f"{len(scaled)} weights are quantized and mean something only with their scales ({some(scaled)})"
    integers = [t.name for t in model.tensors.values() if not t.is_float and len(t.shape) > 1 and _is_weight(t.name)]
    if integers:
        yield f"{len(integers)} weights are stored as integers, packed or quantized ({some(integers)})"
    bare = [name for name, header in model.files.items() if "format" not in header.metadata]
    if bare:
        yield f"the header of {some(bare)} does not say format=pt, which older versions of transformers ask for"


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "qweight", "weight_packed")


def _folder(folder: Path, is_file: bool) -> Iterator[str]:
    if is_file:
        return
    names = sorted(f.name for f in folder.iterdir())
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES) and n != "training_args.bin"]
    if pickles:
        yield f"pickle files lie beside the weights and are never read ({some(pickles)})"
    remains = [n for n in names if n.endswith(PARTIAL)]
    if remains:
        yield f"the remains of an interrupted run lie here ({some(remains)})"


def _config(model: Checkpoint) -> Iterator[str]:
    if model.is_file or model.parts:
        return
    config = model.config
    if not config:
        yield "there is no config.json: names and shapes must tell all"
        return
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    yield from _embedding(model, text, config)
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str) and said in _STORED and _STORED[said] != commonest_dtype(model):
        yield f"config.json says {said} but the weights are {commonest_dtype(model)}"
    layers = text.get("num_hidden_layers")
    found = {location_of(n).stack: location_of(n).layer for n in sorted(model.tensors, key=_layer)}
    deepest = max((1 + (n or 0) for stack, n in found.items() if stack), default=0)
    if type(layers) is int and deepest and deepest < layers:
        yield f"config.json says {layers} layers but no more than {deepest} are here"


def _layer(name: str) -> int:
    return location_of(name).layer or 0


def _embedding(model: Checkpoint, text: dict[str, object], config: dict[str, object]) -> Iterator[str]:
    names = BaseNames(model.tensors, model.config, str(model.path))
    table = names.input_embedding
    rows, said = (model.tensors[table].shape[0] if table else None), text.get("vocab_size")
    if type(said) is int and rows is not None and rows != said:
        yield f"config.json says a vocabulary of {said} but {table} has {rows} rows"
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [n for n in model.tensors if is_head(module_of(n)) and n.endswith(".weight")]
    if tied is True and heads and table and model.tensors[heads[0]].shape == model.tensors[table].shape:
        yield f"config.json ties the head to the embedding, so {heads[0]} will not be used"


def _index(model: Checkpoint) -> Iterator[str]:
    if not model.index_name:
        return
    index = load_object(model.folder / model.index_name)
    listed = index.get("weight_map")
    unlisted = [n for n in model.tensors if isinstance(listed, dict) and n not in listed]
    if unlisted:
        yield f"{len(unlisted)} tensors are in the shards but not in the index ({some(unlisted)})"
    said = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if type(said) is int and said != model.nbytes:
        yield f"the index says {said:,} bytes but the tensors take {model.nbytes:,}"


def odd_in_adapter(adapter: Adapter, model: Checkpoint | None = None) -> list[str]:
    """Sentences on what is odd about an adapter; with its model also where it is as large as the weight itself."""
    return [*_scales(adapter), *_shapes(adapter), *_folder(adapter.folder, Path(adapter.path).is_file()),
            *_base(adapter, model)]  # fmt: skip


def _scales(adapter: Adapter) -> Iterator[str]:
    zero = [d.path for d in adapter.deltas.values() if not d.scale]
    if zero:
        yield f"alpha is 0 in {len(zero)} modules, so they change nothing ({some(zero)})"
    far = [d.path for d in adapter.deltas.values() if d.scale and not _FAINT <= abs(d.scale) <= _LOUD]
    if far:
        scale = adapter.deltas[far[0]].scale
        yield f"the scale of {len(far)} modules is unusual ({some(far)}: {scale:g}); is alpha meant so?"
    if any(d.scale < 0 for d in adapter.deltas.values()):
        yield "alpha is negative in some modules, so they take the update away"


def _shapes(adapter: Adapter) -> Iterator[str]:
    wide = [d.path for d in adapter.deltas.values() if d.stores_factors and d.rank > min(d.shape)]
    if wide:
        yield f"the rank is above the matrix's own in {len(wide)} modules ({some(wide)}); rerank makes them smaller"
    dtypes = {adapter.weights.tensors[n].dtype for d in adapter.deltas.values() for n in d.names}
    if len(dtypes) > 1:
        yield f"factors are stored in several dtypes ({', '.join(sorted(dtypes))})"
    whole = sum(adapter.weights.tensors[key].nbytes for key in adapter.replaced.values())
    if adapter.deltas and whole > adapter.weights.nbytes / 2:
        yield f"{whole / adapter.weights.nbytes:.0%} of the file are tensors stored whole, not factors"


def _base(adapter: Adapter, model: Checkpoint | None) -> Iterator[str]:
    name = adapter.config.get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).is_absolute():
        yield f"the base model is named by a path of one machine ({name}); others can't find it"
    if model and adapter.weights.nbytes > model.nbytes / 2:
        yield "the adapter is more than half as large as the model"
