"""Frobenius norms and residuals, measured rather than inferred, for numbers whose squares overflow too."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, InMemory, Streamed, blocked, over_rows
from lorasurgery.lowrank import LowRank, Update

_BLOCK_BYTES = 2 << 20  # a block and its product stay in a core's cache
_CUDA_BLOCK_BYTES = 64 << 20
_FINE = 1e-4  # of ‖ΔW‖: a residual below it holds the rounding of float32 products, which is about 1e-6
_SQUARED = 1e-15, 1e15  # norms whose squares, and those of their parts that count, float32 can hold
_PLAIN = 2.0**30  # scales beyond it (or below its inverse) are left to float64, for products without them may overflow


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
    if found.total is None:
        norms = torch.empty(found.shape[0], dtype=found.dtype, device=found.device)
        over_rows(found, lambda part, rows: torch.linalg.vector_norm(part, dim=-1, out=norms[rows]))
        found.total = summed(norms)
    return found.total


def norm_of(values: Tensor) -> float:
    """‖x‖ of a few numbers, however large or small they are: where squares leave the dtype, in float64.

    >>> norm_of(torch.tensor([3 * 2.0**90, 4 * 2.0**90])) / 2.0**90, norm_of(torch.tensor([0.0]))
    (5.0, 0.0)
    """
    found = float(torch.linalg.vector_norm(values))
    if _SQUARED[0] < found < _SQUARED[1] or not values.numel():
        return found
    largest = float(values.abs().max())
    if not largest or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(values.cpu().to(torch.float64) / largest))


def residual_norm(delta: Tensor | Blocks, update: LowRank) -> float:
    """‖ΔW − scale·up@down‖_F from the factors as they are stored, row block by row block.

    This is the stated error of what is really written: it holds the truncation and the rounding of the factors. What is
    as small as the rounding of float32 products is measured again in float64.

    >>> residual_norm(torch.eye(2), LowRank(torch.eye(2)[:, :1], torch.eye(2)[:1]))
    1.0

    Args:
        delta: (m, n), float32 or float64.
        update: up (m, r), down (r, n), any floating dtype, on the same device.
    """
    matrix = blocked(delta)
    if 1 / _PLAIN < abs(update.scale) < _PLAIN:
        found = _residual(matrix, update, matrix.dtype)
        if matrix.dtype == torch.float64 or found > _FINE * math.sqrt(squared_norm(matrix)):
            return found
    return _residual(matrix, update, torch.float64)


def _residual(matrix: Blocks, update: LowRank, dtype: torch.dtype) -> float:
    """The same with products and differences in `dtype`."""
    where = _place(matrix.device, dtype)
    up, down = update.up.to(where, dtype), update.down.to(where, dtype)
    norms = torch.empty(matrix.shape[0], dtype=dtype, device=where)

    def measure(part: Tensor, rows: slice) -> None:
        for few in row_blocks(part):  # the product of a few rows is made, measured and forgotten within the cache
            here = slice(rows.start + few.start, rows.start + few.stop)
            exact = part[few].to(where, dtype)
            rest = torch.addmm(exact, up[here], down, alpha=-update.scale)  # (b, r) @ (r, n) -> (b, n)
            torch.linalg.vector_norm(rest, dim=-1, out=norms[here])

    over_rows(matrix, measure)
    return math.sqrt(summed(norms))


def _place(device: torch.device, dtype: torch.dtype) -> torch.device:
    """Where numbers of this dtype can be worked with: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" and dtype == torch.float64 else device


def row_squares(delta: Update, update: LowRank) -> tuple[Tensor, Tensor]:
    """Of every row of an update, what factors leave of it and what it is, squared: each (m,) in float64 on the CPU.

    >>> from lorasurgery.lowrank import Dense
    >>> [x.tolist() for x in row_squares(Dense(torch.eye(2)), LowRank(torch.eye(2)[:, :1], torch.eye(2)[:1]))]
    [[0.0, 1.0], [1.0, 1.0]]
    """
    wide = torch.float64
    where = _place(delta.device, wide)
    delta, update = delta.to(where), update.to(where)
    lost, total = torch.empty(delta.shape[0], dtype=wide), torch.empty(delta.shape[0], dtype=wide)
    step = block_height(delta.shape[1], where)
    for start in range(0, delta.shape[0], step):
        rows = slice(start, start + step)
        exact = delta.rows(rows, wide)
        total[rows] = exact.square().sum(1).cpu()
        lost[rows] = (exact - update.rows(rows, wide)).square().sum(1).cpu()
    return lost, total


def losses(delta: Tensor | Blocks, update: LowRank) -> list[float]:
    """‖ΔW − scale·up[:, :r]@down[:r]‖_F² for every r from 0 to the rank: what a cut to r directions leaves.

    One pass over ΔW, all in float64, so that differences of large sums still tell errors of 1e-7 of ‖ΔW‖.

    >>> losses(torch.diag(torch.tensor([4.0, 3.0])), LowRank(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0]))))
    [25.0, 9.0, 0.0]
    """
    matrix, wide = blocked(delta), torch.float64
    where = _place(matrix.device, wide)
    up, down = update.up.to(where, wide), update.down.to(where, wide)
    parts: dict[int, tuple[Tensor, Tensor]] = {}

    def measure(part: Tensor, rows: slice) -> None:
        total, inner = torch.zeros((), dtype=wide, device=where), torch.zeros(len(down), dtype=wide, device=where)
        for few in row_blocks(part):
            exact, own = part[few].to(where, wide), up[rows.start + few.start : rows.start + few.stop]
            total += torch.linalg.vector_norm(exact).square()
            inner += (own * (exact @ down.mT)).sum(0)  # ⟨ΔW, upᵢ·downᵢ⟩
        parts[rows.start] = total, inner

    over_rows(matrix, measure)
    zero = torch.zeros((), dtype=wide, device=where), torch.zeros(len(down), dtype=wide, device=where)
    total, inner = (sum((parts[start][i] for start in sorted(parts)), zero[i]) for i in (0, 1))
    own = update.scale**2 * corners((up.mT @ up) * (down @ down.mT))
    left = total - 2 * update.scale * inner.cumsum(0) + own
    found: list[float] = torch.cat([total[None], left]).clamp(min=0).tolist()
    return found


def corners(square: Tensor) -> Tensor:
    """The sums of the entries of a symmetric matrix's leading corners: of the first row and column, the first two, …

    >>> corners(torch.tensor([[1.0, 2.0], [2.0, 5.0]])).tolist()
    [1.0, 10.0]
    """
    return (2 * square.tril().sum(1) - square.diagonal()).cumsum(0)


def summed(norms: Tensor) -> float:
    """‖M‖_F² from the norms of its rows.

    >>> summed(torch.tensor([3.0, 4.0]))
    25.0
    """
    return float(norms.cpu().to(torch.float64).square().sum())


# Norms between which neither squares of float32 (float64) numbers nor products with factors overflow or vanish.
_RANGE = {torch.float32: (2.0**-40, 2.0**50), torch.float64: (2.0**-400, 2.0**400)}
_BEYOND = 2.0**500  # from here on (or below the inverse) squares leave float64 itself


def ranged(matrix: Blocks) -> tuple[Blocks, int]:
    """M' and k with M = 2^k·M': M itself and 0 for ordinary numbers, else M' of a norm near 1.

    A matrix in memory is changed in place. One that holds NaN or infinity, or zeros alone, comes back as it is.

    >>> found, power = ranged(InMemory(torch.full((2, 2), 2.0**90)))
    >>> found.matrix.tolist(), power
    ([[0.5, 0.5], [0.5, 0.5]], 91)

    Raises:
        SurgeryError: float64 numbers that are beyond all measure.
    """
    if 0 in matrix.shape:
        return matrix, 0
    low, high = _RANGE[matrix.dtype]
    total = squared_norm(matrix)
    if low**2 < total < high**2:
        return matrix, 0
    largest = _largest(matrix)
    if largest == 0 or not math.isfinite(largest):
        return matrix, 0
    if not 1 / _BEYOND < largest < _BEYOND:
        raise SurgeryError(f"the difference has numbers up to {largest:.1e}, which are beyond what can be squared")
    power = math.frexp(largest)[1]
    return (matrix, 0) if abs(power) <= 1 else (_scaled(matrix, -power), power)


def times_power(x: Tensor, power: int) -> Tensor:
    """x·2^power in place: exact, but for what leaves the dtype's range.

    >>> times_power(torch.tensor([2.0**-140]), 141).tolist()
    [2.0]
    """
    half = power // 2  # 2^power itself may be more than a number of the dtype can hold
    return x.mul_(2.0**half).mul_(2.0 ** (power - half))


def _largest(matrix: Blocks) -> float:
    """The largest magnitude, or NaN."""
    found: list[Tensor] = []
    over_rows(matrix, lambda part, rows: found.append(part.abs().amax()))
    return float(torch.stack(found).amax()) if found else 0.0


def _scaled(matrix: Blocks, power: int) -> Blocks:
    if isinstance(matrix, InMemory):
        rounded = matrix.rounded if matrix.rounded is None else times_power(matrix.rounded, power)
        return InMemory(times_power(matrix.matrix, power), rounded=rounded)
    assert isinstance(matrix, Streamed)
    scaled, make = copy.copy(matrix), matrix.make
    scaled.total = None
    scaled.make = lambda rows: times_power(make(rows), power)
    return scaled
