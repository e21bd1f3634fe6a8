"""diff: where and by how much two checkpoints differ, or what two adapters do to each other."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.formats import is_adapter
from lorasurgery.errors import UsageError
from lorasurgery.ops.diff_adapters import diff_adapters
from lorasurgery.ops.diff_checkpoints import diff_checkpoints
from lorasurgery.ops.references import on_references
from lorasurgery.ops.runtime import Clock, check_device_name
from lorasurgery.report import Progress, Report


@on_references("a", "b")
def diff(a: str | Path, b: str | Path, *, device: str = "auto", progress: Progress | None = None) -> Report:
    """Compare two checkpoints tensor by tensor, or two adapters module by module.

    Example:
        diff("llama", "llama-chat").totals["relative"]
        diff("style", "topic").totals["cosine"]

    Args:
        a, b: Two checkpoints, which may differ in names, shapes and dtypes; or two adapters for one base model, of
            which a module that one lacks counts as zero there.

    Raises:
        SurgeryError: neither, or not two of a kind, or adapters of different shapes, in one line.
    """
    clock = Clock()
    check_device_name(device)
    kinds = [is_adapter(Path(x)) if Path(x).exists() else None for x in (a, b)]
    if None not in kinds and kinds[0] != kinds[1]:
        adapter, other = (a, b) if kinds[0] else (b, a)
        raise UsageError(
            f"{adapter} is an adapter and {other} is none: compare two of a kind; merge the adapter first, say"
        )
    work = diff_adapters if any(kinds) else diff_checkpoints
    return clock.stamp(work(a, b, device=device, progress=progress))
