"""The central noun: a weight update held as two thin factors, never as the dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · up @ down, with up (out, r) and down (r, in) (LoRA, arXiv:2106.09685, section 4.1).

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
    def transposed(self) -> LowRank:
        """ΔWᵀ, for weights stored as (in, out): GPT-2's Conv1D and embeddings."""
        return LowRank(self.down.mT, self.up.mT, self.scale)

    def times(self, weight: float) -> LowRank:
        """weight · ΔW; the factors are shared, only the scale changes."""
        return LowRank(self.up, self.down, self.scale * weight)

    def dense(self) -> Tensor:
        """ΔW itself in float32 (float64 for float64 factors), for tests and small matrices."""
        from torch import float32, promote_types

        dtype = promote_types(self.up.dtype, float32)
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))  # (out, r) @ (r, in) -> (out, in)
