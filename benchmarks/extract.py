"""extract against mergekit-extract-lora: the same pair, the same machine, whole processes in turn.

    make bench                      # or: python benchmarks/extract.py --runs 5
    python benchmarks/extract.py --mergekit /path/to/mergekit-extract-lora --json result.json

mergekit gets an environment of its own (.bench/mergekit-venv), for its pins are not ours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measure import Run, run, total_error
from pair import make_pair

HERE = Path(__file__).parent
WORK = HERE.parent / ".bench"


def main() -> int:
    """Make the pair, run both tools in turn, print the table and the ratios."""
    args = _arguments()
    base, tuned = make_pair(args.work / "llama-2048x4", hidden=2048, inner=5632, layers=4, vocab=16384)
    peer = args.mergekit or _mergekit(args.work / "mergekit-venv")
    out = {"mergekit": args.work / "out-mergekit", "lorasurgery": args.work / "out-lorasurgery"}
    rank = str(args.rank)
    commands = {
        "lorasurgery": [sys.executable, "-m", "lorasurgery", "extract", str(base), str(tuned), "-o",
                        str(out["lorasurgery"]), "--rank", rank, "--json"],
        "mergekit": [str(peer), "--model", str(tuned), "--base-model", str(base), "--out-path",
                     str(out["mergekit"]), "--max-rank", rank],
    }  # fmt: skip
    runs = _interleave(commands, {"lorasurgery": args.runs, "mergekit": args.peer_runs}, out, args.work)
    result = _result(commands, runs, {name: total_error(base, tuned, out[name]) for name in out}, out)
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5, help="runs of lorasurgery (default 5)")
    parser.add_argument("--peer-runs", type=int, default=1, help="runs of mergekit, minutes each (default 1)")
    parser.add_argument("--mergekit", type=Path, help="an installed mergekit-extract-lora")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def _mergekit(folder: Path) -> Path:
    """mergekit-extract-lora in an environment of its own, made once."""
    program = folder / "bin" / "mergekit-extract-lora"
    if not program.exists():
        print(f"installing mergekit into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        # torch first: asked for together with others, pip may choose a build with gigabytes of CUDA
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "-r", str(HERE / "requirements-mergekit.txt")], check=True)
    return program


def _interleave(
    commands: dict[str, list[str]], counts: dict[str, int], out: dict[str, Path], work: Path
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for i in range(max(counts.values())):
        for name, command in commands.items():
            if i >= counts[name]:
                continue
            shutil.rmtree(out[name], ignore_errors=True)
            done = run(command, work / f"{name}.log")
            print(f"{name}: {done.seconds:.1f} s, {done.peak_bytes / 1e6:.0f} MB, exit {done.status}", file=sys.stderr)
            if not (out[name] / "adapter_model.safetensors").exists():
                sys.exit(f"{name} wrote no adapter:\n{done.output}")
            runs[name].append(done)
    return runs


def _result(
    commands: dict[str, list[str]], runs: dict[str, list[Run]], errors: dict[str, float], out: dict[str, Path]
) -> dict[str, Any]:
    rows = {}
    for name, done in runs.items():
        seconds = [r.seconds for r in done]
        rows[name] = {
            "command": commands[name], "runs": len(done), "exit": done[-1].status,
            "seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
            "peak_mb": max(r.peak_bytes for r in done) / 1e6, "error": errors[name],
            "adapter_mb": (out[name] / "adapter_model.safetensors").stat().st_size / 1e6,
        }  # fmt: skip
    ours, theirs = rows["lorasurgery"], rows["mergekit"]
    return {
        "date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "machine": platform.machine(),
        "python": platform.python_version(), "rows": rows,
        "times_faster": theirs["seconds"] / ours["seconds"], "memory_ratio": ours["peak_mb"] / theirs["peak_mb"],
        "error_excess": ours["error"] / theirs["error"] - 1,
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    print(f"{result['date']}, {result['cpus']} CPUs ({result['machine']}), Python {result['python']}")
    print(f"{'':12} {'seconds':>8} {'min–max':>15} {'peak MB':>8} {'error':>9} {'adapter MB':>11} {'exit':>5}")
    for name, r in result["rows"].items():
        span = f"{r['seconds_min']:.2f}–{r['seconds_max']:.2f}"
        print(f"{name:12} {r['seconds']:8.2f} {span:>15} {r['peak_mb']:8.0f} {r['error']:9.5f} "
              f"{r['adapter_mb']:11.1f} {r['exit']:5}")  # fmt: skip
    print(f"lorasurgery is {result['times_faster']:.1f} times faster in {result['memory_ratio']:.0%} of the memory; "
          f"its error is {result['error_excess']:+.4%} of mergekit's")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
