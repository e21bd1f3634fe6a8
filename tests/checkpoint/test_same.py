"""Two tensors are the same when their dtype, shape and every byte are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasurgery.checkpoint import same
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.same import same_bytes, same_tensors
from lorasurgery.engine.threads import thread_pool


def are_same(folder: Path, a: Tensor, b: Tensor) -> bool:
    save_file({"a": a}, folder / "a.safetensors")
    save_file({"b": b}, folder / "b.safetensors")
    with Checkpoint.open(folder / "a.safetensors") as one, Checkpoint.open(folder / "b.safetensors") as other:
        return same_tensors(one, one.tensors["a"], other, other.tensors["b"])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_byte_that_differs_is_seen(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever block it lies, at its edges too, on one thread and on several."""
    monkeypatch.setattr(same, "_BLOCK", 64)
    tensor = torch.arange(203, dtype=torch.uint8)
    with thread_pool(threads):
        assert are_same(tmp_path, tensor, tensor.clone())
        for place in (0, 7, 8, 63, 64, 127, 191, 192, 200, 202):
            other = tensor.clone()
            other[place] += 1
            assert not are_same(tmp_path, tensor, other)


def test_what_is_equal_as_numbers_may_differ_in_bytes(tmp_path: Path) -> None:
    """−0 is not 0, a not-a-number is itself; another dtype or shape with the same bytes is another tensor."""
    zero = torch.zeros(2, 3)
    assert not are_same(tmp_path, zero, -zero)
    assert are_same(tmp_path, zero / 0, zero / 0)
    assert not are_same(tmp_path, zero, zero.view(torch.int32))
    assert not are_same(tmp_path, zero, zero.view(3, 2))
    assert are_same(tmp_path, torch.zeros(0, 4), torch.zeros(0, 4))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 17])
def test_blocks_of_any_length(size: int) -> None:
    """Eight bytes at a time, and what is left of them."""
    block = torch.arange(size, dtype=torch.uint8)
    assert same_bytes(block, block.clone())
    for place in range(size):
        assert not same_bytes(block, block ^ (torch.arange(size) == place).to(torch.uint8))
