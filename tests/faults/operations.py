"""Every operation that writes, by its words on the command line, on a world so small that it runs in an instant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner
from long_runs import checkpoint, hashes
from safetensors.torch import save_file

from lorasurgery.checkpoint.inplace.recover import FOLDER
from lorasurgery.checkpoint.lock import LOCK

SHAPES = {"self_attn.q_proj": (64, 32), "mlp.down_proj": (32, 96)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "vocab_size": 40}


@dataclass(frozen=True)
class Operation:
    """One command.

    Args:
        words: Given the world's folder and the output, the command line.
        start: What the output is a copy of at first, for those that work in place.
    """

    words: Callable[[Path, Path], list[str | Path]]
    start: str | None = None

    def prepare(self, world: Path, out: Path) -> Path:
        """Put there what the operation begins with; returns the output."""
        if self.start:
            shutil.copytree(world / self.start, out)
        return out


OPERATIONS = {
    "merge": Operation(lambda w, out: ["merge", w / "base", w / "style", "-o", out]),
    "merge --undo": Operation(lambda w, out: ["merge", w / "base", w / "style", "--undo", "-o", out]),
    "merge --in-place": Operation(lambda w, out: ["merge", out, w / "style", "--in-place"], "base"),
    "unmerge": Operation(lambda w, out: ["unmerge", w / "merged", w / "style", "-o", out]),
    "unmerge --in-place": Operation(lambda w, out: ["unmerge", out, w / "style", "--in-place"], "merged"),
    "switch": Operation(lambda w, out: ["switch", out, "--to", w / "topic", "--from", w / "style"], "merged"),
    "extract": Operation(lambda w, out: ["extract", w / "base", w / "tuned", "-o", out, "--rank", "4"]),
    "blend": Operation(lambda w, out: ["blend", w / "style", w / "topic", "-w", "0.5", "-o", out]),
}
OUTSIDE = [name for name, operation in OPERATIONS.items() if not operation.start]
INSIDE = [name for name, operation in OPERATIONS.items() if operation.start]


def make_world(folder: Path) -> Path:
    """base and tuned in two shards, two adapters, and base with the first one merged, to be undone."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    tuned: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(2):
        for kind, (out, into) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}.weight"
            shards[layer][name] = (0.02 * torch.randn(out, into, generator=generator)).bfloat16()
            tuned[layer][name] = shards[layer][name] + 0.01 * torch.randn(out, into, generator=generator).bfloat16()
    embedding = {"model.embed_tokens.weight": torch.randn(40, 32, generator=generator).bfloat16()}
    checkpoint(folder / "base", [*shards, embedding], CONFIG)
    checkpoint(folder / "tuned", [*tuned, embedding], CONFIG)
    for name in ("style", "topic"):
        adapter(folder / name, generator)
    run("merge", folder / "base", folder / "style", "--undo", "-o", folder / "merged")
    return folder


def adapter(folder: Path, generator: torch.Generator, layers: int = 2) -> Path:
    """A PEFT adapter for all matrices."""
    factors = {}
    for layer in range(layers):
        for kind, (out, into) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{kind}"
            factors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, into, generator=generator)
            factors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status, the last line on stderr, and all of it."""

    status: int
    line: str
    text: str


def run(*words: str | Path, fails: bool = False) -> Done:
    """The command line in this process; an exception that is not one line of an error is raised here.

    Args:
        fails: It may; otherwise it must not.
    """
    from lorasurgery.cli.main import main

    result = CliRunner().invoke(main, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert fails or result.exit_code == 0, result.stderr
    return Done(result.exit_code, (result.stderr.splitlines() or [""])[-1], result.stderr)


def state(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but those of an operation under way, and of the lock."""
    found = hashes(folder) if folder.exists() else {}
    return {name: digest for name, digest in found.items() if FOLDER not in name and LOCK not in name}
