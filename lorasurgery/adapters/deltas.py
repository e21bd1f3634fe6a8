"""What every update in an adapter file answers, and LoRA's own factors, wherever in a model they belong.

Products of other kinds (LoCon's core, LoHa, LoKr, whole differences) are in single_file/products.py; DoRA's norms,
which any of them may come with, in magnitude.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lorasurgery.adapters.magnitude import Magnitude
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import LowRank, Update

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta(ABC):
    """One module's update as it lies in the file: which tensors, and what rank and alpha mean for it.

    Attributes:
        form: The kind of product in reports, e.g. `hadamard`.
        title: The same in sentences, e.g. `LoHa`.
        special: What it is where it is more than lora_A and lora_B of a module of its own, for a message.
        merge_only: Why it can be merged but not rewritten, for a message; empty where it can.
        stores_factors: Whether the file holds lora_A and lora_B themselves, so that nothing is computed on the way.

    Args:
        path: The module's path in memory, e.g. `model.layers.0.self_attn.q_proj`.
        shape: (out, in) of the update as a matrix; a convolution's inputs and kernel are one axis.
        rank: As the file says it.
        alpha: As the file says it.
        scale: alpha/r, or alpha/√r with rsLoRA; what the product is multiplied by.
        kernel: Of a convolution, e.g. (3, 3); empty for others.
        bias: Name of lora_B.bias (out,), which the scale multiplies too; None when there is none.
        magnitude: DoRA's norms; None for an update that is simply added.
        parameter: Its name in target_parameters, e.g. `…mlp.experts.down_proj` or `…up_proj.weight`; empty for modules.
    """

    form: ClassVar[str]
    title: ClassVar[str]
    special: ClassVar[str] = ""
    merge_only: ClassVar[str] = ""
    stores_factors: ClassVar[bool] = False

    path: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    kernel: tuple[int, ...] = ()
    bias: str | None = None
    magnitude: Magnitude | None = None
    parameter: str = ""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names in the file of the tensors that make up the update."""

    @abstractmethod
    def load(self, weights: Checkpoint) -> LowRank:
        """Read the exact factors, on the CPU."""

    def load_update(self, weights: Checkpoint) -> Update:
        """Read the update in the form that is cheapest to add to a weight."""
        return self.load(weights)

    def load_expert(self, weights: Checkpoint, expert: int) -> LowRank:
        """Read one expert's factors, where several lie side by side."""
        raise IndexError(f"{self.path} has no expert {expert}")

    def load_bias(self, weights: Checkpoint) -> LowRank:
        """Read lora_B.bias (out,) as the rank-1 update of an (out, 1) matrix."""
        import torch

        assert self.bias is not None
        bias = weights.read(self.bias)
        return LowRank(bias[:, None], torch.ones(1, 1, dtype=bias.dtype), self.scale)

    def prefixed(self, prefix: str) -> Self:
        """The same update, where the module's path and the file's names have a prefix."""
        return replace(
            self, path=prefix + self.path, bias=self.bias and prefix + self.bias,
            magnitude=self.magnitude and self.magnitude.prefixed(prefix),
            parameter=self.parameter and prefix + self.parameter,
        )  # fmt: skip

    @property
    def kind(self) -> Kind:
        """The kind of layer it belongs to."""
        return "conv" if self.kernel else "linear"

    @property
    def experts(self) -> int:
        """How many experts' factors lie side by side (target_parameters); 0 for a module of its own."""
        return 0

    @property
    def rows(self) -> int:
        """Rows of lora_A: the rank, or rank times experts."""
        return self.rank * max(1, self.experts)

    @property
    def directions(self) -> int:
        """How many directions the exact factors have."""
        return self.rank

    @property
    def is_thin(self) -> bool:
        """Whether the exact factors are much smaller than the matrix, so that it need not be formed."""
        return True

    @property
    def is_across(self) -> bool:
        """Whether the weight is always stored (in, out), the transpose of the update."""
        return False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight in memory that the update belongs to, as PEFT sees it."""
        out, into = self.shape
        return (out, into // math.prod(self.kernel), *self.kernel)

    @property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the weight may have in a checkpoint."""
        return (self.weight_shape,) if self.kernel else (self.shape, self.shape[::-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(Delta):
    """up @ down, of a linear layer or a convolution (arXiv:2106.09685).

    Args:
        down: Name of lora_A in the adapter file, shape (r, in) or (r, in, *kernel).
        up: Name of lora_B in the adapter file, shape (out, r) or (out, r, 1 …).
    """

    form = "lora"
    title = "LoRA"
    stores_factors = True

    down: str
    up: str

    @property
    def names(self) -> tuple[str, ...]:
        """lora_B and lora_A."""
        return self.up, self.down

    def load(self, weights: Checkpoint) -> LowRank:
        """Read the factors as they are stored."""
        up, down = weights.read(self.up), weights.read(self.down)
        return LowRank(up.flatten(1), down.flatten(1), self.scale)  # a convolution's factors have kernels

    def prefixed(self, prefix: str) -> Self:
        """The same update, where the module's path and the file's names have a prefix."""
        return replace(
            super(Lora, self).prefixed(prefix), down=prefix + self.down, up=prefix + self.up
        )  # slots make the class again


class Embedding(Lora):
    """lora_embedding_A and lora_embedding_B, whose product is (dim, vocab), the transpose of the weight."""

    @property
    def kind(self) -> Kind:
        """An embedding."""
        return "embedding"

    @property
    def is_across(self) -> bool:
        """An embedding's rows are its inputs."""
        return True

    @property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the weight may have in a checkpoint."""
        return (self.shape[::-1],)


class AttentionOutput(Lora):
    """nn.MultiheadAttention's out_proj, which PEFT keeps and runs inside its module.

    PEFT's own MultiheadAttention adds it, then merges the layer once more: so it was trained, so it runs. The scale
    counts both.
    """

    special = "nn.MultiheadAttention's out_proj"
    merge_only = "lies inside an nn.MultiheadAttention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts(Lora):
    """Factors of a parameter that holds several experts (PEFT's target_parameters), side by side.

    lora_A is expert-major, lora_B rank-major (peft.tuners.lora.layer.ParamWrapper).

    Args:
        count: How many experts.
    """

    special = "an update of fused experts (target_parameters)"
    merge_only = "holds fused experts"

    count: int

    @property
    def kind(self) -> Kind:
        """Fused experts."""
        return "experts"

    @property
    def experts(self) -> int:
        """How many experts' factors lie side by side."""
        return self.count

    def load_expert(self, weights: Checkpoint, expert: int) -> LowRank:
        """Read one expert's factors."""
        whole, rank = self.load(weights), self.rank
        down = whole.down[expert * rank : (expert + 1) * rank]
        return LowRank(whole.up[:, expert :: self.count].contiguous(), down, self.scale)
