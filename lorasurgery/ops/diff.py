"""diff: what two adapters do to each other, and what two checkpoints have that differs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.model_names.align import PairNames
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import MismatchError, SurgeryError, UsageError, some
from lorasurgery.module_location import ModuleLocation, location_of
from lorasurgery.ops.blending.join import Joint, base_models, join
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import Change, Comparison, Progress, Report, percent

if TYPE_CHECKING:
    from lorasurgery.linalg.core import Core
    from lorasurgery.lowrank import LowRank
    from lorasurgery.ops.examining.compare import Compared


def diff_adapters(a: str | Path, b: str | Path, *, device: str = "auto", progress: Progress | None = None) -> Report:
    """Compare two adapters; the arguments and what can go wrong are diff's."""
    opened = [open_adapter(a), open_adapter(b)]
    joints = join(opened, [1.0, 1.0])
    report = Report("diff", [str(a), str(b)], "")
    names = base_models(opened)
    if len(names) > 1:
        report.warnings.append(f"the adapters name different base models ({', '.join(names)})")
    report.device = str(resolve_device(device))
    dots, done, total = 0.0, 0, sum(j.nbytes for j in joints)
    for joint in joints:
        found, dot = _compare(joint, opened[0].path, report.device)
        report.modules.append(found)
        dots += dot
        done += joint.nbytes
        if progress:
            progress(joint.path, done, total)
    _summarise_adapters(report, dots)
    report.bytes_read = sum(x.weights.bytes_read for x in opened)
    return report


def _compare(joint: Joint, first: str, device: str) -> tuple[Comparison, float]:
    """One module's comparison, and ⟨ΔW_a, ΔW_b⟩."""
    import torch

    from lorasurgery.linalg.core import inner, recompress
    from lorasurgery.lowrank import LowRank

    sides: list[list[LowRank]] = [[], []]
    with torch.inference_mode():
        for term in joint.terms:
            u = term.load()
            side = sides[0 if term.adapter.path == first and not sides[0] else 1]
            side.append(LowRank(u.up.to(device), u.down.to(device), u.scale))
        try:
            cores = [recompress(s) if s else None for s in sides]
        except SurgeryError as problem:
            raise type(problem)(
                f"{' and '.join(t.adapter.path for t in joint.terms)}: {joint.path}: {problem}"
            ) from None
        dot = inner(sides[0], sides[1]) if all(sides) else 0.0
        norm_a, norm_b = (math.sqrt(c.total) if c else 0.0 for c in cores)
        found = Comparison(
            joint.path, joint.shape, kind=joint.kind, norm_a=norm_a, norm_b=norm_b,
            cosine=_cosine(dot, norm_a, norm_b), norm_ratio=norm_b / norm_a if norm_a else None,
        )  # fmt: skip
        _add_angles(found, cores)
    return found, dot


def _add_angles(found: Comparison, cores: list[Core | None]) -> None:
    """Principal angles between the column spaces (Björck & Golub 1973): their cosines are the SVD of QₐᵀQᵦ."""
    import torch

    ranks = [c.rank if c else 0 for c in cores]
    if not all(ranks):
        return
    qa, qb = (c.basis().to(torch.float64) for c in cores if c)
    cosines = torch.linalg.svdvals((qa.mT @ qb).cpu()).clamp(max=1.0)
    found.overlap = float(cosines.square().mean())
    found.chance = min(1.0, max(ranks) / found.shape[0])
    found.angles = torch.rad2deg(torch.arccos(cosines)).tolist()


def _cosine(dot: float, norm_a: float, norm_b: float) -> float | None:
    return max(-1.0, min(1.0, dot / (norm_a * norm_b))) if norm_a and norm_b else None


def _summarise_adapters(report: Report, dots: float) -> None:
    modules = [m for m in report.modules if isinstance(m, Comparison)]
    norm_a = math.sqrt(sum((m.norm_a or 0) ** 2 for m in modules))
    norm_b = math.sqrt(sum((m.norm_b or 0) ** 2 for m in modules))
    shared = [m for m in modules if m.overlap is not None]
    against = sorted((m for m in shared if (m.cosine or 0) < 0), key=lambda m: m.cosine or 0)
    overlap = sum(m.overlap or 0 for m in shared) / len(shared) if shared else None
    cosine = _cosine(dots, norm_a, norm_b)
    report.totals = {
        "what": "adapters",
        "cosine": cosine, "norm_a": norm_a, "norm_b": norm_b, "norm_ratio": norm_b / norm_a if norm_a else None,
        "overlap": overlap, "chance": sum(m.chance or 0 for m in shared) / len(shared) if shared else None,
        "modules": len(modules), "shared": len(shared), "against": len(against),
        "only_a": sum(not m.norm_b for m in modules), "only_b": sum(not m.norm_a for m in modules),
    }  # fmt: skip
    report.summary = _adapter_words(report, against)


def _adapter_words(report: Report, against: list[Comparison]) -> str:
    t = report.totals
    if t["cosine"] is None or not t["shared"]:
        return "the adapters share no module, so they can't get in each other's way"
    text = (
        f"cosine {t['cosine']:+.3f} in total, norms {t['norm_a']:.4g} and {t['norm_b']:.4g}; column spaces overlap by "
        f"{t['overlap']:.1%} on average ({t['chance']:.1%} by chance) in {t['shared']} shared modules"
    )
    if against:
        text += f"; they pull against each other in {len(against)}, most in " + ", ".join(
            f"{m.name} ({m.cosine:+.2f})" for m in against[:3]
        )
    return text


def diff_checkpoints(
    a: str | Path, b: str | Path, *, device: str = "auto", progress: Progress | None = None
) -> Report:  # fmt: skip
    """Compare two checkpoints; the arguments and what can go wrong are diff's."""
    from lorasurgery.ops.examining.compare import Comparer  # imports torch

    first, second = Checkpoint.open(a), Checkpoint.open(b)
    report = Report("diff", [str(a), str(b)], "")
    pairs = list(_pairs(first, second))
    if not any(old and new for old, new in pairs):
        raise MismatchError(f"{first.path} and {second.path}: no tensor of one has a name of the other's")

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
    found = Change(name, known.shape, kind=location_of(name).kind, dtypes=[t.dtype for t in (old, new) if t])
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


def _layer(place: ModuleLocation) -> str | None:
    return f"{place.stack}.{place.layer}" if place.layer is not None else None


def _kind(place: ModuleLocation) -> str:
    return place.kind


def _rows(changes: Sequence[Change], title: str, key: Callable[[ModuleLocation], str | None]) -> list[dict[str, Any]]:
    """‖ΔW‖ and ‖W‖ of all changed tensors that share a layer, or a kind."""
    groups: dict[str, list[Change]] = defaultdict(list)
    for m in changes:
        name = key(location_of(m.name))
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


def diff(a: str | Path, b: str | Path, *, device: str = "auto", progress: Progress | None = None) -> Report:
    """Compare two checkpoints tensor by tensor, or two adapters module by module.

    Examples:
        ```python
        diff("llama", "llama-chat").totals["relative"]
        diff("style", "topic").totals["cosine"]
        ```

    Args:
        a: Two checkpoints, which may differ in names, shapes and dtypes; or two adapters for one base model, of which a
            module that one lacks counts as zero there.
        b: Two checkpoints, which may differ in names, shapes and dtypes; or two adapters for one base model, of which a
            module that one lacks counts as zero there.

    Raises:
        SurgeryError: neither, or not two of a kind, or adapters of different shapes, in one line.
    """
    given = {"a": a, "b": b, "device": device, "progress": progress}
    with open_call("diff", given, progress=progress) as call:
        check_kinds(given, "a", "b", "device")
        check_device_name(device)
        clock, a, b = Clock(), call.local(a), call.local(b)
        kinds = [is_adapter(Path(x)) if Path(x).exists() else None for x in (a, b)]
        if None not in kinds and kinds[0] != kinds[1]:
            adapter, other = (a, b) if kinds[0] else (b, a)
            raise UsageError(
                f"{adapter} is an adapter and {other} is none: compare two of a kind; merge the adapter first, say"
            )
        work = diff_adapters if any(kinds) else diff_checkpoints
        return call.checked(clock.stamp(work(a, b, device=device, progress=progress)))
