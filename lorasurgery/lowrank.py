"""The central nouns: a weight update held as two thin factors, and the one that only a full matrix can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scale · up @ down, with up (out, r) and down (r, in) (LoRA, arXiv:2106.09685, section 4.1).

    Examples:
        >>> import torch
        >>> delta = LowRank(up=torch.ones(3, 1), down=torch.ones(1, 2), scale=2.0)
        >>> delta.shape, delta.rank, delta.dense().sum().item()
        ((3, 2), 1, 12.0)

    Args:
        up: lora_B, shape (out, r), any floating dtype.
        down: lora_A, shape (r, in), the same dtype.
        scale: alpha/r, or alpha/√r with rsLoRA; any real number.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of `up`, which bounds the rank of ΔW."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of ΔW."""
        return int(self.up.shape[0]), int(self.down.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.up.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the update is made of."""
        return self.up, self.down

    @property
    def transposed(self) -> LowRank:
        """ΔWᵀ, for weights stored as (in, out): GPT-2's Conv1D and embeddings."""
        return LowRank(self.down.mT, self.up.mT, self.scale)

    def times(self, weight: float) -> LowRank:
        """weight · ΔW; the factors are shared, only the scale changes."""
        return LowRank(self.up, self.down, self.scale * weight)

    def with_scale(self, scale: float) -> LowRank:
        """The same factors under another scale."""
        return LowRank(self.up, self.down, scale)

    def to(self, *where: torch.device | torch.dtype | str) -> LowRank:
        """The same on another device or in another dtype."""
        return LowRank(_to(self.up, where), _to(self.down, where).contiguous(), self.scale)

    def part(self, rows: slice | list[int]) -> LowRank:
        """The update of some of the rows, in this order."""
        return LowRank(self.up[rows], self.down, self.scale)

    def placed(self, rows: slice, height: int) -> LowRank:
        """The same update of some rows of a taller matrix, zero in the others."""
        up = self.up.new_zeros(height, self.rank)
        up[rows] = self.up
        return LowRank(up, self.down, self.scale)

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of ΔW; the scale multiplies the finished product, not a rounded factor."""
        # (b, r) @ (r, in) -> (b, in)
        return (self.up[rows].to(dtype) @ self.down.to(dtype)).mul_(self.scale)

    def put_rows(self, total: Tensor, rows: slice) -> None:
        """total = rows of ΔW, in place."""
        from torch import mm

        mm(self.up[rows].to(total.dtype), self.down.to(total.dtype), out=total).mul_(self.scale)

    def add_rows(self, total: Tensor, rows: slice) -> None:
        """total += rows of ΔW, in place."""
        total.addmm_(self.up[rows].to(total.dtype), self.down.to(total.dtype), alpha=within(self.scale, total.dtype))

    def dense(self) -> Tensor:
        """ΔW itself in float32 (float64 for float64 factors), for tests and small matrices."""
        dtype = widened(self.up.dtype)
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))  # (out, r) @ (r, in) -> (out, in)


@dataclass(frozen=True, slots=True)
class Dense:
    """ΔW = scale · matrix: a full difference, or a product whose thin factors would be no smaller (LoHa, LoKr).

    >>> import torch
    >>> Dense(torch.ones(2, 3), 0.5).part(slice(0, 1)).dense()
    tensor([[0.5000, 0.5000, 0.5000]])

    Args:
        matrix: (out, in), any floating dtype.
    """

    matrix: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """What bounds the rank of ΔW: its shorter side."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of ΔW."""
        return int(self.matrix.shape[0]), int(self.matrix.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.matrix.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the update is made of."""
        return (self.matrix,)

    @property
    def transposed(self) -> Dense:
        """ΔWᵀ."""
        return Dense(self.matrix.mT, self.scale)

    def times(self, weight: float) -> Dense:
        """weight · ΔW."""
        return Dense(self.matrix, self.scale * weight)

    def to(self, *where: torch.device | torch.dtype | str) -> Dense:
        """The same on another device or in another dtype."""
        return Dense(_to(self.matrix, where), self.scale)

    def part(self, rows: slice | list[int]) -> Dense:
        """The update of some of the rows, in this order."""
        return Dense(self.matrix[rows], self.scale)

    def placed(self, rows: slice, height: int) -> Dense:
        """The same update of some rows of a taller matrix, zero in the others."""
        matrix = self.matrix.new_zeros(height, self.matrix.shape[1])
        matrix[rows] = self.matrix
        return Dense(matrix, self.scale)

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of ΔW."""
        return self.matrix[rows].to(dtype) * self.scale

    def put_rows(self, total: Tensor, rows: slice) -> None:
        """total = rows of ΔW, in place."""
        total.copy_(self.matrix[rows]).mul_(self.scale)

    def add_rows(self, total: Tensor, rows: slice) -> None:
        """total += rows of ΔW, in place."""
        total.add_(self.matrix[rows].to(total.dtype), alpha=within(self.scale, total.dtype))

    def dense(self) -> Tensor:
        """ΔW itself in float32, or float64 for a float64 matrix."""
        return self.scale * self.matrix.to(widened(self.matrix.dtype))


Update = LowRank | Dense
"""What can be added to a weight, whole or by rows."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float64 for float64, else float32; torch itself promotes no 8-bit floats.

    >>> import torch
    >>> widened(torch.float8_e4m3fn), widened(torch.float64)
    (torch.float32, torch.float64)
    """
    from torch import float32, float64

    return float64 if dtype == float64 else float32


def within(scale: float, dtype: torch.dtype) -> float:
    """A scale as a dtype takes it: torch refuses numbers beyond it, where arithmetic makes infinity of them.

    >>> import torch
    >>> within(-1e300, torch.float32), within(2.0, torch.float32)
    (-inf, 2.0)
    """
    from torch import finfo

    return scale if abs(scale) <= finfo(dtype).max else math.copysign(math.inf, scale)


def common(one: torch.dtype, two: torch.dtype) -> torch.dtype:
    """A dtype that holds the values of both; torch itself promotes no 8-bit floats.

    >>> import torch
    >>> common(torch.float8_e4m3fn, torch.float8_e4m3fn), common(torch.float8_e5m2, torch.bfloat16)
    (torch.float8_e4m3fn, torch.float32)
    """
    from torch import float16, promote_types

    if one == two:
        return one
    first, second = (d if d.itemsize > 1 else float16 for d in (one, two))
    return promote_types(first, second)


def _to(tensor: Tensor, where: tuple[torch.device | torch.dtype | str, ...]) -> Tensor:
    for place in where:
        tensor = tensor.to(place)
    return tensor
