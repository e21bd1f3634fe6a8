"""A checkpoint of 4,000 shards, with fewer file descriptors than that."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operations import CONFIG
from safetensors import safe_open
from safetensors.torch import save_file

SHARDS, SIDE = 4000, 4


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    """base and tuned, a matrix in every shard, and an adapter for every hundredth; in memory where that is a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        folder = Path(name)
        numbers = torch.randn(SHARDS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        changed = numbers.clone()
        changed[::100] += 0.1 * torch.randn(SIDE, 1)
        _shards(folder / "base", numbers)
        _shards(folder / "tuned", changed)
        (folder / "adapter").mkdir()
        keys = [f"base_model.model.model.layers.{i}.mlp.up_proj" for i in range(0, SHARDS, 100)]
        factors = {f"{k}.lora_A.weight": torch.randn(1, SIDE) for k in keys}
        factors |= {f"{k}.lora_B.weight": torch.randn(SIDE, 1) for k in keys}
        save_file(factors, folder / "adapter/adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
        yield folder


def _shards(folder: Path, matrices: torch.Tensor) -> None:
    folder.mkdir()
    index = {}
    for i, data in enumerate(matrices.numpy()):
        name, file = _name(i), f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        header = json.dumps({name: {"dtype": "F32", "shape": [SIDE, SIDE], "data_offsets": [0, data.nbytes]}}).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _name(i: int) -> str:
    return f"model.layers.{i}.mlp.up_proj.weight"


def _run(*words: str | Path) -> None:
    """The command with at most 64 open files."""
    line = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, "-m", "lorasurgery", *map(str, words), "-q"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1200)
    assert not done.stderr, done.stderr
    assert done.returncode == 0


def test_merged(world: Path) -> None:
    """Merged: the shards that are touched change, the others keep their bytes, none is left open."""
    _run("merge", world / "base", world / "adapter", "-o", world / "merged")
    for i in (0, 1, 100, 3999):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        same = (world / "base" / file).read_bytes() == (world / "merged" / file).read_bytes()
        assert same == bool(i % 100)
    assert len(list((world / "merged").glob("*.safetensors"))) == SHARDS


def test_extracted(world: Path) -> None:
    """Extracted: the adapter has exactly the matrices that differ."""
    _run("extract", world / "base", world / "tuned", "-o", world / "out", "--rank", "1")
    with safe_open(world / "out/adapter_model.safetensors", "pt") as found:
        names = list(found.keys())
    keys = {name for name in names if "lora_A" in name}
    assert keys == {f"base_model.model.{_name(i).removesuffix('.weight')}.lora_A.weight" for i in range(0, SHARDS, 100)}


@pytest.mark.slow
def test_in_place(world: Path) -> None:
    """Merged in place and unmerged: every shard is what it was."""
    before = {f.name: f.read_bytes() for f in (world / "base").glob("*.safetensors")}
    _run("merge", world / "base", world / "adapter", "--in-place")
    after = {f.name: f.read_bytes() for f in (world / "base").glob("*.safetensors")}
    assert sum(after[n] != data for n, data in before.items()) == SHARDS // 100
    _run("unmerge", world / "base", world / "adapter", "--in-place")
    assert {f.name: f.read_bytes() for f in (world / "base").glob("*.safetensors")} == before
