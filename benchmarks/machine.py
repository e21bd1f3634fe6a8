"""The machine and the versions of a measurement, as the system reports them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from benchmarks.environments import installed

PACKAGES = ("lorasurgery", "torch", "safetensors", "numpy", "transformers", "peft")


def machine(work: Path) -> dict[str, str]:
    """Return processor, cores, memory, disk of the work data, system, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores": str(cores)}
    found |= {"memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB", "disk": _disk(work)}
    found |= {"system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(work: Path) -> dict[str, str]:
    """Return the versions of our packages and of the peers' in their environments."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for peer in ("mergekit", "axolotl"):
        there = installed(work / f"{peer}-venv", peer, "torch", "transformers", "peft")
        if peer in there:
            found[peer] = there.pop(peer) + "".join(f", with {n} {v}" for n, v in there.items() if found.get(n) != v)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _disk(work: Path) -> str:
    """Return the folder's file system and device, and what the kernel says about the kind of device."""
    parts = [p for p in psutil.disk_partitions(all=True) if work.resolve().is_relative_to(p.mountpoint)]
    if not parts:
        return "unknown"
    part = max(parts, key=lambda p: len(p.mountpoint))
    device = Path(part.device).name
    kind = {"vd": "virtual", "nv": "NVMe", "sd": "SCSI or SATA"}.get(device[:2], "kind unknown")
    return f"{part.fstype} on {device} ({kind})" if part.device.startswith("/dev/") else f"{part.fstype}, kind unknown"
