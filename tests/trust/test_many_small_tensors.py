"""Very many, very small tensors: steps grow as their number does, and only so many are under way at once.

Counted in steps and objects: what they take in seconds, benchmarks/many_tensors.py measures.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorasurgery as ls
from lorasurgery.engine.buffers import Buffers
from lorasurgery.engine.pipeline import Pipeline

FEW, MANY = 64, 256
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "merge": lambda w, out: ls.merge(w / "base", [w / "adapter"], out),
    "merge --undo": lambda w, out: ls.merge(w / "base", [w / "adapter"], out, undo=True),
    "merge --in-place": lambda w, out: ls.merge(shutil.copytree(w / "base", out), [w / "adapter"], in_place=True),
    "unmerge": lambda w, out: ls.unmerge(w / "base", [w / "adapter"], out),
    "extract": lambda w, out: ls.extract(w / "base", w / "tuned", out, ls.ExtractOptions(ls.RankChoice(rank=2))),
    "verify": lambda w, out: ls.verify(w / "base", against=w / "base", adapters=[]),
    "rerank": lambda w, out: ls.rerank(w / "adapter", out, ls.RankChoice(rank=1)),
    "convert": lambda w, out: ls.convert(w / "adapter", out, ls.ConvertOptions("peft", dtype="F16")),
    "diff": lambda w, out: ls.diff(w / "base", w / "tuned"),
}


def make(folder: Path, count: int) -> Path:
    """base, tuned and an adapter for each of so many matrices of 4×4."""
    generator = torch.Generator().manual_seed(0)
    base, tuned, factors = {}, {}, {}
    for i in range(count):
        name = f"model.layers.{i // len(KINDS)}.{KINDS[i % len(KINDS)]}"
        up, down = torch.randn(4, 2, generator=generator), torch.randn(2, 4, generator=generator)
        base[f"{name}.weight"] = torch.randn(4, 4, generator=generator)
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + up @ down
        factors[f"base_model.model.{name}.lora_A.weight"] = down
        factors[f"base_model.model.{name}.lora_B.weight"] = up
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text("{}")
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [k.partition(".")[2] for k in KINDS]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {count: make(tmp_path_factory.mktemp(str(count)), count) for count in (FEW, MANY)}


def steps(work: Callable[[], object]) -> int:
    """Lines of the package that are carried out, each turn of a loop for itself, in whatever thread."""
    found = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal found
        if "lorasurgery" not in frame.f_code.co_filename:
            return None
        found += event == "line"
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", VERBS)
def test_steps_grow_as_the_number_of_tensors(name: str, worlds: dict[int, Path], tmp_path: Path) -> None:
    """Four times the tensors take no more than four times the steps, and a fifth."""
    VERBS[name](worlds[FEW], tmp_path / "first")  # what is imported or made once
    few, many = (steps(lambda n=n: VERBS[name](worlds[n], tmp_path / str(n))) for n in (FEW, MANY))
    assert few > 10 * FEW, "nothing was counted"
    assert many < 1.2 * MANY / FEW * few, (few, many)


HELD = {"merge": 2300, "merge --in-place": 3200, "extract": 2700, "rerank": 2800}
"""Bytes of Python's memory for each tensor when the last of them is written; torch's own come on top."""


@pytest.mark.parametrize("name", HELD)
def test_little_is_held_of_each_tensor(
    name: str, worlds: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between 64 and 256 tensors what is held grows by no more than so much for each."""
    held: list[int] = []
    plain = Pipeline.run

    def run(self: Pipeline, jobs: Any) -> None:
        plain(self, jobs)
        held.append(tracemalloc.get_traced_memory()[0])

    def most(count: int) -> int:
        held.clear()
        gc.collect()
        tracemalloc.start()
        try:
            VERBS[name](worlds[count], tmp_path / str(count))
        finally:
            tracemalloc.stop()
        return max(held)

    monkeypatch.setattr(Pipeline, "run", run)
    VERBS[name](worlds[FEW], tmp_path / "first")
    few, many = most(FEW), most(MANY)
    assert (many - few) / (MANY - FEW) <= HELD[name], (few, many)


class Small:
    """A job of few bytes, which counts how many are between their first and their last step."""

    cost = 64
    begun, most, lock = 0, 0, threading.Lock()

    def read(self) -> None:
        with self.lock:
            Small.begun += 1
            Small.most = max(Small.most, Small.begun)

    def compute(self) -> None: ...

    def write(self) -> None:
        with self.lock:
            Small.begun -= 1


def test_small_jobs_are_bounded_in_number() -> None:
    """96 MB would be room for 1.5 million jobs of 64 bytes; their objects would take gigabytes."""
    made = 0

    def jobs() -> Any:
        nonlocal made
        for _ in range(50_000):
            made += 1
            yield Small()

    Small.begun = Small.most = 0
    Pipeline(max_bytes=96 << 20).run(jobs())
    assert (made, Small.begun) == (50_000, 0)
    assert Small.most <= (96 << 20) // (16 << 10)


def test_small_memory_is_not_kept() -> None:
    """Buffers of a few bytes are not looked for in a list of them."""
    buffers = Buffers(torch.device("cpu"))
    lent = [buffers.take(32) for _ in range(1000)]
    assert all(b.untyped_storage().nbytes() < 4096 for b in lent)
    for buffer in lent:
        buffers.give(buffer)
    assert not buffers._free
