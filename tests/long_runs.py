"""A sharded pair of checkpoints with an adapter, and runs of them in processes that can be killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorasurgery.checkpoint.lock import LOCK

HIDDEN, INNER, LAYERS = 256, 512, 6
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
          "mlp.down_proj": (HIDDEN, INNER)}  # fmt: skip
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": 300}


def world(folder: Path) -> tuple[Path, Path, Path]:
    """(base, tuned, adapter): three shards, the second of which no adapter touches; every matrix of tuned differs."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    tuned: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    factors = {}
    for layer in range(LAYERS):
        for kind, (out, into) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}.weight"
            weight = (0.02 * torch.randn(out, into, generator=generator)).bfloat16()
            update = torch.randn(out, 12, generator=generator) @ torch.randn(12, into, generator=generator)
            shards[2 * (layer // 3)][name] = weight
            tuned[2 * (layer // 3)][name] = (weight.float() + 2e-4 * update).bfloat16()
            key = f"base_model.model.model.layers.{layer}.{kind}"
            factors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(8, into, generator=generator)
            factors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 8, generator=generator)
    other = {"model.embed_tokens.weight": torch.randn(300, HIDDEN, generator=generator).bfloat16(),
             "model.norm.weight": torch.ones(HIDDEN).bfloat16()}  # fmt: skip
    shards[1] |= other
    tuned[1] |= other
    base, changed = checkpoint(folder / "base", shards), checkpoint(folder / "tuned", tuned)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    return base, changed, adapter


def checkpoint(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict[str, Any] = CONFIG) -> Path:
    """A sharded checkpoint with its index."""
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
    index = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def left(out: Path) -> list[str]:
    """The names of what a run that was killed left in its output, but for the lock, which nobody holds any more."""
    return [p.name for p in out.iterdir() if p.name != LOCK]


def operation(name: str, folder: Path, out: Path, **more: Any) -> Any:
    """One of the operations that can be resumed, on what world() made."""
    from lorasurgery.linalg.rank import Budget, RankChoice
    from lorasurgery.ops.blend import BlendOptions, blend
    from lorasurgery.ops.extract import ExtractOptions, extract
    from lorasurgery.ops.merge import merge
    from lorasurgery.ops.unmerge import unmerge

    base, tuned, adapter = folder / "base", folder / "tuned", folder / "adapter"
    if name == "merge":
        return merge(base, [adapter], out, rounding="stochastic", **more)
    if name == "unmerge":
        return unmerge(base, [adapter], out, max_shard_size=700_000, **more)
    if name == "extract":
        return extract(base, tuned, out, ExtractOptions(RankChoice(rank=8)), **more)
    if name == "extract --budget":
        return extract(base, tuned, out, ExtractOptions(RankChoice(budget=Budget(size=150_000))), **more)
    return blend([adapter, adapter], out, BlendOptions(weights=[0.5, 0.25], choice=RankChoice(rank=6)), **more)


def _slowly(name: str, folder: Path, out: Path, told: Any, more: dict[str, Any]) -> None:
    def tell(tensor: str, done: int, total: int) -> None:
        told.send(tensor)
        time.sleep(0.02)

    operation(name, folder, out, progress=tell, **more)
    told.send(None)


def kill_after(name: str, folder: Path, out: Path, tensors: int, seconds: float, **more: Any) -> bool:
    """Start an operation in a process of its own and kill -9 it after some tensors and then some seconds more.

    Returns:
        Whether it was still at work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lorasurgery.ops.merging.stream", "lorasurgery.ops.extraction.decompose", "long_runs"]
    )
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_slowly, args=(name, folder, out, theirs, more))
    process.start()
    theirs.close()
    finished = False
    try:
        for _ in range(tensors):
            finished = mine.recv() is None
            if finished:
                break
        time.sleep(seconds)
    except EOFError:
        finished = True
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    mine.close()
    return not finished


def torchrun(ranks: int, arguments: list[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node N -m lorasurgery …`, or a script in its place, waited for."""
    program = [script] if script else ["-m", "lorasurgery"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=3000)
