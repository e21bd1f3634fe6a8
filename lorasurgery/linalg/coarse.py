"""A matrix rounded to bfloat16, for the products of a sketch on processors that multiply such numbers in tiles (AMX).

A product takes a third of float32's time. What is lost is told from what the sketch leaves: see `LEAST`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lorasurgery.engine.threads import each, scratch
from lorasurgery.linalg.blocks import Blocks, InMemory, block_rows, over_rows

LEAST = 0.1  # ‖ΔW − USVᵀ‖/‖ΔW‖ from which on rounding adds less than 0.02% to it (docs/performance.md)
_COLUMNS = 2048  # of a tile of Mᵀ


class Coarse:
    """M (m, n) in bfloat16: products with float32 matrices, given in float32.

    >>> Coarse(InMemory(torch.eye(2))).times(torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]

    Args:
        matrix: On the CPU; where it has no rounded copy, every product rounds it anew.
    """

    def __init__(self, matrix: Blocks) -> None:
        self.exact = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self.coarse, self.total = True, matrix.total

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """Spans of the rounded copy, or of M itself."""
        if isinstance(self.exact, InMemory) and self.exact.rounded is not None:
            yield 0, self.exact.rounded
        else:
            yield from self.exact.spans()

    def times(self, x: Tensor) -> Tensor:
        """M @ x for x (n, k): (m, k), each sum rounded once."""
        out, narrow = x.new_empty(self.shape[0], x.shape[1]), x.to(torch.bfloat16)
        over_rows(self, lambda part, rows: out[rows].copy_(_rounded(part) @ narrow))  # (b, n) @ (n, k) -> (b, k)
        return out

    def transposed_times(self, y: Tensor) -> Tensor:
        """Mᵀ @ y for y (m, k): (n, k); sums over a block are rounded, then added in float32 from the first row down."""
        out, narrow = y.new_zeros(y.shape[1], self.shape[1]), y.mT.to(torch.bfloat16).contiguous()
        turned, step = y.new_empty(self.shape[1], y.shape[1]), block_rows(self)
        for first, span in self.spans():

            def add(left: int, first: int = first, span: Tensor = span) -> None:
                columns = slice(left, left + _COLUMNS)
                for start in range(0, span.shape[0], step):
                    part = _rounded(span[start : start + step, columns])
                    rows = slice(first + start, first + start + part.shape[0])
                    out[:, columns] += narrow[:, rows] @ part  # (k, b) @ (b, c) -> (k, c)
                turned[columns] = out[:, columns].mT

            each(add, range(0, self.shape[1], _COLUMNS))
        return turned


@cache
def pays(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 much faster than float32.

    >>> pays(torch.device("meta"))
    False
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # older versions have no public name for it
    if device.type != "cpu" or supported is None:
        return False
    return bool(supported() and torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call,unused-ignore]


def _rounded(part: Tensor) -> Tensor:
    if part.dtype == torch.bfloat16:
        return part
    return scratch(part, torch.bfloat16, 1)[0].copy_(part)
