"""SHA-256 of every file that every verb writes, so that a change which must not change a byte can be seen not to.

    .venv/bin/python -W ignore tests/output_hashes.py before.json      (keep it)
    .venv/bin/python -W ignore tests/output_hashes.py after.json --against before.json

Both on one machine: last bits of products depend on the processor. The command line is driven, in one process, so that
the list outlives changes of the Python surface. What varies from run to run (seconds, memory, paths) is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import torch
import zoo
from rows import DTYPES
from table import ROWS

from lorasurgery.cli.main import main

_VARYING = re.compile(r'("(?:seconds|peak_memory_bytes|[a-z_]*seconds|device|resumed)": )[^,}\n]+')
_SETS = (["--rank", "2"], ["--energy", "0.9"], ["--tolerance", "0.3"], ["--budget", "4kB"], ["--rank", "3", "--rslora"],
         ["--rank", "3", "--alpha", "7", "--dtype", "bfloat16"], ["--rank", "2", "--svd", "randomized", "--seed", "1"],
         ["--energy", "0.8", "--uniform-rank"], ["--rank", "2", "--svd", "exact"])  # fmt: skip
_BLENDS = ([], ["-w", "0.7", "-w", "0.3"], ["--method", "cat"], ["--method", "ties", "--density", "0.4"],
           ["--method", "dare-linear", "--seed", "3"], ["--method", "dare-ties"], ["--method", "magnitude-prune"],
           ["--method", "knots-ties"], ["--rank", "2", "--normalize"], ["--budget", "50%"])  # fmt: skip
_MODELS = ("llama", "qwen2-tied", "gpt2", "bert", "t5", "mixtral", "gpt_oss", "qwen3_moe", "nomic_bert", "vit", "phi3")


class Hashes:
    """Runs commands and keeps what they leave: case/file -> hash, or the message of a refusal."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def run(self, case: str, *args: str | Path) -> bool:
        """Run one command; its report, or what it says when it stops, is hashed too. Returns whether it succeeded."""
        out, err = io.StringIO(), io.StringIO()
        words = [str(a) for a in args]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words, standalone_mode=False) or 0
            except SystemExit as end:
                code = end.code or 0
            except Exception as problem:  # click's own, and what must not happen
                code = 1
                err.write(f"{type(problem).__name__}: {problem}")
        said = out.getvalue() if not code else err.getvalue()
        self.found[f"{case}: report"] = f"{code} {_hash(_steady(said).encode())}"
        return not code

    def keep(self, case: str, path: Path) -> None:
        """Hash every file that lies at a path now."""
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            data = file.read_bytes()
            if file.suffix != ".safetensors":
                data = _steady(data.decode("utf-8", "replace")).encode()
            self.found[f"{case}: {name}"] = _hash(data)

    def make(self, case: str, out: Path, *args: str | Path) -> None:
        """Run a command that writes to a new place, and hash what it wrote."""
        if self.run(case, *args, "-o", out, "--json"):
            self.keep(case, out)


def _steady(text: str) -> str:
    return _VARYING.sub(r"\1-", text).replace(str(Path.cwd()), ".")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _stopped_at(call: int) -> Iterator[None]:
    """Let the n-th wait for the disk end in Ctrl-C."""
    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


def _ends(base: Path) -> str:
    return "" if base.is_dir() else ".safetensors"


def _copied(base: Path, target: Path) -> Path:
    return Path(shutil.copytree(base, target) if base.is_dir() else shutil.copy(base, target))


def _order_metadata(path: Path) -> None:
    """Write headers' metadata in the order of its names: the safetensors library writes it in another one every time."""
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            raw += b" " * (-len(raw) % 8)
            file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])


def whole_row(hashes: Hashes, case: str, base: Path, adapter: Path, strength: float) -> None:
    """Everything that can be done with one adapter and its base."""
    end, work = _ends(base), Path("work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    merged, place = work / f"merged{end}", work / f"place{end}"
    pair, weight = (base, adapter, "--allow-loss"), ("-w", f"{strength:g}")
    hashes.make(f"{case} merge", work / f"plain{end}", "merge", *pair, *weight, "--no-undo")
    hashes.make(f"{case} merge --undo", merged, "merge", *pair, *weight, "--undo")
    hashes.make(f"{case} unmerge", work / f"back{end}", "unmerge", merged, adapter)
    hashes.make(f"{case} subtract", work / f"less{end}", "unmerge", work / f"plain{end}", adapter, *weight)
    hashes.run(f"{case} verify", "verify", merged, "--against", base, "--adapter", adapter, *weight, "--json")
    hashes.run(f"{case} inspect", "inspect", adapter, "--spectrum", "--json")
    hashes.run(f"{case} diff", "diff", base, merged, "--json")
    for server in ("peft", "vllm", "diffusers", "comfyui"):
        hashes.run(f"{case} check {server}", "check", adapter, "--for", server, "--base", base, "--json")
    _copied(base, place)
    hashes.run(f"{case} in place", "merge", place, adapter, *weight, "--in-place", "--allow-loss", "--json")
    hashes.keep(f"{case} in place", place)
    hashes.run(f"{case} out in place", "unmerge", place, adapter, "--in-place", "--json")
    hashes.keep(f"{case} out in place", place)
    for to in ("peft", "kohya", "comfyui", "diffusers"):
        out = work / ("to" if to == "peft" else f"to-{to}.safetensors")
        hashes.make(f"{case} to {to}", out, "convert", adapter, "--to", to, "--base", base)
    adapters(hashes, case, adapter, work)


def adapters(hashes: Hashes, case: str, adapter: Path, work: Path) -> None:
    """rerank by every rule, and blends of the adapter with what rerank made of it."""
    end = _ends(adapter)
    less = work / f"less-rank{end}"
    for i, choice in enumerate((["--rank", "1"], ["--energy", "0.9"], ["--tolerance", "0.2"], ["--budget", "60%"], [])):
        out = less if not i else work / f"rank-{i}{end}"
        hashes.make(f"{case} rerank {' '.join(choice)}", out, "rerank", adapter, *choice)
    if less.exists():
        for i, method in enumerate(_BLENDS):
            out = work / f"blend-{i}{end}"
            hashes.make(f"{case} blend {' '.join(method)}", out, "blend", adapter, less, *method)
        hashes.run(f"{case} diff adapters", "diff", adapter, less, "--json")


def rows(hashes: Hashes) -> None:
    """Every row of the table of formats."""
    for row in ROWS:
        shutil.rmtree("row", ignore_errors=True)
        Path("row").mkdir()
        made = row.make(Path("row"), DTYPES[row.adapter], DTYPES[row.base])
        _order_metadata(made.adapter)
        whole_row(hashes, row.name, made.base, made.adapter, row.strength)


def extractions(hashes: Hashes) -> None:
    """extract by every rule, from a pair of every family."""
    for name in _MODELS:
        shutil.rmtree("pair", ignore_errors=True)
        make = models.make if name in models.MAKERS else zoo.make
        base, tuned = Path("pair/base"), Path("pair/tuned")
        models.save(make(name), base)
        models.save(models.perturb(make(name), std=0.1), tuned)
        for i, choice in enumerate(_SETS):
            hashes.make(f"{name} extract {' '.join(choice)}", Path(f"pair/x{i}"), "extract", base, tuned, *choice)
        for to in ("vllm", "llama.cpp"):
            hashes.make(f"{name} extract --for {to}", Path(f"pair/{to}"), "extract", base, tuned, "--for", to)
        hashes.run(f"{name} plan", "plan", base, "--rank", "4", "--json")
        hashes.run(f"{name} verify", "verify", tuned, "--json")
        hashes.run(f"{name} diff", "diff", base, tuned, "--json")


def stopped(hashes: Hashes) -> None:
    """Runs that Ctrl-C ended and --resume finished, and switches among adapters in place."""
    shutil.rmtree("stop", ignore_errors=True)
    base = models.save(models.make("llama"), Path("stop/base"))
    tuned = models.save(models.perturb(models.make("llama"), std=0.1), Path("stop/tuned"))
    hashes.make("stop extract", Path("stop/a"), "extract", base, tuned, "--rank", "4")
    hashes.make("stop rerank", Path("stop/b"), "rerank", Path("stop/a"), "--rank", "2")
    todo: dict[str, Callable[[Path], list[str | Path]]] = {
        "merge": lambda out: ["merge", base, Path("stop/a"), "--undo", "--max-shard-size", "20kB", "-o", out],
        "extract": lambda out: ["extract", base, tuned, "--rank", "3", "-o", out],
        "blend": lambda out: ["blend", Path("stop/a"), Path("stop/b"), "-o", out],
    }
    for name, words in todo.items():
        for call in (1, 3, 6):
            out = Path(f"stop/{name}-{call}")
            with _stopped_at(call):
                hashes.run(f"stop {name} {call}", *words(out), "--json")
            hashes.run(f"stop {name} {call} --resume", *words(out), "--resume", "--json")
            hashes.keep(f"stop {name} {call}", out)
    place = _copied(base, Path("stop/place"))
    hashes.run("switch merge", "merge", place, "stop/a", "--in-place", "--undo", "--json")
    for i, to in enumerate(("stop/b", "stop/a", "stop/b")):
        hashes.run(f"switch {i}", "switch", place, "--to", to, "--json")
        hashes.keep(f"switch {i}", place)


def compare(found: dict[str, str], before: dict[str, str]) -> int:
    """Print what differs from an earlier list; returns how many do."""
    differing = sorted(k for k in found.keys() | before.keys() if found.get(k) != before.get(k))
    for key in differing:
        print(f"{'new' if key not in before else 'gone' if key not in found else 'differs'}: {key}")
    print(f"{len(found)} hashes, {len(differing)} differ")
    return len(differing)


def run(parts: list[str]) -> dict[str, str]:
    """All hashes, made in a folder that goes away."""
    hashes = Hashes()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="hashes-") as folder, contextlib.chdir(folder):
        for part in (rows, extractions, stopped):
            if not parts or part.__name__ in parts:
                part(hashes)
    return hashes.found


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # diffusers writes its metadata in the order of a set
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="*", default=[], choices=["rows", "extractions", "stopped"])
    args = parser.parse_args()
    all_found = run(args.only)
    args.out.write_text(json.dumps(all_found, indent=0, sort_keys=True))
    sys.exit(bool(args.against and compare(all_found, json.loads(args.against.read_text()))))
