"""Frobenius norms of large matrices, and the residual of a factored update, measured rather than inferred."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lorasurgery.linalg.blocks import Blocks, InMemory, blocked, over_rows
from lorasurgery.lowrank import LowRank

_BLOCK_BYTES = 2 << 20  # a block and its product stay in a core's cache
_CUDA_BLOCK_BYTES = 64 << 20


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that stay in cache on a CPU, or fill a GPU.

    >>> [s.stop - s.start for s in row_blocks(torch.empty(3, 4))]
    [3]
    """
    rows = block_height(matrix.shape[1], matrix.device)
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, min(start + rows, matrix.shape[0]))


def block_height(columns: int, device: torch.device) -> int:
    """Rows of such a block, whatever the matrix's height.

    >>> block_height(4096, torch.device("cpu"))
    128
    """
    limit = _BLOCK_BYTES if device.type == "cpu" else _CUDA_BLOCK_BYTES
    return max(1, limit // max(1, 4 * columns))


def squared_norm(matrix: Tensor | Blocks) -> float:
    """‖M‖_F²: each row in the matrix's precision, the rows summed in float64.

    >>> squared_norm(torch.tensor([[3.0, 4.0]]))
    25.0
    """
    found = blocked(matrix)
    if isinstance(found, InMemory) and found.total is not None:
        return found.total
    norms = torch.empty(found.shape[0], dtype=found.dtype, device=found.device)
    over_rows(found, lambda part, rows: torch.linalg.vector_norm(part, dim=-1, out=norms[rows]))
    return summed(norms)


def residual_norm(delta: Tensor | Blocks, update: LowRank) -> float:
    """‖ΔW − scale·up@down‖_F from the factors as they are stored, row block by row block.

    This is the stated error of what is really written: it holds the truncation and the rounding of the factors.

    >>> residual_norm(torch.eye(2), LowRank(torch.eye(2)[:, :1], torch.eye(2)[:1]))
    1.0

    Args:
        delta: (m, n), float32 or float64.
        update: up (m, r), down (r, n), any floating dtype, on the same device.
    """
    matrix = blocked(delta)
    up, down = update.up.to(matrix.dtype), update.down.to(matrix.dtype)
    norms = torch.empty(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)

    def measure(part: Tensor, rows: slice) -> None:
        for few in row_blocks(part):  # the product of a few rows is made, measured and forgotten within the cache
            here = slice(rows.start + few.start, rows.start + few.stop)
            rest = torch.addmm(part[few], up[here], down, alpha=-update.scale)  # (b, r) @ (r, n) -> (b, n)
            torch.linalg.vector_norm(rest, dim=-1, out=norms[here])

    over_rows(matrix, measure)
    return math.sqrt(summed(norms))


def summed(norms: Tensor) -> float:
    """‖M‖_F² from the norms of its rows.

    >>> summed(torch.tensor([3.0, 4.0]))
    25.0
    """
    return float(norms.cpu().to(torch.float64).square().sum())
