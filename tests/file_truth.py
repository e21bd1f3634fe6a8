"""What an extracted adapter really leaves of a change: merged in float64 into its base, beside the tuned weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from lorasurgery.ops.merge import merge
from lorasurgery.report import Report


def check_lines(report: Report, base: Path, tuned: Path, adapter: Path, tmp: Path, far: float = 1e-6) -> None:
    """Hold every line's error against the file, and the totals, to `far` of ‖ΔW‖."""
    wide, done = tmp / "wide", tmp / "wide-merged"
    for path in (wide, done):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, wide)
    before = {k: t.double() if t.is_floating_point() else t for k, t in load_file(base / "model.safetensors").items()}
    save_file(before, wide / "model.safetensors", {"format": "pt"})
    merge(wide, [adapter], done, allow_loss=True)
    found, wanted = load_file(done / "model.safetensors"), load_file(tuned / "model.safetensors")
    lost = whole = 0.0
    for line in report.modules:
        name = line.name if line.name in wanted else f"{line.name}.weight"
        norm = float((wanted[name].double() - before[name]).norm())
        left = float((wanted[name].double() - found[name].double()).norm())
        assert line.error is not None
        assert abs(line.error - left / norm) <= far, (name, line.error, left / norm)
        lost, whole = math.hypot(lost, left), math.hypot(whole, norm)
    assert report.modules
    assert abs(report.totals["error"] - lost / whole) <= far
