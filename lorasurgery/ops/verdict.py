"""One tensor in two checkpoints, and what its blocks come to: equal, apart by rounding alone, or changed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.linalg.blocks import InMemory, Streamed
from lorasurgery.linalg.half_step import same_but_rounded


@dataclass(frozen=True)
class Piece:
    """A tensor in both checkpoints, or one expert's slice of a three-dimensional one.

    Args:
        old, new: Floating tensors of the same shape.
    """

    old: TensorInfo
    new: TensorInfo
    expert: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns), all but the first axis taken as one."""
        shape = self.old.shape if self.expert is None else self.old.shape[1:]
        return (shape[0], prod(shape[1:])) if shape else (1, 1)


class Found(NamedTuple):
    """What became of some pieces: ΔW, None where none of them changed, and which differ by rounding alone (ΔW is 0)."""

    delta: InMemory | Streamed | None
    rounding: tuple[bool, ...]


class Verdict:
    """What the blocks of a piece come to: equal, apart by rounding alone, or changed. Any thread may add to it."""

    def __init__(self, piece: Piece, *, keep_rounding: bool) -> None:
        self._dtypes = torch_dtype(piece.old.dtype), torch_dtype(piece.new.dtype)
        self._mixed, self._keep = piece.old.dtype != piece.new.dtype, keep_rounding
        self.changed = self._apart = False

    @property
    def rounding(self) -> bool:
        """Whether values differ, and none by more than rounding."""
        return self._apart and not self.changed

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take a block in which bytes differ; after the first that changed, none is looked at any more."""
        if self.changed or (self._mixed and torch.equal(before, after)):
            return
        if self._mixed and not self._keep and same_but_rounded(before, after, self._dtypes):
            self._apart = True
        else:
            self.changed = True
