"""Whole processes, measured from outside: wall seconds and the peak resident memory the system accounts to them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
_WATCH = """
import os, sys, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
start = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ,
                        file_actions=[(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)])
_, status, usage = os.wait4(child, 0)
print([time.monotonic() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)])
"""


@dataclass(frozen=True)
class Run:
    """One finished process: seconds, peak resident bytes, exit status and the end of what it printed."""

    seconds: float
    peak_bytes: int
    status: int
    output: str


def run(command: list[str], log: Path) -> Run:
    """Run a command offline and measure it as a whole process, interpreter start and imports included."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A child's ru_maxrss begins with its parent's size, so a small process of its own starts and measures it.
    measured = subprocess.run(
        [sys.executable, "-S", "-c", _WATCH, str(log), *command], env=env, check=True, capture_output=True, text=True
    )
    seconds, peak, status = json.loads(measured.stdout)
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, peak * scale, status, log.read_text()[-2000:])


def total_error(base: Path, tuned: Path, adapter: Path) -> float:
    """‖ΔW − BA‖/‖ΔW‖ over all changed matrices, summed in float64, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    lost = whole = 0.0
    for name, weight in before.items():
        if torch.equal(weight, after[name]):
            continue
        delta = after[name].to(torch.float64) - weight.to(torch.float64)
        whole += float(delta.square().sum())
        path = PREFIX + name.removesuffix(".weight")
        down, up = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
        r = down.shape[0]
        alpha = config.get("alpha_pattern", {}).get(path.removeprefix(PREFIX), config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        lost += float((delta - scale * (up.to(torch.float64) @ down.to(torch.float64))).square().sum())
    return math.sqrt(lost / whole)
