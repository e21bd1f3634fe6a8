"""inspect on a checkpoint: what its headers tell, without reading a tensor."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod
from pathlib import Path
from typing import Any

from lorasurgery.adapters.naming import BaseNames
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.settle import in_the_middle, unfinished
from lorasurgery.ops.odd import odd_in_checkpoint
from lorasurgery.ops.parameters import count_parameters
from lorasurgery.ops.undo_record import read_record, stack
from lorasurgery.places import place_of
from lorasurgery.report import Report, Stored


def inspect_checkpoint(path: str | Path) -> Report:
    """Say what a checkpoint is; the arguments and what can go wrong are inspect's."""
    model = Checkpoint.open(path, unfinished=True)
    report = Report("inspect", [str(path)], "")
    report.modules = [
        Stored(_module(t.name), t.shape, kind=place_of(_module(t.name)).kind, dtype=t.dtype, bytes=t.nbytes,
               file=model.file_of[t.name])
        for t in model.tensors.values()
    ]  # fmt: skip
    report.totals = _totals(model)
    report.totals["undo"] = [[a.name for a in read_record(p).adapters] for p in stack(Path(path))]
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
        place = place_of(_module(name))
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
        kind = place_of(_module(info.name)).kind
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
