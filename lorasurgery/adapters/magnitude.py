"""DoRA's magnitudes, which any update may come with, and what each family means by their strength.

Both set the norm of V = W + ΔW; they agree at strength 1 and nowhere else (docs/formats.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import Update

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Rows = slice | list[int]


@dataclass(frozen=True)
class Magnitude(ABC):
    """The tensor of norms that makes DoRA of an update (arXiv:2402.09353).

    Args:
        name: Of the tensor in the adapter file.
        shape: As it is stored.
        by_input: Whether it holds one norm for each input feature, instead of one for each output feature.
    """

    name: str
    shape: tuple[int, ...]
    by_input: bool = False

    def prefixed(self, prefix: str) -> Self:
        """The same magnitude in a checkpoint where the file's names have a prefix."""
        return replace(self, name=prefix + self.name)

    @abstractmethod
    def load(self, weights: Checkpoint, rows: Rows | None = None) -> Tensor:
        """Read the norms, of some rows of the update or, with None, of all."""

    @abstractmethod
    def is_by_row(self, *, transposed: bool) -> bool:
        """Whether a row of the merged weight depends on that row of the base alone."""

    @abstractmethod
    def decompose(
        self, weight: Tensor, update: Update, norms: Tensor, strength: float, *, kernel: tuple[int, ...],
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Compute the merged weight.

        Args:
            weight: W as a matrix (out, in·kernel), or (in, out) where transposed; float32 or float64.
            update: ΔW, of the same shape.
            norms: What load() gave for these rows.
            strength: The adapter's weight; 1 is what was trained.
            kernel: The shape of the weight in its checkpoint after the first axis.
            transposed: Whether output features are columns (Conv1D, embeddings).
        """


class PeftMagnitude(Magnitude):
    """PEFT's lora_magnitude_vector, (out,) or (1, out, 1 …): a strength stands between W and the decomposed weight."""

    def load(self, weights: Checkpoint, rows: Rows | None = None) -> Tensor:
        """Read the norms as a vector."""
        norms = weights.read(self.name).flatten()
        return norms if rows is None else norms[rows]

    def is_by_row(self, *, transposed: bool) -> bool:
        """Whether output features are rows."""
        return not transposed

    def decompose(
        self, weight: Tensor, update: Update, norms: Tensor, strength: float, *, kernel: tuple[int, ...],
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Compute W + strength·(m·V/‖V‖ − W)."""
        from lorasurgery.linalg.dora import decomposed

        return decomposed(weight, update, norms, strength, by_column=transposed)


class LycorisMagnitude(Magnitude):
    """LyCORIS's dora_scale, (out, 1 …) or (1, in, 1 …): a strength scales what the norm changes, not the update."""

    def load(self, weights: Checkpoint, rows: Rows | None = None) -> Tensor:
        """Read the norms in the shape that tells their axis."""
        norms = weights.read(self.name)
        return norms if rows is None or self.by_input else norms[rows]

    def is_by_row(self, *, transposed: bool) -> bool:
        """Never claimed: the norm may run along any axis."""
        return False

    def decompose(
        self, weight: Tensor, update: Update, norms: Tensor, strength: float, *, kernel: tuple[int, ...],
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Compute V·(strength·(m/‖V‖ − 1) + 1)."""
        from lorasurgery.linalg.dora import rescaled

        shaped = weight.reshape(weight.shape[0], *kernel)
        return rescaled(shaped, update, norms, strength).reshape(weight.shape)
