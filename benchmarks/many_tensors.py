"""Very many very small tensors: each command compared with reading and writing the same headers and bytes.

`python benchmarks/many_tensors.py --count 100000` makes two checkpoints of that many matrices of 4×4 and an adapter for
all of them, and prints a row for each command. The floor of a command is a process that imports torch, checks the
headers of the command's inputs, reads each of their tensors once, and writes a file like the command's output tensor by
tensor, synced; nothing is computed, and no journal, report or record is kept. All of it goes through Checkpoint and
TensorFile, as in the command itself. `busy` is the process's CPU time, which other programs hardly change; the ratio is
computed from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

if __name__ == "__main__":  # run as a script, whose folder is first on the import path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measure import OURS, Run, run

ROOT = Path(__file__).resolve().parent.parent
KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
SLACK = 256_000_000
CONFIG: dict[str, str] = {}  # no library class: importing it would dominate


@dataclass(frozen=True)
class Case:
    """A command.

    Args:
        words: Its command line; `@` marks names in the folder.
        reads: The inputs that it must read, repeated if it reads them repeatedly.
        writes: A file like the one that it makes.
        start: What its output is copied from first, for commands that work in place.
    """

    words: str
    reads: tuple[str, ...]
    writes: str | None = None
    start: str | None = None


CASES = {
    "merge": Case("merge @base @adapter -o @out", ("base", "adapter"), "base"),
    "merge --undo": Case("merge @base @adapter --undo -o @merged", ("base", "adapter"), "base"),
    "merge --in-place": Case("merge @out @adapter --in-place", ("base", "adapter"), "base", start="base"),
    "unmerge": Case("unmerge @base @adapter -o @out", ("base", "adapter"), "base"),
    "unmerge, exact": Case("unmerge @merged @adapter -o @out", ("merged", "adapter"), "base"),
    "extract": Case("extract @base @tuned --rank 2 -o @out", ("base", "tuned"), "adapter"),
    "verify": Case("verify @merged", ("merged",)),
    "verify --against": Case("verify @merged --against @base --adapter @adapter", ("merged", "base", "adapter")),
    "rerank": Case("rerank @adapter --rank 1 -o @out", ("adapter",), "adapter"),
    "blend": Case("blend @adapter @adapter --rank 2 -o @out", ("adapter", "adapter"), "adapter"),
    "convert": Case("convert @adapter --to peft --dtype float16 -o @out", ("adapter",), "adapter"),
    "diff": Case("diff @base @tuned", ("base", "tuned")),
}


def make(folder: Path, count: int, side: int) -> None:
    """Make base, tuned (in which every matrix differs) and adapter, with rank 2 for every matrix."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i // len(KINDS)}.{KINDS[i % len(KINDS)]}" for i in range(count)]
    base = torch.randn(count, side, side, generator=generator)
    up, down = (0.1 * torch.randn(count, *shape, generator=generator) for shape in ((side, 2), (2, side)))
    for name, values in (("base", base), ("tuned", base + up @ down)):
        (folder / name).mkdir()
        tensors = {f"{n}.weight": v.bfloat16() for n, v in zip(names, values, strict=True)}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    factors = {}
    for name, b, a in zip(names, up, down, strict=True):
        factors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        factors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    kinds = [k.partition(".")[2] for k in KINDS]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": kinds}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def floor(reads: list[Path], like: Path | None, out: Path) -> None:
    """Check headers, read every tensor once and write a file like another one, and nothing else."""
    from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
    from lorasurgery.checkpoint.reader import Checkpoint
    from lorasurgery.checkpoint.writer import TensorFile

    for path in reads:
        opened = Checkpoint.open(path)
        for name in opened.tensors:
            opened.raw(name)
    if like is None:
        return
    source = Checkpoint.open(like)
    tensors = [PlannedTensor(t.name, t.dtype, t.shape) for t in source.tensors.values()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TensorFile(out, PlannedFile(out.name, tensors, {"format": "pt"}), lambda _: None) as file:
        for tensor in tensors:
            file.write(tensor.name, iter([memoryview(bytes(tensor.nbytes))]))


def measure(case: Case, folder: Path, runs: int) -> tuple[Run, Run]:
    """Measure the command and its floor, each the fastest of several runs."""
    logs = folder / "logs"
    like = ["--like", str(_weights(folder / case.writes))] if case.writes else []
    reads = [str(_weights(folder / name)) for name in case.reads]
    bare = [sys.executable, __file__, "--floor", *reads, *like, "--folder", str(folder)]
    command = [*OURS, *(str(folder / w[1:]) if w.startswith("@") else w for w in case.words.split()), "-q"]
    found = []
    for _ in range(runs):
        _clear(folder, case)
        if case.start:
            shutil.copytree(folder / case.start, folder / "out")
        ours = run([*command, "--device", "cpu"], logs / "ours")
        if ours.status:
            raise SystemExit(f"{case.words}: {ours.output}")
        found.append((ours, run(bare, logs / "floor")))
    return min((o for o, _ in found), key=lambda r: r.busy), min((f for _, f in found), key=lambda r: r.busy)


def _clear(folder: Path, case: Case) -> None:
    for name in ("out", "floor", *(["merged"] if "-o @merged" in case.words else [])):
        shutil.rmtree(folder / name, ignore_errors=True)


def _weights(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))))


def main() -> None:
    """Print a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=4)
    parser.add_argument("--only", help="commands, separated by commas")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder of the inputs; created if missing")
    parser.add_argument("--floor", type=Path, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--like", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor is not None:
        floor(options.floor, options.like, options.folder / "floor" / "model.safetensors")
        return
    folder = (options.folder or ROOT / ".bench" / f"many-{options.count}").resolve()
    if not folder.exists():
        make(folder, options.count, options.side)
    alone = run([sys.executable, "-c", "import torch"], folder / "logs" / "torch")
    adapter = _weights(folder / "adapter").stat().st_size
    _line("command", "seconds", "floor", "busy", "floor", "ratio", "MB over torch", "allowed")
    for name, case in CASES.items():
        if options.only is None or name in options.only.split(","):
            ours, bare = measure(case, folder, options.runs)
            figures = ours.seconds, bare.seconds, ours.busy, bare.busy, ours.busy / bare.busy
            sizes = ours.peak_bytes - alone.peak_bytes, SLACK + adapter
            _line(name, *(f"{x:.1f}" for x in figures), *(f"{x / 1e6:.0f}" for x in sizes))


def _line(name: str, *cells: str) -> None:
    print(f"{name:<20}", *(f"{cell:>13}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
