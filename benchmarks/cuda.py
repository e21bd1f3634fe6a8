"""extract and merge of a 7B shape on a GPU, compared with the time of the transfers.

python benchmarks/run.py --only cuda                             # 32 layers, 40 GB of disk; results on the page
python benchmarks/cuda.py --layers 1 --hidden 256 --device cpu   # tries the code without a GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks import page
from benchmarks.errors import Factors, merge_error, optimal_error
from benchmarks.limits import read
from benchmarks.measure import OURS, Contender, Row, interleave, remove
from benchmarks.options import Options
from benchmarks.pair import make_pair
from benchmarks.streams import Weights, folder_bytes

NAME, TITLE = "cuda", "CUDA"
TAKES = "10 to 20 minutes where a GPU is, 40 GB of disk"
METHOD = """A pair of a 7B shape (32 layers, those beyond the second rolled copies of the first two), read once
before so that it lies in the page cache where memory allows. *Bound*: the bytes that must cross over the measured
bandwidth from pinned memory. *Kernels*: the sum of all kernels' times in one extraction within a process, as
torch's profiler has them, copies apart. Errors in float64 on the device, the best that the rank allows beside ours."""
RANKS = {"extract": 64, "merge": 16}
BUFFER = 2**30


def measure(options: Options) -> dict[str, Any]:
    """Measure bandwidth, whole processes of extract and merge, kernel times, and errors."""
    device, shape = options.device, options.shape(32, vocab=32000)
    base, tuned = make_pair(options.work, shape)
    adapter = options.adapter(shape, RANKS["merge"])
    for folder in (base, tuned):
        read(folder)
    size = min(BUFFER, shape.bytes())
    found = {"device": device, "shape": vars(shape), "ranks": RANKS, "bandwidth": bandwidth(device, size)}
    found |= {"bytes": folder_bytes(base), "changed": _linear_bytes(base)}
    found["rows"] = processes(options, base, tuned, adapter)
    found["kernels"] = kernels(base, tuned, options.work / "out-cuda-kernels", device)
    if not options.keep:
        remove(base.parent)
    return found


def processes(options: Options, base: Path, tuned: Path, adapter: Path) -> list[Row]:
    """Run extract and merge interleaved, and compute the errors of their output."""
    device = options.device

    def look(out: Path) -> Row:
        return {"modules": module_errors(base, tuned, out, device)}

    def look_merged(out: Path) -> Row:
        return merge_error(base, adapter, out, device=device)

    out = {what: options.work / f"out-cuda-{what}" for what in RANKS}
    tail = ["--device", device, "--json"]
    extract = [*OURS, "extract", str(base), str(tuned), "-o", str(out["extract"]), "--rank", str(RANKS["extract"])]
    merge = [*OURS, "merge", str(base), str(adapter), "-o", str(out["merge"])]
    contenders = [
        Contender("extract", [*extract, *tail], out["extract"], options.runs, look=look),
        Contender("merge", [*merge, *tail], out["merge"], options.runs, look=look_merged),
    ]
    return interleave(contenders, options.logs)


def bandwidth(device: str, size: int) -> dict[str, float]:
    """Return bytes per second to the device and back, for pinned and pageable memory: medians of ten."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    found = {}
    for kind in ("pinned", "pageable"):
        here = torch.ones(size, dtype=torch.uint8, pin_memory=kind == "pinned" and device != "cpu")
        found[f"to, {kind}"] = size / _copying(there, here, device)
        found[f"from, {kind}"] = size / _copying(here, there, device)
    return found


def _copying(target: Tensor, source: Tensor, device: str) -> float:
    times = []
    for _ in range(11):
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def kernels(base: Path, tuned: Path, out: Path, device: str) -> dict[str, float]:
    """Return the seconds of kernels and of copies in the second of two extractions, and the device's peak memory."""
    from lorasurgery import ExtractOptions, RankChoice, extract

    choice = ExtractOptions(RankChoice(rank=RANKS["extract"]))
    on_gpu = device != "cpu"
    for _ in range(2):
        remove(out)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
            report = extract(base, tuned, out, choice, device=device)
            _wait(device)
    remove(out)
    work = {True: 0.0, False: 0.0}  # of copies, and of everything else
    for event in seen.key_averages():
        if on_gpu == (event.device_type == DeviceType.CUDA):
            time_spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            work[event.key.startswith(("Memcpy", "Memset"))] += time_spent / 1e6
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"kernels": work[False], "copies": work[True], "modules": len(report.modules), "memory": peak}


def module_errors(base: Path, tuned: Path, adapter: Path, device: str) -> list[Row]:
    """Return the error and the least possible error for one module of each shape, in float64."""
    before, after, factors = Weights(base), Weights(tuned), Factors(adapter)
    chosen = {before.shapes[f"{p}.weight"]: p for p in factors.paths()}
    rows = []
    for path in chosen.values():
        delta = after[f"{path}.weight"].to(device).double() - before[f"{path}.weight"].to(device).double()
        up, down = factors.of(path, device)
        found = float(torch.linalg.matrix_norm(delta - up @ down) / torch.linalg.matrix_norm(delta))
        rows.append({"path": path, "error": found, "least": optimal_error(delta, RANKS["extract"])})
    return rows


def _linear_bytes(base: Path) -> int:
    shapes = [s for n, s in Weights(base).shapes.items() if ".layers." in n and len(s) == 2]
    return sum(2 * m * n for m, n in shapes)


def render(result: dict[str, Any]) -> list[str]:
    """Write bandwidth, processes with their bounds, kernels and errors."""
    s, b, k = result["shape"], result["bandwidth"], result["kernels"]
    bounds = {
        "extract": 2 * result["changed"] / b["to, pinned"],
        "merge": result["changed"] / b["to, pinned"] + result["changed"] / b["from, pinned"],
    }
    rows = []
    for r in result["rows"]:
        times = [page.seconds(page.median(r)), page.span(r["seconds"]), str(len(r["seconds"]))]
        rows.append([r["name"], *times, page.seconds(page.median(r, "inner")), page.seconds(bounds[r["name"]]),
                     page.megabytes(max(r["peak"]))])  # fmt: skip
    merged = result["rows"][1]
    return [
        f"Device {result['device']}: hidden {s['hidden']}, inner {s['inner']}, {s['layers']} layers, vocabulary "
        f"{s['vocab']}, {result['bytes'] / 1e9:.2f} GB a checkpoint; bandwidth in GB/s: "
        + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in b.items()) + ".",
        "", *page.table(["", "seconds", "min–max", "runs", "the report's clock", "bound by transfer", "peak MB"], rows),
        "", f"One extraction of {k['modules']} modules: {page.seconds(k['kernels'])} s of kernels, "
        f"{page.seconds(k['copies'])} s of copies, {page.megabytes(k['memory'])} MB of the device's memory.",
        f"Merge: {merged['differ']:.4%} of the elements differ from float64's result rounded once, "
        f"by {merged['max']:.2e} at most.",
        "", *page.table(["module", "error of ΔW", "least possible"],
                        [[m["path"], f"{m['error']:.6f}", f"{m['least']:.6f}"] for m in result["rows"][0]["modules"]]),
    ]  # fmt: skip


def main() -> None:
    """Measure and print; nothing is saved for the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="inner is 43/16 of it, as in Llama 7B")
    parser.add_argument("--vocab", type=int, help="default 32000, and twice the hidden size below 4096")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Options.work)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--keep", action="store_true", help="keep the pair")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU: not measured")
    vocab = args.vocab or (32000 if args.hidden >= 4096 else 2 * args.hidden)
    options = Options(
        args.work, args.runs, hidden=args.hidden, inner=args.hidden * 43 // 16, layers=args.layers, vocab=vocab,
        keep=args.keep, device=args.device,
    )  # fmt: skip
    result = measure(options)
    print("\n".join(render(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
