"""What the examples share: a work folder with its models, the command line, held-out scores, tables, sanity bounds."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Defaults that the environment can override; torch and transformers read these when they are imported.
# PASSIVE: waiting threads sleep, which is three times faster if something else is running as well.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
} | os.environ
sys.path.insert(0, str(Path(__file__).parent))

import torch
from minilm_finetune import Schedule, base_model, docstring_pairs, embed_pairs, finetune, split, top1, whole_folder
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
HERE = Path(__file__).parent
HELD_OUT = 160
HELD_OUT_QUICK = 8
QUICK, SHORT = Schedule(steps=4, batch=8), Schedule(steps=20, rate=2e-4)

Pairs = list[tuple[str, str]]


def arguments(about: str | None, long: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the options common to all examples: `--quick` for long ones, `--full` for the others."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".demo", help="folder for everything that is made")
    if long:
        parser.add_argument("--quick", action="store_true", help="a few steps and little text, to check that it runs")
    else:
        parser.add_argument("--full", dest="quick", action="store_false", help="more steps and text: minutes")
    return parser


def models(work: Path, quick: bool, long: bool = False) -> tuple[Path, Path]:
    """Return the folders of base and tuned model, shared by all examples with this work folder; made if missing."""
    work.mkdir(parents=True, exist_ok=True)
    base = work / "base"
    if not base.exists():
        with whole_folder(base) as partial:
            shutil.copytree(base_model(), partial, dirs_exist_ok=True)
    return base, tuned_model(work, "tuned", docstring_pairs(), Schedule(), quick, long)


def tuned_model(work: Path, name: str, pairs: Pairs, schedule: Schedule, quick: bool, long: bool = False) -> Path:
    """Return a model fine-tuned on pairs, reusing an existing one.

    The schedule is for the demo, and for examples that find the demo's model. If they have to train it themselves, they
    use a shorter one, to stay under two minutes, and the folder's name says so.
    """
    if quick:
        name, schedule = f"{name}-quick", QUICK
    elif not (long or (work / "tuned").exists()):
        name, schedule = f"{name}-short", SHORT
    out = work / name
    if out.exists():
        print(f"{short(out)} already exists; delete it to train again")
    else:
        finetune(out, schedule, split(pairs, HELD_OUT)[0], held_out(pairs, quick))
    return out


def held_out(pairs: Pairs, quick: bool) -> Pairs:
    """Return the pairs that no example trains on."""
    return split(pairs, HELD_OUT)[1][: HELD_OUT_QUICK if quick else HELD_OUT]


def load_model(path: str | Path) -> nn.Module:
    """Load a checkpoint with transformers, in float32."""
    model: nn.Module = AutoModel.from_pretrained(path, dtype=torch.float32)
    return model.eval()


class Bench:
    """Held-out sentences and the tuned model's embeddings of them, with which every other model is compared."""

    def __init__(self, tuned: Path, quick: bool) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tuned)
        self.pairs = held_out(docstring_pairs(), quick)
        self.reference = self.embed(load_model(tuned))

    def embed(self, model: nn.Module) -> Tensor:
        """Return embeddings (2, n, 384) of the held-out queries and docstrings."""
        return embed_pairs(model.eval(), self.tokenizer, self.pairs)

    def score(self, embeddings: Tensor) -> dict[str, float]:
        """Score embeddings (2, n, 384): how near they are to the tuned model's, how often they find the docstring."""
        cosine = (embeddings * self.reference).sum(-1)
        return {"mean": float(cosine.mean()), "min": float(cosine.min()), "top1": top1(embeddings)}


def cli(*words: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one lorasurgery command, show it with its summary, and return its JSON report."""
    print("$ lorasurgery", *(short(w) if isinstance(w, Path) else w for w in words), flush=True)
    command = [sys.executable, "-m", "lorasurgery", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    for line in [*report["summary"].splitlines(), *(f"warning: {w}" for w in report["warnings"])]:
        print(f"  {line}")
    return report


def short(path: Path) -> str:
    """Return a path as one would type it here."""
    return min(os.path.relpath(path), str(path), key=len)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table under its title; all columns except the first are numbers."""
    print(f"\n{title}", flush=True)
    table = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def verdict(bounds: Mapping[str, bool]) -> int:
    """Say which sanity bounds hold and return the exit status; an example that shows nonsense must fail."""
    for claim, holds in bounds.items():
        print("holds:" if holds else "DOES NOT HOLD:", claim)
    return 0 if all(bounds.values()) else 1
