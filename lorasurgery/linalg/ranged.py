"""Numbers so large or small that sums of their squares leave their dtype: brought into range by a power of two.

That is exact, and the factors' scale takes the power back. Ordinary matrices stay as they are.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, InMemory, Streamed, over_rows
from lorasurgery.linalg.norms import squared_norm

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
