"""Exact undo on real weights and Llama shapes: five sizes of update, ranks 1 to 256, three dtypes; and many switches."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from undo_world import adapter, cast, llama, sums, there_and_back

from lorasurgery.ops.merge import merge
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify

sys.path.append(str(Path(__file__).parents[4] / "examples"))
from minilm_finetune import base_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [2e-4, 2e-3, 2e-2, 0.2, 2.0]
RANKS = [1, 4, 16, 64, 256]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm(dtype: torch.dtype, tmp_path: Path) -> None:
    """A rank-16 update of 0.2% of the weights' norm, merged into MiniLM and undone: every tensor's SHA-256 is the base's."""
    base = cast(base_model(), tmp_path / "base", dtype)
    found, record = there_and_back(base, adapter(base, tmp_path / "a", 16, 2e-3), tmp_path / "w")
    assert found == sums(base)
    assert record < 0.02 * (base / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["minilm", "llama"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_rank(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Five sizes of update, from one that rounding swallows to one larger than the weights, and ranks 1 to 256."""
    base = cast(base_model(), tmp_path / "base", dtype) if shape == "minilm" else llama(tmp_path / "base", dtype, 512)
    expected = sums(base)
    for rank in RANKS:
        for size in SIZES:
            lora = adapter(base, tmp_path / f"a-{rank}-{size}", rank, size, seed=rank)
            assert there_and_back(base, lora, tmp_path / "w")[0] == expected, (rank, size)


def test_a_hundred_switches(tmp_path: Path) -> None:
    """A hundred switches among five adapters in place, and unmerge: the file is the base's, byte for byte."""
    base = llama(tmp_path / "model", torch.bfloat16, 64)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    loras = [adapter(base, tmp_path / f"a{i}", 4, 0.01 * (i + 1), seed=i) for i in range(5)]
    order = random.Random(0)
    last = loras[0]
    merge(base, [last], in_place=True)
    for _ in range(100):
        last = order.choice([lora for lora in loras if lora is not last])
        switch(base, [last])
    assert verify(base).totals["holds"]
    unmerge(base, [last], in_place=True)
    assert {p.name: p.read_bytes() for p in base.iterdir() if not p.name.startswith(".")} == before
