"""Whole processes, measured from outside: wall seconds and the peak resident memory the system reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = [sys.executable, "-m", "lorasurgery"]
TORCH = "`import torch` alone"
Row = dict[str, Any]
_WATCH = """
import os, sys, time
flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
out, err = os.open(sys.argv[1] + ".out", flags), os.open(sys.argv[1] + ".err", flags)
start = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ,
                        file_actions=[(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, err, 2)])
_, status, usage = os.wait4(child, 0)
print([time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)])
"""


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, CPU seconds, peak resident bytes, exit status, the end of its output."""

    seconds: float
    busy: float
    peak_bytes: int
    status: int
    stdout: str
    output: str


@dataclass(frozen=True)
class Contender:
    """A command to measure: where it writes, how often it runs, and what is looked up in its last output.

    Args:
        scratch: other files it makes, removed before and after each run.
        tolerant: accept the result even if the exit status is not 0.
    """

    name: str
    command: list[str]
    out: Path | None = None
    runs: int = 5
    env: dict[str, str] = field(default_factory=dict)
    scratch: tuple[Path, ...] = ()
    tolerant: bool = False
    look: Callable[[Path], Row] = lambda _: {}


def torch_alone(runs: int) -> Contender:
    """Return an interpreter that imports torch and exits: the cost of every command of ours before it computes."""
    return Contender(TORCH, [sys.executable, "-c", "import torch"], None, runs)


def run(command: list[str], log: Path, env: dict[str, str] | None = None) -> Run:
    """Run a command offline and measure it as a whole process, interpreter start and imports included."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log.parent.mkdir(parents=True, exist_ok=True)
    # A child's ru_maxrss starts at its parent's size, so a small separate process starts and measures it.
    measured = subprocess.run(
        [sys.executable, "-S", "-c", _WATCH, str(log), *command],
        env=os.environ | offline | (env or {}), cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds, busy, peak, status = json.loads(measured.stdout)
    scale = 1 if sys.platform == "darwin" else 1024
    out, err = (Path(f"{log}.{end}").read_text(errors="replace") for end in ("out", "err"))
    return Run(seconds, busy, peak * scale, status, out, (out[-1500:] + err[-1500:]).strip())


def interleave(contenders: list[Contender], logs: Path, *, keep: bool = False) -> list[Row]:
    """Run the contenders round by round and return a row for each; outputs are removed unless kept."""
    rows = {c.name: _row(c) for c in contenders}
    for i in range(max(c.runs for c in contenders)):
        for contender in contenders:
            row = rows[contender.name]
            if i < contender.runs and "failed" not in row:
                _once(contender, row, logs)
                if i == contender.runs - 1 and contender.out is not None and "failed" not in row:
                    row |= contender.look(contender.out)
                if not keep:
                    _clear(contender)
    return list(rows.values())


def _row(contender: Contender) -> Row:
    return {"name": contender.name, "command": contender.command, "env": contender.env,
            "seconds": [], "flush": [], "peak": [], "inner": []}  # fmt: skip


def _once(contender: Contender, row: Row, logs: Path) -> None:
    """Run once with a clean write cache: all pending writes are flushed before and after."""
    _clear(contender)
    os.sync()
    done = run(contender.command, logs / "".join(c if c.isalnum() else "-" for c in contender.name), contender.env)
    start = time.perf_counter()
    os.sync()
    flush = time.perf_counter() - start
    print(f"{contender.name}: {done.seconds:.2f} s (and {flush:.2f} s until on disk), "
          f"{done.peak_bytes / 1e6:.0f} MB, exit {done.status}", file=sys.stderr)  # fmt: skip
    row["exit"] = done.status
    wrote = contender.out is None or _wrote(contender.out)
    if not wrote or (done.status and not contender.tolerant):
        row["failed"] = (done.output.splitlines() or ["no output"])[-1]
        print(done.output, file=sys.stderr)
        if contender.command[: len(OURS)] == OURS:
            raise SystemExit(f"{contender.name} failed: {row['failed']}")
        return
    row["seconds"].append(done.seconds)
    row["flush"].append(flush)
    row["peak"].append(done.peak_bytes)
    if "--json" in contender.command:
        row["inner"].append(json.loads(done.stdout)["seconds"])


def _clear(contender: Contender) -> None:
    for path in (*[contender.out] * (contender.out is not None), *contender.scratch):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _wrote(out: Path) -> bool:
    return out.is_file() or any(out.rglob("*.safetensors"))
