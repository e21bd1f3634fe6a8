"""Where extract and merge spend their time: py-spy's samples by function, with the machine's lower bound.

python benchmarks/where.py extract BASE TUNED        # rank 64
python benchmarks/where.py merge BASE ADAPTER

The lower bound is bytes divided by the bandwidth measured here, and multiplications divided by the GEMM rate.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from lorasurgery.checkpoint.reader import Checkpoint

RANK, BLOCK, PASSES = 64, 64, 3
KINDS = {
    "products with A": ("linalg/blocks.py",),
    "error of what is written": ("measure (lorasurgery/linalg/norms",),
    "thin orthogonalisation": ("linalg/krylov.py", "linalg/thin.py", "linalg/fit.py"),
    "norm of the difference": ("linalg/norms.py",),
    "reading and subtracting": ("ops/extraction/difference.py", "read_at (", "read_all ("),
    "merging: W + scale·B·A, rounded, measured": ("linalg/rounding.py", "lowrank.py"),
    "writing": ("checkpoint/files.py", "checkpoint/writer.py"),
    "other decomposition": ("linalg/svd.py", "ops/extraction/decompose.py"),
    "interpreter, imports, waiting": ("importlib", "<frozen", "site-packages", "lib/python3"),
}  # fmt: skip


def samples(command: list[str]) -> tuple[Counter[str], float]:
    """Return samples of running threads by kind of work, and the wall seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        start = time.monotonic()
        spy = [
            str(Path(sys.executable).with_name("py-spy")),
            "record",
            "--nonblocking",
            "-r",
            "50",
            "-f",
            "raw",
            "-o",
            str(raw),
        ]
        spy += ["--", sys.executable, *command]
        subprocess.run(spy, check=True, capture_output=True)
        seconds, found = time.monotonic() - start, Counter[str]()
        for line in raw.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            found[_kind(stack)] += int(count)
    return found, seconds


def _kind(stack: str) -> str:
    """Return the kind of work of the innermost frame that is recognized."""
    frames = stack.split(";")[::-1]
    for frame in frames:
        for kind, marks in KINDS.items():
            if any(mark in frame for mark in marks) and kind != "interpreter, imports, waiting":
                return kind
    return "interpreter, imports, waiting"


def rates() -> dict[str, float]:
    """Measure float32 products of these shapes (FLOP/s), reading cached files and writing new ones (B/s)."""
    a, x = torch.randn(4096, 4096), torch.randn(4096, BLOCK)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        file, data = Path(scratch) / "file", bytearray(64 << 20)
        write = _best(lambda: _write(file, data)) / 8
        read = _best(lambda: _read(file, data)) / 8
    return {"gemm": 2 * a.numel() * BLOCK / _best(lambda: a @ x), "read": len(data) / read, "write": len(data) / write}


def _best(work: object) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return min(times)


def _write(file: Path, data: bytearray) -> None:
    with file.open("wb", buffering=0) as out:
        for _ in range(8):
            out.write(data)


def _read(file: Path, data: bytearray) -> None:
    with file.open("rb", buffering=0) as source:
        while source.readinto(data):
            pass


def floors(operation: str, base: Checkpoint, speed: dict[str, float]) -> dict[str, float]:
    """Return the seconds that the parts must take on all cores together, in any program."""
    matrices = [t for n, t in base.tensors.items() if len(t.shape) == 2 and ".layers." in n]
    elements = sum(t.shape[0] * t.shape[1] for t in matrices)
    if operation == "merge":
        both = base.nbytes / speed["read"] + base.nbytes / speed["write"]
        return {"reading and writing once": both, "products B·A": 2 * 16 * elements / speed["gemm"]}
    return {
        "products with A": 2 * elements * (2 * PASSES * BLOCK + RANK) / speed["gemm"],  # the last measures the error
        "reading and subtracting": 2 * base.nbytes / speed["read"],
    }


def main() -> None:
    """Profile one operation and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=["extract", "merge"])
    parser.add_argument("inputs", nargs=2)
    args = parser.parse_args()
    out = Path(tempfile.mkdtemp(dir=Path(args.inputs[0]).parent))
    more = ["--rank", str(RANK)] if args.operation == "extract" else []
    command = ["-m", "lorasurgery", args.operation, *args.inputs, "-o", str(out / "out"), "-q", *more]
    found, seconds = samples(command)
    shutil.rmtree(out)
    speed = rates()
    print(
        f"{seconds:.1f} s on {torch.get_num_threads()} threads; "
        + ", ".join(f"{k} {v / 1e9:.1f} G/s" for k, v in speed.items())
    )
    print("| part | share of busy thread time | seconds of it |\n|---|---:|---:|")
    for kind, count in found.most_common():
        print(f"| {kind} | {count / found.total():.0%} | {count / 50:.1f} |")
    print("| floor | | seconds on all cores |\n|---|---:|---:|")
    for kind, floor in floors(args.operation, Checkpoint.open(args.inputs[0]), speed).items():
        print(f"| {kind} | | {floor:.2f} |")


if __name__ == "__main__":
    main()
