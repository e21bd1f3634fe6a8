"""What an adapter is, whatever file it came from: low-rank deltas by module path, plus replaced tensors.

Everything here is known from headers and the config; factors are read one module at a time. No SVD, no base.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.adapters.deltas import Delta as Delta  # a public name of this module
from lorasurgery.adapters.deltas import Kind as Kind
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import Dense, LowRank, Update

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["peft", "kohya", "diffusers", "comfyui"]


@dataclass
class Adapter:
    """An adapter folder or file, opened: `deltas` by module path, `replaced` full tensors by tensor name.

    Args:
        format: Whose file it is; a path of kohya's keeps its underscores until a base tells where the dots were.
        path: The reference as the user gave it.
        folder: Where adapter_config.json and tokenizer files lie.
        weights: The adapter's own tensors, lazily read.
        deltas: module path -> Delta.
        replaced: base tensor name in memory -> tensor name in the adapter file; full copies, not deltas.
        diffs: tensor name in memory -> tensor in the file: whole vectors that are added (norms, biases).
        tokens: tensor name in memory -> (tensor in the file, row numbers): single rows that are replaced.
        added: those of `replaced` that may be new to the base (modules_to_save, such as a fresh score head).
        tied: the adapter promises the same update to all tied tensors (PEFT's ensure_weight_tying).
        fan_in_fan_out: a hint that linear weights are stored (in, out); the base decides.
        members: Of a folder of PEFT adapters, one for each part of an image model: part -> its adapter; the paths
            here begin with the part's name.
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
    diffs: dict[str, str] = field(default_factory=dict)
    format: Format = "peft"
    members: dict[str, Adapter] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The header's metadata (of the first file, where there are several)."""
        return next(iter(self.weights.files.values())).metadata

    def nbytes_of(self, path: str) -> int:
        """Bytes of one module's factors on disk."""
        return sum(self.weights.tensors[name].nbytes for name in self.deltas[path].names)

    def without(self, paths: Collection[str]) -> Adapter:
        """The same adapter, as if its file did not hold these modules."""

        def left(named: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in named.items() if name.rpartition(".")[0] not in paths}

        return replace(
            self, deltas={p: d for p, d in self.deltas.items() if p not in paths}, replaced=left(self.replaced),
            diffs=left(self.diffs), tokens=left(self.tokens),
        )  # fmt: skip

    def load(self, delta: Delta) -> LowRank:
        """Read one module's exact factors, on the CPU; as they are stored for LoRA, in float32 for other products.

        Those of a whole difference are itself and the identity.
        """
        return delta.load(self.weights)

    def load_update(self, delta: Delta) -> Update:
        """Read one module's update in the form that is cheapest to add to a weight."""
        return delta.load_update(self.weights)

    def load_expert(self, delta: Delta, expert: int) -> LowRank:
        """Read one expert's factors."""
        return delta.load_expert(self.weights, expert)

    def load_bias(self, delta: Delta) -> LowRank:
        """Read lora_B.bias (out,) as the rank-1 update of an (out, 1) matrix."""
        return delta.load_bias(self.weights)

    def load_diff(self, name: str) -> Dense:
        """Read a vector that is added to the base's `name`, as a matrix (n, 1)."""
        return Dense(self.weights.read(self.diffs[name]).reshape(-1, 1))

    def load_replaced(self, name: str) -> Tensor:
        """Read the full tensor that takes the place of the base's `name`."""
        return self.weights.read(self.replaced[name])


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
