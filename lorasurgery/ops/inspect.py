"""inspect: what a file or folder is, checkpoint or adapter, and anything odd about it."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.formats import is_adapter
from lorasurgery.errors import UsageError
from lorasurgery.ops.batch import find_adapters, run_each
from lorasurgery.ops.inspect_adapter import inspect_adapter
from lorasurgery.ops.inspect_checkpoint import inspect_checkpoint
from lorasurgery.ops.references import on_references
from lorasurgery.ops.runtime import Clock, check_device_name
from lorasurgery.report import Progress, Report


@on_references("path", "base", headers_only=lambda given: not given["spectrum"])
def inspect(
    path: str | Path,
    *,
    spectrum: bool = False,
    base: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Say what an adapter or a checkpoint is: format, modules, ranks, scaling, dtypes, sizes, and anything odd.

    Example:
        inspect("adapter", spectrum=True).modules[0].singular_values
        inspect("llama").totals["parameters"]

    Args:
        path: Adapter or checkpoint, a folder or a file; or a folder of several adapters.
        spectrum: Read an adapter's factors and give singular values, effective rank (entropy and stable rank) and the
            energy at ranks 4, 8, 16, 32 and 64. Without it only headers are read and torch is not imported.
        base: The adapter's checkpoint: its sizes stand beside the adapter's, and every tensor must match it.

    Raises:
        SurgeryError: neither, or broken, in one line. UsageError: an option that belongs to adapters.
    """
    clock = Clock()
    check_device_name(device)
    several = find_adapters(path)
    if several:
        return run_each(
            "inspect", path, several,
            lambda p, _: inspect(p, spectrum=spectrum, base=base, device=device, progress=progress),
        )  # fmt: skip
    if not _is_adapter(path):
        if spectrum or base is not None:
            option = "--spectrum" if spectrum else "--base"
            raise UsageError(f"{path}: is no adapter; {option} belongs to adapters")
        return clock.stamp(inspect_checkpoint(path))
    return clock.stamp(inspect_adapter(path, spectrum=spectrum, base=base, device=device, progress=progress))


def _is_adapter(path: str | Path) -> bool:
    return Path(path).exists() and is_adapter(Path(path))
