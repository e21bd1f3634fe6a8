"""A matrix in blocks: how it is cut, which depends on where it lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasurgery.linalg.blocks import blocked, transposed_times


class Calls(TorchDispatchMode):
    """How often each operation is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(5000, 300), (300, 5000)], ids=str)
def test_other_devices_take_the_whole_matrix_at_once(shape: tuple[int, int]) -> None:
    """What is cut for a core's cache on the CPU is one product elsewhere, as each call costs a start there."""
    matrix, y = torch.empty(shape, device="meta"), torch.empty(shape[0], 4, device="meta")
    with Calls() as calls:
        assert transposed_times(blocked(matrix), y).shape == (shape[1], 4)
    assert calls.found["aten.addmm_.default"] == 1
