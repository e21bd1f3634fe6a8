"""diff on adapters: what two do to each other, from their factors: cosine, norms and the overlap of column spaces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.compose import Joint, base_models, join
from lorasurgery.ops.runtime import resolve_device
from lorasurgery.report import Comparison, Progress, Report

if TYPE_CHECKING:
    from lorasurgery.linalg.core import Core
    from lorasurgery.lowrank import LowRank


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
    _summarise(report, dots)
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


def _summarise(report: Report, dots: float) -> None:
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
    report.summary = _words(report, against)


def _words(report: Report, against: list[Comparison]) -> str:
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
