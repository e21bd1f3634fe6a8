"""Does another library read safetensors better than lorasurgery's reader? GB/s and memory of each.

python benchmarks/readers.py CHECKPOINT [--cache warm] [--runs 5]     # a folder or a file

Every installed reader runs in its own process, interleaved, and adds up all bytes once as 64-bit integers, because some
return memory maps that are not read until then; all sums must be equal. The time is measured from opening to the last
tensor, without imports; the memory is that of the whole process, including mapped file pages. *Warm*: the files are in
the page cache; *cold*: the system was asked to drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from benchmarks import page
from benchmarks.measure import run
from benchmarks.options import Options
from lorasurgery.checkpoint.reader import Checkpoint

PIECE = 8 << 20  # bytes that merge reads at once
BLOCK = 16 << 20
MASK = 2**64 - 1


@dataclass(frozen=True)
class Reader:
    """One way to read all tensors: its name, the function, the package it needs, its settings."""

    name: str
    read: Callable[[Path], Iterable[int]]
    package: str = "lorasurgery"
    env: dict[str, str] = field(default_factory=dict)


def use(tensor: Tensor) -> int:
    """Return the sum of a tensor's bytes as 64-bit integers."""
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def plain(path: Path) -> Iterator[int]:
    """Read the files' data from beginning to end, 16 MB at a time into the same memory: the limit."""
    buffer = torch.empty(BLOCK, dtype=torch.uint8)
    for file in files(path):
        with file.open("rb", buffering=0) as source:
            source.seek(8 + int.from_bytes(source.read(8), "little"))
            while got := source.readinto(buffer.numpy().data):
                yield use(buffer[:got])


def in_pieces(path: Path, threads: int) -> Iterator[int]:
    """Use Checkpoint.fill with reused memory, 8 MB at a time, as merge does."""
    with Checkpoint.open(path) as base, ThreadPoolExecutor(threads) as pool:
        buffers = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(threads)]

        def work(name: str, start: int) -> int:
            buffer = buffers.pop()
            size = min(PIECE, base.tensors[name].nbytes - start)
            base.fill(name, buffer[:size].numpy().data, start)
            found = use(buffer[:size])
            buffers.append(buffer)
            return found

        pieces = [(name, start) for name, info in base.tensors.items() for start in range(0, info.nbytes, PIECE)]
        yield from pool.map(work, *zip(*pieces, strict=True))


def whole(path: Path) -> Iterator[int]:
    """Use Checkpoint.read: every tensor into its own memory, as for tensors that are merged whole."""
    with Checkpoint.open(path) as base:
        yield from (use(base.read(name)) for name in base.tensors)


def safetensors(path: Path) -> Iterator[int]:
    """Use safe_open and get_tensor, file by file."""
    from safetensors import safe_open

    for file in files(path):
        with safe_open(file, framework="pt") as source:
            yield from (use(source.get_tensor(name)) for name in source.keys())  # noqa: SIM118  # no mapping


def fastsafetensors(path: Path) -> Iterator[int]:
    """Use fastsafetensors' loader as in its examples, without GPUDirect, one file at a time."""
    from fastsafetensors import SafeTensorsFileLoader

    for file in files(path):
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [str(file)]})
        buffers = loader.copy_files_to_device()
        yield from (use(buffers.get_tensor(name)) for name in loader.get_keys())
        buffers.close()
        loader.close()


def fastsafetensors_bounded(path: Path) -> Iterator[int]:
    """Use fastsafetensors' loader in chunks as small as the largest tensor allows, borrowing its memory."""
    from fastsafetensors import ParallelLoader

    loader = ParallelLoader(
        None, [str(f) for f in files(path)], device="cpu", nogds=True, queue_size=-1, use_tqdm_on_load=False,
        max_batch_bytes=max(sizes(path)), accumulate_resident=False, borrowed_tensors=True,
    )  # fmt: skip
    yield from (use(tensor) for _, tensor in loader.iterate_weights())
    loader.close()


def runai(path: Path, owned: bool = True) -> Iterator[int]:
    """Use runai-model-streamer over all files; its memory is set from outside."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(f) for f in files(path)], owned=owned)
        yield from (use(tensor) for _, tensor in streamer.get_tensors())


FAST, RUNAI = "fastsafetensors", "runai-model-streamer"
CACHED = {"FASTSAFETENSORS_ODIRECT": "0"}
SMALL = {"RUNAI_STREAMER_MEMORY_LIMIT": "0", "RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}
READERS = (
    Reader("plain reads of 16 MB, the limit", plain),
    Reader("ours, 8 MB pieces, 1 thread", lambda p: in_pieces(p, 1)),
    Reader("ours, 8 MB pieces, 2 threads", lambda p: in_pieces(p, 2)),
    Reader("ours, whole tensors in new memory", whole),
    Reader("safetensors, get_tensor", safetensors, "safetensors"),
    Reader("fastsafetensors, its defaults, a file at a time", fastsafetensors, FAST),
    Reader("fastsafetensors, least memory, page cache", fastsafetensors_bounded, FAST, CACHED),
    Reader("runai-model-streamer, its defaults", runai, RUNAI),
    Reader("runai-model-streamer, least memory, page cache", lambda p: runai(p, owned=False), RUNAI, SMALL),
)


def files(path: Path) -> list[Path]:
    """Return the checkpoint's safetensors files."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def sizes(path: Path) -> list[int]:
    """Return the bytes of every tensor."""
    return [info.nbytes for info in Checkpoint.open(path).tensors.values()]


def installed(package: str) -> str | None:
    """Return a package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def prepare(path: Path, cache: str) -> None:
    """Load the files into the page cache, or ask the system to drop them from it."""
    for _ in plain(path) if cache == "warm" else ():
        pass
    for file in files(path) if cache == "cold" else ():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(path: Path, cache: str, runs: int, logs: Path) -> list[list[str]]:
    """Return the rows of the table: a reader with its speed and memory, or a note that it isn't installed."""
    there = {i: r for i, r in enumerate(READERS) if installed(r.package)}
    speeds, peaks, sums = {i: [0.0] * 0 for i in there}, {i: [0] * 0 for i in there}, set()
    for _ in range(runs):
        for i, reader in there.items():
            prepare(path, cache)
            me = [sys.executable, "-m", "benchmarks.readers", str(path), "--only", str(i)]
            done = run(me, logs / "readers", reader.env)
            if done.status:
                raise SystemExit(f"{reader.name}: {done.output}")
            told = json.loads(done.stdout.splitlines()[-1])
            sums.add(told["sum"])
            if len(sums) > 1:
                raise SystemExit(f"{reader.name}: read other bytes than the readers before it")
            speeds[i].append(sum(sizes(path)) / told["seconds"] / 1e9)
            peaks[i].append(done.peak_bytes)
            print(f"{reader.name}: {speeds[i][-1]:.2f} GB/s", file=sys.stderr)
    return [_row(reader.name, speeds.get(i, []), peaks.get(i, [])) for i, reader in enumerate(READERS)]


def _row(name: str, speeds: list[float], peaks: list[int]) -> list[str]:
    if not speeds:
        return [name, "not installed", "", ""]
    span = f"{min(speeds):.2f}–{max(speeds):.2f}"
    return [name, f"{statistics.median(speeds):.2f}", span, page.megabytes(max(peaks))]


def only(reader: Reader, path: Path) -> None:
    """Read once and print seconds and the sum."""
    if reader.package != "lorasurgery":
        __import__(reader.package.replace("-", "_"))
    torch.set_num_threads(1)  # so that adding up costs the same for all
    start = time.perf_counter()
    found = sum(reader.read(path)) & MASK
    print(json.dumps({"seconds": time.perf_counter() - start, "sum": found}))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.checkpoint.resolve()
    if args.only is not None:
        only(READERS[args.only], path)
        return
    rows, tensors = measure(path, args.cache, args.runs, Options.work / "logs"), sizes(path)
    print("\n".join(page.table([f"{args.cache} page cache", "GB/s", "min–max", "peak MB"], rows)))
    versions = {p: installed(p) for p in ("lorasurgery", "torch", "safetensors", FAST, RUNAI)}
    print(
        f"\n{sum(tensors) / 1e9:.2f} GB in {len(files(path))} files, largest tensor {page.megabytes(max(tensors))} MB; "
        + ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    )


if __name__ == "__main__":
    main()
