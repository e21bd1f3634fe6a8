"""extract and merge by model size, and extract by number of threads, with a picture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import page
from benchmarks.measure import OURS, TORCH, Contender, Row, interleave, torch_alone
from benchmarks.options import Options
from benchmarks.pair import Shape, make_pair
from benchmarks.streams import folder_bytes

NAME, TITLE = "scaling", "Scaling"
TAKES = "40 minutes and up to 25 GB of disk"
METHOD = """Time and peak memory of extract (rank 64) and merge (rank 16) against the size of one bfloat16
checkpoint, the number of layers being what differs, with the least-squares line through the medians; and extract on
the smallest pair with `OMP_NUM_THREADS` of 1 and more. Layers beyond the second are the first two, rolled along
both axes. Sizes are measured one after the other, the two commands in turn; a pair that is larger than what memory
is left is read from the disk."""
RANKS = {"extract": 64, "merge": 16}
PICTURE = "scaling.svg"
COLOURS = {"extract": ("#0072B2", "o"), "merge": ("#D55E00", "s")}


def measure(options: Options) -> dict[str, Any]:
    """Measure each size in turn, removing its files afterwards; threads on the smallest."""
    points: list[dict[str, Any]] = []
    threads: list[Row] = []
    for shape in shapes(options):
        pair = make_pair(options.work, shape)
        rows = interleave(commands(options, shape, *pair), options.logs)
        points.append({"layers": shape.layers, "bytes": folder_bytes(pair[0]), "rows": {r["name"]: r for r in rows}})
        if not threads:
            threads = interleave(by_threads(options, *pair), options.logs)
        if not options.keep:
            shutil.rmtree(pair[0].parent)
    first = shapes(options)[0]
    return {"hidden": first.hidden, "inner": first.inner, "vocab": first.vocab, "ranks": RANKS,
            "points": points, "threads": threads, "lines": _lines(points)}  # fmt: skip


def shapes(options: Options) -> list[Shape]:
    """Return a shape for each size in GB, with the number of layers that comes nearest."""
    if options.tiny:
        return [options.shape(1).with_layers(n) for n in (1, 2, 3)]
    ends = options.shape(1)
    layer = ends.with_layers(2).bytes() - ends.bytes()
    rest = ends.bytes() - layer
    return [ends.with_layers(max(1, round((size * 1e9 - rest) / layer))) for size in options.sizes]


def commands(options: Options, shape: Shape, base: Path, tuned: Path) -> list[Contender]:
    """Measure both commands for one size, and an interpreter that only imports torch."""
    adapter = options.adapter(shape, RANKS["merge"])
    merge = [*OURS, "merge", str(base), str(adapter), "-o", str(options.work / "out-scaling-merge")]
    return [
        Contender("extract", _extract(options, base, tuned), options.work / "out-scaling-extract", options.runs),
        Contender("merge", [*merge, "--device", "cpu", "--json"], options.work / "out-scaling-merge", options.runs),
        torch_alone(options.runs),
    ]


def by_threads(options: Options, base: Path, tuned: Path) -> list[Contender]:
    """Measure extract with 1, 2, 4 … threads, up to the number of cores."""
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= max(os.cpu_count() or 1, 2)]
    command, out = _extract(options, base, tuned), options.work / "out-scaling-extract"
    return [
        Contender(str(n), command, out, options.runs, env={"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)})
        for n in counts
    ]


def _extract(options: Options, base: Path, tuned: Path) -> list[str]:
    out = str(options.work / "out-scaling-extract")
    return [*OURS, "extract", str(base), str(tuned), "-o", out, "--rank", str(RANKS["extract"]),
            "--device", "cpu", "--json"]  # fmt: skip


def _lines(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit least-squares lines to the seconds of whole processes against GB."""
    gigabytes = [p["bytes"] / 1e9 for p in points]
    return {what: fit(gigabytes, [page.median(p["rows"][what]) for p in points]) for what in RANKS}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Return slope, intercept and R² of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    whole = np.asarray(y) - np.mean(y)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - (rest @ rest) / (whole @ whole))}


def render(result: dict[str, Any]) -> list[str]:
    """Write the picture, a table of sizes, the lines, and a table of threads."""
    sizes, threads = [], []
    for p in result["points"]:
        start = page.median(p["rows"][TORCH])
        for what in RANKS:
            sizes.append([f"{p['bytes'] / 1e9:.3g}", str(p["layers"]), what, *_cells(p["rows"][what], start)])
    start = page.median(result["points"][0]["rows"][TORCH])
    threads = [[r["name"], *_cells(r, start)] for r in result["threads"]]
    head = ["seconds", "min–max", "runs", "beyond `import torch`", "the report's clock", "peak MB"]
    return [
        f"Hidden {result['hidden']}, inner {result['inner']}, vocabulary {result['vocab']}.",
        "",
        f"![seconds and peak memory against size, seconds against threads](images/{PICTURE})",
        "",
        *page.table(["GB", "layers", "", *head], sizes, 3),
        "",
        *(
            f"- {what}: {line['slope']:.3g} s for each GB {line['intercept']:+.3g} s, R² = {line['r2']:.4f}"
            for what, line in result["lines"].items()
        ),
        "",
        *page.table(["threads of extract", *head], threads),
    ]


def _cells(row: Row, start: float) -> list[str]:
    whole, inner = page.median(row), page.median(row, "inner")
    return [page.seconds(whole), page.span(row["seconds"]), str(len(row["seconds"])), page.seconds(whole - start),
            page.seconds(inner), page.megabytes(max(row["peak"]))]  # fmt: skip


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw seconds and memory against size, and seconds against threads; the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "lorasurgery"
    figure, (times, memory, threads) = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    sizes = [p["bytes"] / 1e9 for p in result["points"]]
    for what, (colour, marker) in COLOURS.items():
        rows = [p["rows"][what] for p in result["points"]]
        line = result["lines"][what]
        times.scatter(sizes, [page.median(r) for r in rows], color=colour, marker=marker,
                      label=f"{what}, R² = {line['r2']:.4f}")  # fmt: skip
        ends = [0, max(sizes)]
        times.plot(ends, [line["slope"] * x + line["intercept"] for x in ends], color=colour, linestyle="--")
        memory.plot(sizes, [max(r["peak"]) / 1e6 for r in rows], color=colour, marker=marker, label=what)
    counts = [int(r["name"]) for r in result["threads"]]
    threads.plot(counts, [page.median(r) for r in result["threads"]], color=COLOURS["extract"][0], marker="o",
                 label=f"extract, {sizes[0]:.2g} GB")  # fmt: skip
    threads.set_xticks(counts)
    times.set(xlabel="checkpoint, GB", ylabel="seconds", title="time", xlim=0)
    memory.set(xlabel="checkpoint, GB", ylabel="peak resident MB", title="memory", xlim=0)
    threads.set(xlabel="threads", ylabel="seconds", title="threads")
    for axis in (times, memory, threads):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)
