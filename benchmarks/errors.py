"""Errors of the output, in float64 and from the files alone, a block of rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.streams import Weights

PREFIX = "base_model.model."
ROWS = 1024


class Factors:
    """A PEFT adapter's scale·up and down by module path."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "adapter_config.json").read_text())
        self._tensors = load_file(folder / "adapter_model.safetensors")

    def paths(self) -> list[str]:
        """Return the modules that have factors, in the order of the file's names."""
        tail = ".lora_A.weight"
        return [n.removeprefix(PREFIX).removesuffix(tail) for n in self._tensors if n.endswith(tail)]

    def of(self, path: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return (scale·up, down) in float64."""
        down, up = (self._tensors[f"{PREFIX}{path}.lora_{x}.weight"].to(device, torch.float64) for x in "AB")
        alpha = self._config.get("alpha_pattern", {}).get(path, self._config["lora_alpha"])
        r = down.shape[0]
        return up * (alpha / (math.sqrt(r) if self._config.get("use_rslora") else r)), down


def extraction_error(base: Path, tuned: Path, adapter: Path, device: str = "cpu") -> float:
    """Return ‖ΔW − BA‖/‖ΔW‖ over all changed matrices."""
    factors, before, after = Factors(adapter), Weights(base), Weights(tuned)
    lost = whole = 0.0
    for name in before.shapes:
        sums = _sums(before[name], after[name], factors, name.removesuffix(".weight"), device)
        lost, whole = lost + sums[0], whole + sums[1]
    return math.sqrt(lost / whole)


def _sums(a: Tensor, b: Tensor, factors: Factors, path: str, device: str) -> tuple[float, float]:
    """Return ‖ΔW − BA‖² and ‖ΔW‖² of one tensor."""
    if torch.equal(a, b):
        return 0.0, 0.0
    up, down = factors.of(path, device)
    lost = whole = 0.0
    for rows in _blocks(len(a)):
        delta = b[rows].to(device, torch.float64) - a[rows].to(device, torch.float64)
        whole += float(delta.square().sum())
        lost += float((delta - up[rows] @ down).square().sum())
    return lost, whole


def optimal_error(delta: Tensor, rank: int) -> float:
    """Return the least possible ‖ΔW − BA‖/‖ΔW‖ at this rank, from the Gram matrix's eigenvalues in float64."""
    delta = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().mT
    squares = torch.linalg.eigvalsh(delta @ delta.mT).clamp_min(0)
    return float((squares[: len(squares) - rank].sum() / squares.sum()).sqrt())


def merge_error(base: Path, adapter: Path, merged: Path, samples: int = 7, device: str = "cpu") -> dict[str, float]:
    """Compare a merged checkpoint with float64's result rounded once, over some evenly spread modules.

    Returns:
        differ: share of elements that are not correctly rounded; max: the largest deviation;
        relative: the norm of all deviations relative to the norm of the result.
    """
    factors, before, after = Factors(adapter), Weights(base), Weights(merged)
    paths = [n.removesuffix(".weight") for n in before.shapes if n.removesuffix(".weight") in set(factors.paths())]
    chosen = sorted({i * (len(paths) - 1) // max(samples - 1, 1) for i in range(samples)})
    count = differ = 0
    worst = squares = whole = 0.0
    for path in (paths[i] for i in chosen):
        up, down = factors.of(path, device)
        was, now = before[f"{path}.weight"], after[f"{path}.weight"]
        for rows in _blocks(len(was)):
            right = nearest_bfloat16(was[rows].to(device, torch.float64) + up[rows] @ down)
            off = now[rows].to(device, torch.float64) - right
            count, differ = count + off.numel(), differ + int(off.count_nonzero())
            worst = max(worst, float(off.abs().max()))
            squares, whole = squares + float(off.square().sum()), whole + float(right.square().sum())
    return {"differ": differ / count, "max": worst, "relative": math.sqrt(squares / whole), "samples": len(chosen)}


def nearest_bfloat16(x: Tensor) -> Tensor:
    """Return the nearest bfloat16 of each float64, as float64: via float32 rounded to odd, so it is rounded once."""
    near = x.float()
    bits = near.view(torch.int32)
    beyond = near.double().abs() > x.abs()
    exact = near.double() == x
    odd = torch.where(exact, bits, (bits - beyond.int()) | 1)
    return odd.view(torch.float32).bfloat16().double()


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(i, i + ROWS) for i in range(0, rows, ROWS))
