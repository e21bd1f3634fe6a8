"""One module of an adapter, read or computed and ready to be written in any format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Kind
from lorasurgery.lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Module:
    """One module as it will be written.

    Args:
        path: Its name in the file, without the ending that says which part a tensor is.
        update: up (out, r), down (r, in·kernel), on the CPU in the dtype of the file.
        kernel: Of a convolution.
        bias: What is added to the layer's bias at strength 1 (out,); None when nothing is.
        magnitude: DoRA's, (out,) or as LyCORIS shapes it.
        kind: linear, conv or embedding.
    """

    path: str
    update: LowRank
    kernel: tuple[int, ...] = ()
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    kind: Kind = "linear"

    @property
    def alpha(self) -> float:
        """What the file says so that alpha/r is the update's scale: scale · r."""
        return self.update.scale * self.update.rank
