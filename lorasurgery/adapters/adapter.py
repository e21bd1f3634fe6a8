"""What an adapter is, whatever file it came from: low-rank deltas by module path, plus replaced tensors.

Everything here is known from headers and the config; factors are read one module at a time. No SVD, no base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding"]


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


@dataclass
class Adapter:
    """An adapter folder or file, opened: `deltas` by module path, `replaced` full tensors by tensor name.

    Args:
        path: The reference as the user gave it.
        folder: Where adapter_config.json and tokenizer files lie.
        weights: The adapter's own tensors, lazily read.
        deltas: module path -> Delta.
        replaced: base tensor name in memory -> tensor name in the adapter file; full copies, not deltas.
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
    tied: bool = False
    fan_in_fan_out: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def load(self, delta: Delta) -> LowRank:
        """Read one module's factors from disk, on the CPU in their stored dtype."""
        return LowRank(self.weights.read(delta.up), self.weights.read(delta.down), delta.scale)

    def load_bias(self, delta: Delta) -> LowRank:
        """lora_B.bias (out,) as the rank-1 update of an (out, 1) matrix."""
        import torch

        assert delta.bias is not None
        bias = self.weights.read(delta.bias)
        return LowRank(bias[:, None], torch.ones(1, 1, dtype=bias.dtype), delta.scale)

    def load_replaced(self, name: str) -> Tensor:
        """Read the full tensor that takes the place of the base's `name`."""
        return self.weights.read(self.replaced[name])
