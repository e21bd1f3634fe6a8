"""What an adapter is, whatever file it came from: low-rank deltas by module path, plus replaced tensors.

Everything here is known from headers and the config; factors are read one module at a time. No SVD, no base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True)
class Delta:
    """One module's update as it lies in the file: which tensors, and what rank and alpha mean for it.

    Args:
        path: The module's path in memory, e.g. `model.layers.0.self_attn.q_proj`.
        kind: `embedding` factors give (dim, vocab), the transpose of the weight (FORMATS: PEFT).
        down: Name of lora_A in the adapter file, shape (r, in).
        up: Name of lora_B in the adapter file, shape (out, r).
        shape: (out, in) of up @ down.
        bias: Name of lora_B.bias (out,), which the scale multiplies too; None when there is none.
        kernel: Of a convolution, e.g. (3, 3): the weight is (out, in, *kernel), the shape above has it flattened.
        magnitude: Name of DoRA's magnitude vector (out,), or (1, out, 1 …); None for plain LoRA.
        experts: How many experts' factors lie side by side (target_parameters); 0 for a module of its own.
        wrapped: nn.MultiheadAttention's out_proj, which PEFT keeps and runs inside its module.
        parameter: For experts, the path of the module's parameter that they adapt, e.g. `…mlp.experts.down_proj`.
    """

    path: str
    kind: Kind
    down: str
    up: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    bias: str | None = None
    kernel: tuple[int, ...] = ()
    magnitude: str | None = None
    experts: int = 0
    parameter: str = ""
    wrapped: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight in memory that the update belongs to, as PEFT sees it."""
        out, into = self.shape
        return (out, into // math.prod(self.kernel), *self.kernel)

    @property
    def rows(self) -> int:
        """Rows of lora_A: the rank, or rank times experts."""
        return self.rank * max(1, self.experts)


@dataclass
class Adapter:
    """An adapter folder or file, opened: `deltas` by module path, `replaced` full tensors by tensor name.

    Args:
        path: The reference as the user gave it.
        folder: Where adapter_config.json and tokenizer files lie.
        weights: The adapter's own tensors, lazily read.
        deltas: module path -> Delta.
        replaced: base tensor name in memory -> tensor name in the adapter file; full copies, not deltas.
        tokens: tensor name in memory -> (tensor in the file, row numbers): single rows that are replaced.
        added: those of `replaced` that may be new to the base (modules_to_save, such as a fresh score head).
        tied: the adapter promises the same update to all tied tensors (PEFT's ensure_weight_tying).
        fan_in_fan_out: a hint that linear weights are stored (in, out); the base decides.
    """

    path: str
    folder: Path
    weights: Checkpoint
    deltas: dict[str, Delta]
    replaced: dict[str, str]
    added: frozenset[str] = frozenset()
    tokens: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    tied: bool = False
    fan_in_fan_out: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def load(self, delta: Delta) -> LowRank:
        """Read one module's factors from disk, on the CPU in their stored dtype."""
        up, down = self.weights.read(delta.up), self.weights.read(delta.down)
        return LowRank(up.flatten(1), down.flatten(1), delta.scale)  # a convolution's factors have kernels

    def load_expert(self, delta: Delta, expert: int) -> LowRank:
        """One expert's factors: lora_A is expert-major, lora_B rank-major (peft.tuners.lora.layer.ParamWrapper)."""
        whole, rank = self.load(delta), delta.rank
        down = whole.down[expert * rank : (expert + 1) * rank]
        return LowRank(whole.up[:, expert :: delta.experts].contiguous(), down, delta.scale)

    def load_bias(self, delta: Delta) -> LowRank:
        """lora_B.bias (out,) as the rank-1 update of an (out, 1) matrix."""
        import torch

        assert delta.bias is not None
        bias = self.weights.read(delta.bias)
        return LowRank(bias[:, None], torch.ones(1, 1, dtype=bias.dtype), delta.scale)

    def load_replaced(self, name: str) -> Tensor:
        """Read the full tensor that takes the place of the base's `name`."""
        return self.weights.read(self.replaced[name])
