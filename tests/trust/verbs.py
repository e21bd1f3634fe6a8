"""Every verb as a call in this process, on a world so small that it takes an instant."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from long_runs import checkpoint, hashes
from safetensors.torch import load_file, save_file

from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.diff import diff
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify

SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, CONFIG, TOKENIZER = "model.safetensors.index.json", "config.json", "tokenizer.json"
FACTORS, ADAPTER = "adapter_model.safetensors", "adapter_config.json"
SHAPES = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}


@dataclass(frozen=True)
class Verb:
    """One operation.

    Args:
        work: Called with the world's folder, the output, and options such as overwrite.
        reads: Files of the world that decide its result.
        start: What the output is a copy of at first, for those in place.
        file: Whether the output is a single file.
    """

    work: Callable[..., Any]
    reads: tuple[str, ...]
    start: str = ""
    file: bool = False

    def place(self, world: Path, home: Path) -> Path:
        """The output, with what the operation begins with."""
        out = home / ("out.safetensors" if self.file else "out")
        if self.start:
            shutil.copytree(world / self.start, out)
        return out


def _of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


BASE = _of("base", SHARD, OTHER, INDEX, CONFIG, TOKENIZER)
STYLE, TOPIC = _of("style", FACTORS, ADAPTER, TOKENIZER), _of("topic", FACTORS, ADAPTER, TOKENIZER)
RECORD = _of("merged", "lorasurgery-undo/0001.safetensors")
RANK = RankChoice(rank=2)

OUTSIDE = {
    "merge": Verb(lambda w, o, **m: merge(w / "base", [w / "style"], o, **m), BASE[:4] + STYLE),
    "merge, one file": Verb(
        lambda w, o, **m: merge(w / "one.safetensors", [w / "style"], o, **m), ("one.safetensors", *STYLE[:2]), file=True
    ),
    "merge --undo": Verb(lambda w, o, **m: merge(w / "base", [w / "style"], o, undo=True, **m), BASE + STYLE),
    "unmerge": Verb(
        lambda w, o, **m: unmerge(w / "merged", [w / "style"], o, **m), _of("merged", SHARD, CONFIG) + STYLE[:2] + RECORD
    ),
    "unmerge --no-undo": Verb(
        lambda w, o, **m: unmerge(w / "merged", [w / "style"], o, undo=False, **m),
        _of("merged", SHARD, CONFIG, TOKENIZER) + STYLE[:2],
    ),
    "extract": Verb(
        lambda w, o, **m: extract(w / "base", w / "tuned", o, ExtractOptions(RANK), **m),
        BASE[:4] + _of("tuned", SHARD, OTHER, INDEX, CONFIG),
    ),
    "rerank": Verb(lambda w, o, **m: rerank(w / "style", o, RANK, **m), STYLE),
    "blend": Verb(
        lambda w, o, **m: blend([w / "style", w / "topic"], o, BlendOptions(weights=[0.5]), **m), STYLE[:2] + TOPIC
    ),
    "convert": Verb(lambda w, o, **m: convert(w / "style", o, ConvertOptions("peft"), base=w / "base", **m), STYLE + BASE[:3]),
}  # fmt: skip
INSIDE = {
    "merge --in-place": Verb(lambda w, o, **m: merge(o, [w / "style"], in_place=True, **m), STYLE, "base"),
    "unmerge --in-place": Verb(lambda w, o, **m: unmerge(o, [w / "style"], in_place=True, **m), STYLE[:2], "merged"),
    "switch": Verb(lambda w, o, **m: switch(o, [w / "topic"], from_=[w / "style"], **m), STYLE[:2] + TOPIC, "merged"),
}
REPORTS = {
    "verify": Verb(lambda w, _: verify(w / "merged"), _of("merged", SHARD, OTHER, INDEX, CONFIG) + RECORD),
    "verify an adapter": Verb(lambda w, _: verify(w / "style"), STYLE[:2]),
    "verify --against": Verb(
        lambda w, _: verify(w / "merged", against=w / "base", adapters=[w / "style"]), BASE[:3] + STYLE[:2] + RECORD
    ),
    "diff": Verb(lambda w, _: diff(w / "base", w / "tuned"), BASE[:3] + _of("tuned", SHARD, OTHER, INDEX)),
    "diff adapters": Verb(lambda w, _: diff(w / "style", w / "topic"), STYLE[:2] + TOPIC[:2]),
    "check": Verb(lambda w, _: check(w / "style", "vllm", base=w / "base"), STYLE[:2] + BASE[:3]),
    "inspect": Verb(lambda w, _: inspect(w / "base"), BASE[:4]),
    "inspect --spectrum": Verb(lambda w, _: inspect(w / "style", spectrum=True), STYLE[:2]),
    "merge --dry-run": Verb(lambda w, o: merge(w / "base", [w / "style"], o, dry_run=True), BASE[:4] + STYLE[:2]),
}
WRITING = OUTSIDE | INSIDE


def make_world(folder: Path) -> Path:
    """base, tuned and merged in two shards, base in one file, and two adapters with tokenizers of their own."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(4):
        for kind, size in SHAPES.items():
            weight = (0.02 * torch.randn(size, generator=generator)).bfloat16()
            shards[layer // 2][f"model.layers.{layer}.{kind}.weight"] = weight
    tuned = [
        {n: w + (0.01 * torch.randn(w.shape, generator=generator)).bfloat16() for n, w in s.items()} for s in shards
    ]
    for name, tensors in (("base", shards), ("tuned", tuned)):
        (checkpoint(folder / name, tensors) / TOKENIZER).write_text('{"of": "base"}')
    save_file(shards[0] | shards[1], folder / "one.safetensors", {"format": "pt"})
    for name in ("style", "topic"):
        adapter(folder / name, generator)
    merge(folder / "base", [folder / "style"], folder / "merged", undo=True)
    return folder


def adapter(folder: Path, generator: torch.Generator) -> Path:
    """A PEFT adapter for all matrices."""
    factors = {}
    for layer in range(4):
        for kind, (out, into) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{kind}"
            factors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, into, generator=generator)
            factors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    folder.mkdir(parents=True)
    save_file(factors, folder / FACTORS, {"format": "pt"})
    (folder / ADAPTER).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (folder / TOKENIZER).write_text(json.dumps({"of": folder.name}))
    return folder


def state(home: Path) -> dict[str, str]:
    """SHA-256 of every file but the lock's."""
    return {name: digest for name, digest in hashes(home).items() if not name.endswith(LOCK)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


class Paused:
    """A call in a thread of its own that stops when it first tells how far it is.

    Example:
        with Paused(lambda progress: merge(base, adapters, out, progress=progress)) as first:
            ...  # while it is in the middle
        first.result()
    """

    def __init__(self, work: Callable[..., Any]) -> None:
        self._there, self._go = threading.Event(), threading.Event()
        self._work, self._failure, self._report = work, None, None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Paused:
        self._thread.start()
        assert self._there.wait(120)
        assert self._thread.is_alive(), self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._thread.join(120)

    def result(self) -> Any:
        """Its report, or what it failed with."""
        if self._failure is not None:
            raise self._failure
        return self._report

    def _run(self) -> None:
        try:
            self._report = self._work(progress=self._stop)
        except BaseException as problem:
            self._failure = problem
        self._there.set()

    def _stop(self, *_: object) -> None:
        if not self._there.is_set():
            self._there.set()
            self._go.wait(120)
