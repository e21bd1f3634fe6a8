"""What every operation measures about itself: device, seconds, peak memory. Imports torch only when asked to."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import UsageError
from lorasurgery.report import Report

if TYPE_CHECKING:
    import torch

LEAST_MEMORY = 64 * 10**6
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def resolve_device(name: str) -> torch.device:
    """Turn `auto|cpu|cuda|cuda:N|mps` into a device that is there; auto takes CUDA when it can.

    Raises:
        UsageError: unknown, or not present on this machine.
    """
    import torch

    check_device_name(name)
    here, count = ranks(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and count > 1 and here.size == 1:
        raise UsageError(
            f"--device cuda: this machine has {count} GPUs; `torchrun --nproc-per-node {count} -m lorasurgery …` uses "
            "all of them, --device cuda:0 one"
        )
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda" and count:
        name = f"cuda:{here.local % count}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available on this machine; try --device cpu")
    return device


def check_device_name(name: str) -> None:
    """Refuse a device name that no machine has, without importing torch."""
    if not DEVICE.fullmatch(name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")


def check_memory_limit(limit: int | None) -> None:
    """Refuse a limit that leaves no room to work in."""
    if limit is not None and limit < LEAST_MEMORY:
        raise UsageError(f"--memory-limit: {limit:,} bytes are too few to work in; give at least 64MB")


def peak_memory() -> int:
    """The process's peak resident memory in bytes; 0 where the platform doesn't tell.

    Linux keeps it twice: ru_maxrss of a process begins with the size of the one that started it, VmHWM with nothing.
    """
    with suppress(OSError, StopIteration, ValueError), Path("/proc/self/status").open() as lines:
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Seconds and peak memory of one operation, written into its report."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def stamp(self, report: Report) -> Report:
        """Fill in the measured fields and the version; returns the report."""
        from lorasurgery._version import __version__

        report.version = __version__
        report.seconds = time.monotonic() - self._start
        report.peak_memory_bytes = peak_memory()
        return report
