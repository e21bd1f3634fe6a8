"""What recompression costs: against rank, width and number of adapters, with a picture; and fifty adapters at once.

python benchmarks/algebra_cost.py --plot docs/images/algebra-cost.svg
python benchmarks/algebra_cost.py --fifty            # 50 rank-16 adapters of a 7B shape (4 GB on disk) to rank 64
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks.adapters import make_adapter
from benchmarks.algebra import clock, factors, recompressed
from benchmarks.measure import ROOT, run
from benchmarks.peers import dense_resize

Point = dict[str, float]


def by_rank(device: str) -> list[Point]:
    """Measure 4096×4096 from rank r to r/2."""
    points = []
    for r in (8, 16, 32, 64, 128, 256, 512):
        term = factors(4096, 4096, r, 0, device)
        points.append(_point(r, [term], r // 2, device, lowrank=True))
    return points


def by_width(device: str) -> list[Point]:
    """Measure d×d from rank 64 to 32."""
    return [
        _point(d, [factors(d, d, 64, 0, device)], 32, device, lowrank=d <= 8192)
        for d in (512, 1024, 2048, 4096, 8192, 16384)
    ]


def by_adapters(device: str) -> list[Point]:
    """Measure k adapters of rank 16 on 4096×4096 to rank 64 (or to their total rank if that is less)."""
    points = []
    for k in (2, 5, 10, 20, 50):
        terms = [factors(4096, 4096, 16, i, device).times(1 / k) for i in range(k)]
        points.append(_point(k, terms, min(64, 16 * k), device, lowrank=True))
    return points


def _point(x: float, terms: list[Any], rank: int, device: str, *, lowrank: bool) -> Point:
    point = {"x": x, "lorasurgery": statistics.median(clock(lambda: recompressed(terms, rank), 7, device)[0])}
    if lowrank:
        up = torch.cat([t.up * t.scale for t in terms], 1)
        down = torch.cat([t.down for t in terms])
        times, _ = clock(lambda: dense_resize(up, down, 1.0, rank, lowrank=True), 3, device)
        point["svd_lowrank"] = statistics.median(times)
    print(f"{x:8.0f} " + "  ".join(f"{k} {v * 1e3:.1f} ms" for k, v in point.items() if k != "x"), file=sys.stderr)
    return point


def draw(found: dict[str, list[Point]], target: Path, device: str) -> None:
    """Draw three log-log panels; ours as a solid line, the dense product with svd_lowrank dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "rank": ("rank r", "4096×4096, rank r to r/2"),
        "width": ("width d", "d×d, rank 64 to 32"),
        "adapters": ("number of adapters", "4096×4096, k of rank 16 to rank 64"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True, layout="constrained")
    styles = {"lorasurgery": ("#0072B2", "o", "-"), "svd_lowrank": ("#D55E00", "s", "--")}
    labels = {"lorasurgery": "lorasurgery (exact)", "svd_lowrank": "dense product + svd_lowrank, niter 2"}
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        for who, (colour, marker, line) in styles.items():
            there = [p for p in points if who in p]
            axis.plot([p["x"] for p in there], [p[who] * 1e3 for p in there], color=colour, marker=marker,
                      linestyle=line, label=labels[who])  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=titles[name][0], title=titles[name][1])
        ticks = [p["x"] for p in points]
        axis.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"milliseconds a module ({device})")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def fifty(work: Path) -> None:
    """Blend 50 rank-16 adapters on 32 layers of 7 modules (4096, 11008), bfloat16, to rank 64 in one process."""
    shape = {"hidden": 4096, "inner": 11008, "layers": 32}
    paths = [
        str(make_adapter(work / f"fifty/a{i:02}", **shape, rank=16, seed=i, dtype=torch.bfloat16)) for i in range(50)
    ]
    out = work / "out-fifty"
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "lorasurgery", "blend", *paths, "--normalize", "--rank", "64", "-o", str(out)]
        done = run([*command, "-q"], work / "logs" / "fifty")
        print(f"50 adapters: {done.seconds:.1f} s, {done.peak_bytes / 1e6:.0f} MB, exit {done.status}{done.output}")
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    """Measure, print, and draw on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fifty", action="store_true", help="only the fifty adapters")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench")
    args = parser.parse_args()
    if args.fifty:
        fifty(args.work)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"rank": by_rank(device), "width": by_width(device), "adapters": by_adapters(device)}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    if args.plot:
        draw(found, args.plot, "two CPU cores" if device == "cpu" else torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
