"""What exact undo costs and saves: record sizes, seconds compared with a plain merge, and drift compared with PEFT.

python benchmarks/undo.py BASE [--cycles 100]      # a folder with one model.safetensors that transformers can load

Prints the tables of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from undo_world import adapter, cast, sums

from lorasurgery.ops.merge import merge
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (2e-4, 2e-3, 2e-2, 0.2, 2.0)


def table_of_sizes(base: Path, work: Path, rank: int = 16) -> None:
    """Print the record's size relative to the tensors it covers, and check that all tensors are restored."""
    print(f"| dtype | {' | '.join(f'update {size:.4g} of ‖W‖' for size in SIZES)} |\n|---|{'---:|' * len(SIZES)}")
    for name, dtype in DTYPES.items():
        model, cells = cast(base, work / name, dtype), []
        expected = sums(model)
        factors = load_file(adapter(model, work / "probe", 1, 1.0) / "adapter_model.safetensors")
        touched = {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight" for k in factors}
        shutil.rmtree(work / "probe")
        nbytes = sum(t.nbytes for k, t in load_file(model / "model.safetensors").items() if k in touched)
        for size in SIZES:
            lora = adapter(model, work / "a", rank, size)
            merge(model, [lora], work / "m", undo=True, allow_loss=True)
            record = (work / "m/lorasurgery-undo/0001.safetensors").stat().st_size
            unmerge(work / "m", [lora], work / "b")
            assert sums(work / "b") == expected, (name, size)
            cells.append(f"{record / nbytes:.2%}")
            for folder in ("a", "m", "b"):
                shutil.rmtree(work / folder)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shutil.rmtree(model)


def table_of_times(base: Path, work: Path, runs: int = 5) -> None:
    """Print medians of interleaved runs within one process, files cached."""
    model = cast(base, work / "model", torch.bfloat16)
    one, two = (adapter(model, work / f"a{i}", 16, 2e-3, seed=i) for i in (1, 2))
    merge(model, [one], work / "undoable", undo=True)
    inside = shutil.copytree(work / "undoable", work / "inside")
    steps: dict[str, Callable[[], object]] = {
        "merge -o": lambda: merge(model, [one], work / "out"),
        "merge -o --undo": lambda: merge(model, [one], work / "out", undo=True),
        "unmerge -o, rounded": lambda: unmerge(work / "undoable", [one], work / "out", undo=False),
        "unmerge -o, exact": lambda: unmerge(work / "undoable", [one], work / "out"),
        "switch": lambda: (switch(inside, [two]), switch(inside, [one])),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append((time.perf_counter() - start) / (2 if name == "switch" else 1))
            shutil.rmtree(work / "out", ignore_errors=True)
    print("| command | seconds |\n|---|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.2f} |")


def table_of_drift(base: Path, work: Path, cycles: int) -> None:
    """Print the share of touched values that equal the base's after so many switches and a final unmerge."""
    model = cast(base, work / "drift", torch.bfloat16)
    loras = [adapter(model, work / f"l{i}", 16, 2e-3 * (i + 1), seed=i) for i in range(5)]
    order, chosen = random.Random(0), [0]
    while len(chosen) <= cycles:
        chosen.append(order.choice([i for i in range(5) if i != chosen[-1]]))
    inside = shutil.copytree(model, work / "switched")
    merge(inside, [loras[chosen[0]]], in_place=True)
    for i in chosen[1:]:
        switch(inside, [loras[i]])
    unmerge(inside, [loras[chosen[-1]]], in_place=True)
    print(f"ours after {cycles} switches: every file equal: "
          f"{(inside / 'model.safetensors').read_bytes() == (model / 'model.safetensors').read_bytes()}")  # fmt: skip
    print("| PEFT, cycles of merge_adapter and unmerge_adapter | values equal to the base's | ‖W − base‖/‖base‖ |")
    print("|---|---:|---:|")
    for done, share, off in peft_drift(model, loras, chosen, work):
        print(f"| {done} | {share:.1%} | {off:.2e} |", flush=True)


def peft_drift(model: Path, loras: list[Path], chosen: list[int], work: Path) -> list[tuple[int, float, float]]:
    """Run the same cycles in PEFT: merge, unmerge, the next adapter; measured after some of them."""
    from peft import PeftModel
    from transformers import AutoModel

    named = []
    for i, lora in enumerate(loras):  # PEFT requires target_modules
        factors = load_file(lora / "adapter_model.safetensors")
        kinds = {k.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for k in factors}
        named.append(work / f"peft{i}")
        named[-1].mkdir()
        save_file({k: v.bfloat16() for k, v in factors.items()}, named[-1] / "adapter_model.safetensors")
        config = json.loads((lora / "adapter_config.json").read_text())
        exact = sorted({k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in factors})
        config |= {"target_modules": exact, "task_type": None}
        (named[-1] / "adapter_config.json").write_text(json.dumps(config))
        assert kinds
    base = AutoModel.from_pretrained(model, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(base, named[0], adapter_name="0")
    for i in range(1, len(named)):
        peft.load_adapter(named[i], adapter_name=str(i))
    layers = {n: m.base_layer.weight for n, m in peft.named_modules() if hasattr(m, "base_layer")}
    first = {n: w.detach().clone() for n, w in layers.items()}
    found, total = [], sum(w.numel() for w in first.values())
    for done, i in enumerate(chosen, 1):
        peft.set_adapter(str(i))
        peft.merge_adapter()
        peft.unmerge_adapter()
        if done in (1, 10, len(chosen) - 1):
            same = sum(int((layers[n] == w).sum()) for n, w in first.items())
            off = sum(float((layers[n].float() - w.float()).square().sum()) for n, w in first.items())
            size = sum(float(w.float().square().sum()) for w in first.values())
            found.append((done, same / total, (off / size) ** 0.5))
    return found


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--cycles", type=int, default=100)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        table_of_sizes(args.base, Path(scratch))
        table_of_times(args.base, Path(scratch))
        table_of_drift(args.base, Path(scratch), args.cycles)


if __name__ == "__main__":
    main()
