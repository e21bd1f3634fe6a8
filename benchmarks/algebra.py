"""rerank and blend against PEFT's svd and sd-scripts' resize: the operation alone, and as whole processes.

python benchmarks/run.py --only algebra
python benchmarks/algebra_cost.py                    # cost against rank, width and number of adapters; 50 adapters
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import page
from benchmarks.measure import OURS, Contender, Row, interleave
from benchmarks.options import Options
from benchmarks.pair import Shape
from benchmarks.peers import PeftLayer, dense_resize
from lorasurgery.linalg.core import recompress
from lorasurgery.lowrank import LowRank

NAME, TITLE = "algebra", "Rerank and blend"
TAKES = "12 minutes"
METHOD = """*Operation*: one module in memory, rank-64 factors with σ falling as i^-½; to rank 32, and two blended
to one of rank 64; after one run that doesn't count. *Process*: bfloat16 files of a Llama shape. Peers form the
dense matrix: PEFT's `add_weighted_adapter` with `combination_type="svd"` and its defaults, on a model whose weights
nobody had to make; sd-scripts' resize, which calls `torch.linalg.svd`, and its newer variant with
`torch.svd_lowrank`, q twice the rank, niter 2 (pull request 2240), both written from their descriptions. The error
is that of the dense matrices in float64."""
RANK = 64
RESIZE, BLEND = "resize 64 to 32", "blend two of 64 to 64"
Factors = tuple[Tensor, Tensor]
Work = Callable[[], Factors]


def factors(m: int, n: int, rank: int, seed: int, device: str) -> LowRank:
    """Return random factors with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1) ** -0.25
    up = torch.randn(m, rank, generator=generator) * fall / m**0.5
    down = torch.randn(rank, n, generator=generator) * fall[:, None] / n**0.5
    return LowRank(up.to(device), down.to(device))


def recompressed(terms: list[LowRank], rank: int) -> Factors:
    """Do what lorasurgery does for one module."""
    with torch.inference_mode():
        kept = recompress(terms, rank).truncate(rank)
    return kept.up, kept.down


def clock(work: Callable[[], Any], runs: int, device: str) -> tuple[list[float], Any]:
    """Return the times in seconds, waiting for the GPU, after a warm-up if there are several, and the last result."""
    times, result = [], None
    for _ in range(runs + (runs > 1)):
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[runs > 1 :], result


def in_turn(contenders: list[tuple[str, int, Work]], device: str) -> list[tuple[str, list[float], Factors]]:
    """Return each contender's times, round by round after a warm-up round, and its last result."""
    times: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
    last: dict[str, Factors] = {}
    for i in range(-1, max(runs for _, runs, _ in contenders)):
        for name, runs, work in contenders:
            if i < runs:
                spent, last[name] = clock(work, 1, device)
                times[name] += spent if i >= 0 else []
    return [(name, times[name], last[name]) for name in times]


def error(terms: list[LowRank], result: Factors) -> float:
    """Return ‖ΔW − up@down‖/‖ΔW‖ from the dense matrices in float64."""
    dense = torch.zeros(terms[0].shape, dtype=torch.float64, device=terms[0].up.device)
    for t in terms:
        dense += t.scale * (t.up.double() @ t.down.double())
    rest = dense - result[0].detach().double() @ result[1].detach().double()
    return float(torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(dense))


def operations(device: str, options: Options, sizes: list[tuple[int, int]]) -> list[Row]:
    """Measure one module in memory: rank 64 to 32, and two of rank 64 to one of 64."""
    rows, runs, dense = [], 4 * options.runs, options.peer_runs
    for m, n in sizes:
        a, b = (factors(m, n, RANK, seed, device) for seed in (0, 1))
        both = [a.times(0.7), b.times(0.3)]
        cases = ((RESIZE, [a], _resizes(a, runs, dense)), (BLEND, both, _blends(a, b, runs, dense, device)))
        for what, terms, contenders in cases:
            chosen = [c for c in contenders if not any(c[0].lower().startswith(w) for w in options.without)]
            for name, times, result in in_turn(chosen, device):
                row = {"where": f"{m}×{n}, {device}", "what": what, "name": name, "seconds": times}
                rows.append(row | {"error": error(terms, result)})
                print(f"{row['where']} {what} {name}: {page.median(row) * 1e3:.1f} ms", file=sys.stderr)
    return rows


def _resizes(a: LowRank, runs: int, dense: int) -> list[tuple[str, int, Work]]:
    return [
        ("lorasurgery", runs, lambda: recompressed([a], 32)),
        ("svd_lowrank, niter 2", runs, lambda: dense_resize(a.up, a.down, 1.0, 32, lowrank=True)),
        ("dense SVD", dense, lambda: dense_resize(a.up, a.down, 1.0, 32)),
    ]


def _blends(a: LowRank, b: LowRank, runs: int, dense: int, device: str) -> list[tuple[str, int, Work]]:
    layer = PeftLayer([a, b], device)
    return [
        ("lorasurgery", runs, lambda: recompressed([a.times(0.7), b.times(0.3)], RANK)),
        ("PEFT svd", dense, lambda: layer.blend([0.7, 0.3], RANK)),
    ]


def processes(options: Options, shape: Shape) -> list[Row]:
    """Measure whole processes on files."""
    a, b = (str(options.adapter(shape, RANK, seed)) for seed in (0, 1))
    peers = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers"]
    out = options.work / "out-algebra"
    sizes = [str(v) for v in (shape.hidden, shape.inner, shape.layers)]
    ours = {RESIZE: ["rerank", a, "--rank", "32"], BLEND: ["blend", a, b, "-w", "0.7", "-w", "0.3", "--rank", "64"]}
    cases = {
        RESIZE: [
            ("svd_lowrank, niter 2", [*peers, "resize", a, str(out), "32", "lowrank"], options.runs),
            ("dense SVD", [*peers, "resize", a, str(out), "32"], options.peer_runs),
        ],
        BLEND: [("PEFT svd", [*peers, "blend", a, b, str(out), *sizes, "64"], options.peer_runs)],
    }
    rows = []
    for what, others in cases.items():
        mine = [*OURS, *ours[what], "-o", str(out), "--device", "cpu", "--json"]
        found = [Contender("lorasurgery", mine, out, options.runs)]
        found += [
            Contender(n, c, out, k) for n, c, k in others if not any(n.lower().startswith(w) for w in options.without)
        ]
        where = f"process, {7 * shape.layers} modules"
        rows += [{"where": where, "what": what} | row for row in interleave(found, options.logs)]
    return rows


def measure(options: Options) -> dict[str, Any]:
    """Measure the operation on the CPU (and on request the GPU), then the processes."""
    sizes = [(256, 256)] if options.tiny else [(2048, 2048), (5632, 2048), (4096, 4096)]
    rows: list[Row] = []
    for device in ["cpu"] + ["cuda"] * (options.cuda and torch.cuda.is_available()):
        rows += operations(device, options, sizes)
    shape = options.shape(4, 2048, 5632)
    return {"shape": vars(shape), "rows": rows + processes(options, shape)}


def render(result: dict[str, Any]) -> list[str]:
    """Write one table, with each peer's time next to ours."""
    mine = {(r["where"], r["what"]): r for r in result["rows"] if r["name"] == "lorasurgery"}
    lines = []
    for r in result["rows"]:
        ours, cells = mine[r["where"], r["what"]], [r["where"], r["what"], r["name"]]
        if not r["seconds"]:
            lines.append([*cells, f"failed: {r['failed']}", *[""] * 6])
            continue
        cells += [page.seconds(page.median(r)), page.span(r["seconds"]), str(len(r["seconds"]))]
        cells += [f"{page.median(r) / page.median(ours):.1f}", f"{r['error']:.7f}" if "error" in r else ""]
        memory = (
            [page.megabytes(max(r["peak"])), f"{max(r['peak']) / max(ours['peak']):.2f}"] if "peak" in r else [""] * 2
        )
        lines.append(cells + memory)
    s = result["shape"]
    head = ["where", "what", "", "seconds", "min–max", "runs", "times ours", "error", "peak MB", "memory, times ours"]
    return [
        f"Processes: hidden {s['hidden']}, inner {s['inner']}, {s['layers']} layers.", "", *page.table(head, lines, 3)
    ]  # fmt: skip
