"""diff on checkpoints: which tensors differ and by how much, streamed in blocks; by layer and by kind of module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, some
from lorasurgery.ops.pair_names import PairNames
from lorasurgery.ops.runtime import resolve_device
from lorasurgery.places import Place, place_of
from lorasurgery.report import Change, Progress, Report, percent

if TYPE_CHECKING:
    from lorasurgery.ops.compare import Compared


def diff_checkpoints(
    a: str | Path, b: str | Path, *, device: str = "auto", progress: Progress | None = None
) -> Report:  # fmt: skip
    """Compare two checkpoints; the arguments and what can go wrong are diff's."""
    first, second = Checkpoint.open(a), Checkpoint.open(b)
    report = Report("diff", [str(a), str(b)], "")
    pairs = list(_pairs(first, second))
    if not any(old and new for old, new in pairs):
        raise MismatchError(f"{first.path} and {second.path}: no tensor of one has a name of the other's")
    from lorasurgery.ops.compare import Comparer  # imports torch

    chosen = resolve_device(device)
    comparer, done, total = Comparer(first, second, chosen), 0, max(first.nbytes, second.nbytes)
    for old, new in pairs:
        report.modules.append(_change(old, new, comparer.compare))
        done += max(side.nbytes for side in (old, new) if side)
        if progress:
            progress(report.modules[-1].name, min(done, total), total)
    report.device = str(chosen)
    report.bytes_read = first.bytes_read + second.bytes_read
    _summarise(report)
    return report


def _pairs(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[TensorInfo | None, TensorInfo | None]]:
    """Tensors of the same name in memory, however each file calls them; then what is in one only."""
    names = PairNames.of(first, second)
    new = {memory: second.tensors[name] for memory, name in names.tuned.items()}
    for memory, name in names.base.items():
        yield first.tensors[name], new.pop(memory, None)
    for info in new.values():
        yield None, info


def _change(
    old: TensorInfo | None, new: TensorInfo | None, compare: Callable[[TensorInfo, TensorInfo], Compared | None]
) -> Change:
    known = old or new
    assert known is not None
    name = known.name.removesuffix(".weight")
    found = Change(name, known.shape, kind=place_of(name).kind, dtypes=[t.dtype for t in (old, new) if t])
    if old is None or new is None:
        found.state = "only_b" if old is None else "only_a"
    elif old.shape != new.shape:
        found.state = "reshaped"
    elif (compared := compare(old, new)) is None:
        found.delta_norm = found.relative = 0.0  # whatever the norm is, which need not be read
    else:
        found.state, found.share = "changed", compared.share
        found.norm, found.delta_norm, found.largest = compared.norm, compared.delta_norm, compared.largest
        if compared.norm and compared.delta_norm is not None:
            found.relative = compared.delta_norm / compared.norm
    return found


def _summarise(report: Report) -> None:
    changes = [m for m in report.modules if isinstance(m, Change)]
    counts = {state: sum(m.state == state for m in changes) for state in ("equal", "changed", "reshaped")}
    counts |= {state: sum(m.state == state for m in changes) for state in ("only_a", "only_b")}
    delta, norm = _norms(changes)
    report.totals = {
        "what": "checkpoints", "tensors": len(changes), **counts, "delta_norm": delta, "norm": norm,
        "relative": delta / norm if norm else None,
        "by_layer": _rows(changes, "layer", _layer), "by_kind": _rows(changes, "kind", _kind),
    }  # fmt: skip
    broken = [m.name for m in changes if m.delta_norm is not None and not math.isfinite(m.delta_norm)]
    if broken:
        report.warnings.append(f"{len(broken)} tensors hold values that are not finite ({some(broken)})")
    report.summary = _words(report.totals, changes)


def _norms(changes: Sequence[Change]) -> tuple[float, float]:
    """‖ΔW‖ and ‖W‖ of all tensors together; those with values that are not finite count for neither."""
    known = [(m.delta_norm, m.norm) for m in changes if m.delta_norm is not None and m.norm is not None]
    finite = [(d, n) for d, n in known if math.isfinite(d) and math.isfinite(n)]
    return math.hypot(*(d for d, _ in finite)), math.hypot(*(n for _, n in finite))


def _layer(place: Place) -> str | None:
    return f"{place.stack}.{place.layer}" if place.layer is not None else None


def _kind(place: Place) -> str:
    return place.kind


def _rows(changes: Sequence[Change], title: str, key: Callable[[Place], str | None]) -> list[dict[str, Any]]:
    """‖ΔW‖ and ‖W‖ of all changed tensors that share a layer, or a kind."""
    groups: dict[str, list[Change]] = defaultdict(list)
    for m in changes:
        name = key(place_of(m.name))
        if name is not None:
            groups[name].append(m)
    found = []
    for name, group in groups.items():
        delta, norm = _norms(group)
        changed = sum(m.state == "changed" for m in group)
        found.append({title: name, "tensors": len(group), "changed": changed, "delta_norm": delta, "norm": norm,
                      "relative": delta / norm if norm else None})  # fmt: skip
    return found


def _words(t: dict[str, Any], changes: Sequence[Change]) -> str:
    if t["equal"] == t["tensors"]:
        return f"all {t['tensors']} tensors are equal"
    text = f"{t['changed']} of {t['tensors']} tensors differ"
    if t["changed"] and t["relative"] is not None:
        text += f": ‖ΔW‖ is {t['delta_norm']:.4g}, {percent(t['relative'])} of ‖W‖ where they do"
        most = sorted((m for m in changes if m.relative), key=lambda m: -(m.relative or 0))[:3]
        text += "; most in " + ", ".join(f"{m.name} ({percent(m.relative or 0)})" for m in most) if most else ""
    for key, words in (("reshaped", "have another shape"), ("only_a", "only in A"), ("only_b", "only in B")):
        names = [m.name for m in changes if m.state == key]
        text += f"; {t[key]} {words} ({some(names)})" if names else ""
    return text
