"""rerank and blend against PEFT's svd and sd-scripts' resize: the operation alone, and as whole processes.

python benchmarks/algebra.py                         # CPU, and CUDA when there is one
python benchmarks/algebra.py --only operation --json result.json
python benchmarks/algebra_cost.py                    # cost against rank, width and number of adapters; 50 adapters
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from adapters import make_adapter
from measure import run
from peers import PeftLayer, dense_resize

from lorasurgery.linalg.core import recompress
from lorasurgery.lowrank import LowRank

HERE = Path(__file__).parent
WORK = HERE.parent / ".bench"
RANK = 64
Factors = tuple[Tensor, Tensor]


def factors(m: int, n: int, rank: int, seed: int, device: str) -> LowRank:
    """Random factors with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1) ** -0.25
    up = torch.randn(m, rank, generator=generator) * fall / m**0.5
    down = torch.randn(rank, n, generator=generator) * fall[:, None] / n**0.5
    return LowRank(up.to(device), down.to(device))


def recompressed(terms: list[LowRank], rank: int) -> Factors:
    """What lorasurgery does for one module."""
    with torch.inference_mode():
        kept = recompress(terms, rank).truncate(rank)
    return kept.up, kept.down


def clock(work: Callable[[], Any], runs: int, device: str) -> tuple[float, Any]:
    """The median time in seconds, the GPU waited for, after one run that doesn't count; and the last result."""
    times, result = [], None
    for _ in range(runs + (runs > 1)):
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times), result


def error(terms: list[LowRank], result: Factors) -> float:
    """‖ΔW − up@down‖/‖ΔW‖ of the dense matrices in float64."""
    dense = torch.zeros(terms[0].shape, dtype=torch.float64, device=terms[0].up.device)
    for t in terms:
        dense += t.scale * (t.up.double() @ t.down.double())
    rest = dense - result[0].detach().double() @ result[1].detach().double()
    return float(torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(dense))


def operations(device: str, runs: int) -> list[dict[str, Any]]:
    """One module in memory: rank 64 to 32, and two of rank 64 to one of 64."""
    rows = []
    for m, n in ((2048, 2048), (5632, 2048), (4096, 4096)):
        a, b = (factors(m, n, RANK, seed, device) for seed in (0, 1))
        pair, layer = [a.times(0.7), b.times(0.3)], PeftLayer([a, b], device)
        cases: dict[str, list[tuple[str, list[LowRank], int, Callable[..., Factors]]]] = {
            "resize 64 to 32": [
                ("lorasurgery", [a], runs, lambda a=a: recompressed([a], 32)),
                ("svd_lowrank, niter 2", [a], runs, lambda a=a: dense_resize(a.up, a.down, 1.0, 32, lowrank=True)),
                ("dense SVD", [a], 1, lambda a=a: dense_resize(a.up, a.down, 1.0, 32)),
            ],
            "blend two of 64 to 64": [
                ("lorasurgery", pair, runs, lambda pair=pair: recompressed(pair, RANK)),
                ("PEFT svd", pair, 1, lambda layer=layer: layer.blend([0.7, 0.3], RANK)),
            ],
        }
        for what, contenders in cases.items():
            for who, terms, count, work in contenders:
                seconds, result = clock(work, count, device)
                rows.append(_row(what, who, f"{m}×{n}, {device}", seconds, error(terms, result)))
    return rows


def processes(runs: int, peer_runs: int, work: Path) -> list[dict[str, Any]]:
    """Whole processes on a Llama shape of 4 layers, hidden 2048, rank 64, bfloat16: 28 modules."""
    shape = {"hidden": 2048, "inner": 5632, "layers": 4}
    a, b = (
        str(make_adapter(work / f"rank64-{seed}", **shape, rank=RANK, seed=seed, dtype=torch.bfloat16))
        for seed in (0, 1)
    )
    ours, peers = [sys.executable, "-m", "lorasurgery"], [sys.executable, "-W", "ignore", str(HERE / "peers.py")]
    out = str(work / "out-algebra")
    sizes = [str(v) for v in shape.values()]
    cases = {
        "blend two of 64 to 64": {
            "lorasurgery": [*ours, "blend", a, b, "-w", "0.7", "-w", "0.3", "--rank", "64", "-o", out, "-q"],
            "PEFT svd": [*peers, "blend", a, b, out, *sizes, "64"],
        },
        "resize 64 to 32": {
            "lorasurgery": [*ours, "rerank", a, "--rank", "32", "-o", out, "-q"],
            "svd_lowrank, niter 2": [*peers, "resize", a, out, "32", "lowrank"],
            "dense SVD": [*peers, "resize", a, out, "32"],
        },
    }
    rows = []
    for what, contenders in cases.items():
        times: dict[str, list[float]] = {who: [] for who in contenders}
        peaks = dict.fromkeys(contenders, 0.0)
        for i in range(runs):
            for who, command in contenders.items():
                if i >= peer_runs and who in ("PEFT svd", "dense SVD"):
                    continue
                shutil.rmtree(out, ignore_errors=True)
                done = run(command, work / "algebra.log")
                if done.status:
                    sys.exit(f"{who} failed:\n{done.output}")
                times[who].append(done.seconds)
                peaks[who] = max(peaks[who], done.peak_bytes / 1e6)
        for who, seconds in times.items():
            rows.append(_row(what, who, "process, 28 modules", statistics.median(seconds), None, peaks[who]))
    return rows


def _row(
    what: str, who: str, where: str, seconds: float, found: float | None, peak: float | None = None
) -> dict[str, Any]:
    tail = f"error {found:.7f}" if found is not None else f"{peak:.0f} MB"
    print(f"{where:22} {what:22} {who:22} {seconds * 1e3:10.1f} ms  {tail}", file=sys.stderr)
    return {"where": where, "what": what, "who": who, "seconds": seconds, "error": found, "peak_mb": peak}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with each peer's time beside ours."""
    lines = ["| where | what | | seconds | times ours | error or memory |", "|---|---|---|---:|---:|---:|"]
    mine = {(r["where"], r["what"]): r["seconds"] for r in rows if r["who"] == "lorasurgery"}
    for r in rows:
        tail = f"{r['error']:.7f}" if r["error"] is not None else f"{r['peak_mb']:.0f} MB"
        ratio = r["seconds"] / mine[r["where"], r["what"]]
        lines.append(f"| {r['where']} | {r['what']} | {r['who']} | {r['seconds']:.4f} | {ratio:.1f} | {tail} |")
    return "\n".join(lines)


def main() -> None:
    """Run the sections and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["operation", "process"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-runs", type=int, default=1, help="of the dense processes, which take minutes")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.only != "process":
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            rows += operations(device, 4 * args.runs)
    if args.only != "operation":
        rows += processes(args.runs, args.peer_runs, args.work)
    where = f"{os.cpu_count()} CPUs, torch {torch.__version__}, Python {platform.python_version()}"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{datetime.date.today()}, {where}{gpu}")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
