"""The main job on real weights: fine-tune MiniLM, extract LoRAs of its update, merge them, compare, undo.

    make demo                                   # or: python examples/demo.py
    python examples/demo.py --quick --work /tmp/demo

Everything it makes lies under .demo/ in the checkout; a second run uses what is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from minilm_finetune import Schedule, base_model, docstring_pairs, embed_pairs, finetune, split, top1
from peft import PeftModel
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
HERE = Path(__file__).parent
HELD_OUT = 160


def main() -> int:
    """Run the demo; the exit status says whether its sanity bounds hold."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    base, tuned = args.work / "base", args.work / "tuned"
    if not (base / "model.safetensors").exists():
        shutil.copytree(base_model(), base, dirs_exist_ok=True)
    if (tuned / "model.safetensors").exists():
        print(f"{tuned} is there already; delete it to train again")
    else:
        finetune(tuned, Schedule(steps=4, batch=8) if args.quick else Schedule(), HELD_OUT)
    bench = Bench(base, tuned, 32 if args.quick else HELD_OUT)
    rows = [bench.row_of_model("base", base)]
    for rank in (4, 64) if args.quick else (4, 8, 16, 32, 64, 128):
        rows.append(one_rank(bench, args.work, rank))
    rows.append(bench.row_of_model("tuned", tuned))
    show(rows)
    last = rows[-2]
    undo(args.work, base, Path(last["merged"]), Path(last["adapter"]))
    whats_next(base, tuned)
    return check(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".demo")
    parser.add_argument("--quick", action="store_true", help="a few steps and two ranks, to see that it runs")
    return parser.parse_args()


def cli(*words: str | Path) -> dict[str, Any]:
    """Run one lorasurgery command, show it, and return its JSON report."""
    shown = [os.path.relpath(w) if isinstance(w, Path) else w for w in words]
    print("$ lorasurgery", *shown)
    command = [sys.executable, "-m", "lorasurgery", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


class Bench:
    """Held-out sentences and what the tuned model makes of them; every other model is held against that."""

    def __init__(self, base: Path, tuned: Path, held_out: int) -> None:
        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.pairs = split(docstring_pairs(), HELD_OUT)[1][:held_out]
        self.reference = self.embed(_load(tuned))

    def embed(self, model: torch.nn.Module) -> Tensor:
        """Embeddings (2, n, 384) of the held-out queries and docstrings."""
        return embed_pairs(model.eval(), self.tokenizer, self.pairs)

    def row_of_model(self, name: str, path: Path) -> dict[str, Any]:
        """How near a whole checkpoint is to the tuned model."""
        found = self.embed(_load(path))
        cosine = (found * self.reference).sum(-1)
        return {"name": name, "mean": float(cosine.mean()), "min": float(cosine.min()), "top1": top1(found)}

    def cosine_of_adapter(self, adapter: Path) -> float:
        """The same for base + adapter as PEFT runs it, unmerged."""
        model = PeftModel.from_pretrained(_load(self.base), adapter)
        return float((self.embed(model) * self.reference).sum(-1).mean())


def _load(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModel.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def one_rank(bench: Bench, work: Path, rank: int) -> dict[str, Any]:
    """extract → merge → compare, through the command line."""
    adapter, merged = work / f"adapter-r{rank}", work / f"merged-r{rank}"
    found = cli("extract", work / "base", work / "tuned", "-o", adapter, "--rank", str(rank), "--overwrite")
    cli("merge", work / "base", adapter, "-o", merged, "--overwrite")
    totals = found["totals"]
    return bench.row_of_model(f"rank {rank}", merged) | {
        "size": totals["adapter_bytes"], "share": totals["size_ratio"], "error": totals["error"],
        "peft": bench.cosine_of_adapter(adapter), "adapter": str(adapter), "merged": str(merged),
    }  # fmt: skip


def undo(work: Path, base: Path, merged: Path, adapter: Path) -> None:
    """Take the adapter out again and say how far the result is from the base."""
    restored = work / "restored"
    cli("unmerge", merged, adapter, "-o", restored, "--base", base, "--overwrite")
    before, after = load_file(base / "model.safetensors"), load_file(restored / "model.safetensors")
    far = max(float((after[n].double() - w.double()).abs().max()) for n, w in before.items())
    same = sum(int((after[n] == w).sum()) for n, w in before.items()) / sum(w.numel() for w in before.values())
    print(f"unmerged: {same:.1%} of all values are the base's to the bit, the largest difference is {far:.1e}\n")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: rank, adapter size, error, and how near each model comes to the tuned one."""
    table = Table(box=SIMPLE, title="held-out sentences, against the fine-tuned model", title_justify="left")
    for title in ("", "adapter", "of model", "error of ΔW", "cosine, merged", "least", "cosine, base+PEFT", "top-1"):
        table.add_column(title, justify="right")
    for row in rows:
        sizes = (
            [f"{row['size'] / 1e6:.2f} MB", f"{row['share']:.1%}", f"{row['error']:.1%}"] if "size" in row else [""] * 3
        )
        peft = f"{row['peft']:.5f}" if "peft" in row else ""
        table.add_row(row["name"], *sizes, f"{row['mean']:.5f}", f"{row['min']:.5f}", peft, f"{row['top1']:.1%}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)


def whats_next(base: Path, tuned: Path) -> None:
    """End with commands that can be pasted."""
    b, t = os.path.relpath(base), os.path.relpath(tuned)
    out = os.path.relpath(base.parent)
    print(
        "Try next:\n"
        f"  lorasurgery extract {b} {t} -o {out}/by-energy --energy 0.9            # the least rank that holds 90%\n"
        f"  lorasurgery extract {b} {t} -o {out}/attention --target attention --rank 16 -v\n"
        f"  lorasurgery merge {b} {out}/adapter-r64 -w 0.5 -o {out}/half            # half the fine-tune\n"
        f"  lorasurgery merge {b} {out}/adapter-r64 -o {out}/bf16 --dtype bfloat16  # see what rounding costs"
    )


def check(rows: list[dict[str, Any]]) -> int:
    """Sanity bounds; a demo that shows nonsense must fail."""
    ranks = [r for r in rows if "peft" in r]
    nearer = ranks[-1]["mean"] > ranks[0]["mean"] and ranks[-1]["mean"] > 0.99
    same = all(abs(r["peft"] - r["mean"]) < 1e-4 for r in ranks)
    if not (nearer and same):
        print("the sanity bounds do not hold: higher ranks must come nearer, and PEFT must agree", file=sys.stderr)
    return 0 if nearer and same else 1


if __name__ == "__main__":
    sys.exit(main())
