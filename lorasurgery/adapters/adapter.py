"""What an adapter is, whatever file it came from: low-rank deltas by module path, plus replaced tensors.

Everything here is known from headers and the config; factors are read one module at a time. No SVD, no base.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.lowrank import Dense, LowRank, Update, widened

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "conv", "experts"]
Form = Literal["lora", "tucker", "hadamard", "kronecker", "full"]
Format = Literal["peft", "kohya", "diffusers", "comfyui"]


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
        form: What product the tensors are: B·A, with a Tucker core (LoCon), LoHa, LoKr, or the whole difference.
        parts: For forms other than B·A, the tensors' names by part, e.g. `hada_w1_a`.
        width: Directions of the exact factors, where they are more than the rank says (LoHa, LoKr); 0 is the rank.
        lycoris: Whether the magnitude is LyCORIS's dora_scale, whose strength means something else than PEFT's.
        parameter: Its name in target_parameters, e.g. `…mlp.experts.down_proj` or `…up_proj.weight`; empty for modules.
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
    form: Form = "lora"
    parts: dict[str, str] = field(default_factory=dict, hash=False)
    lycoris: bool = False
    width: int = 0

    @property
    def directions(self) -> int:
        """How many directions the update's exact factors have."""
        return self.width or self.rank

    @property
    def is_thin(self) -> bool:
        """Whether the exact factors are much smaller than the matrix, so that it need not be formed."""
        return self.form in ("lora", "tucker") or (self.form != "full" and 2 * self.directions <= min(self.shape))

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the file of the tensors that make up the update."""
        return (self.up, self.down) if self.form == "lora" else tuple(self.parts.values())

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
        """Read one module's exact factors, on the CPU; as they are stored for LoRA, in float32 for other forms.

        Those of a whole difference are itself and the identity.
        """
        if delta.form == "lora":
            up, down = self.weights.read(delta.up), self.weights.read(delta.down)
            return LowRank(up.flatten(1), down.flatten(1), delta.scale)  # a convolution's factors have kernels
        from lorasurgery.linalg import forms

        parts = self._parts(delta)
        if delta.form == "tucker":
            return LowRank(parts["up"].flatten(1), forms.tucker(parts["mid"], parts["down"]), delta.scale)
        if delta.form == "hadamard":
            return forms.hadamard_factors(*_halves(parts)).times(delta.scale)
        if delta.form == "kronecker":
            return forms.kronecker_factors(*_sides(parts)).times(delta.scale)
        import torch

        whole = parts["diff"].flatten(1)
        rows, columns = whole.shape
        if rows <= columns:
            return LowRank(torch.eye(rows, dtype=whole.dtype), whole, delta.scale)
        return LowRank(whole, torch.eye(columns, dtype=whole.dtype), delta.scale)

    def load_update(self, delta: Delta) -> Update:
        """Read one module's update in the form that is cheapest to add to a weight."""
        if delta.form in ("lora", "tucker"):
            return self.load(delta)
        from lorasurgery.linalg import forms

        parts = self._parts(delta)
        if delta.form == "full":
            return Dense(parts["diff"].reshape(parts["diff"].shape[0], -1), delta.scale)
        if delta.form == "hadamard":
            return Dense(forms.hadamard(*_halves(parts)), delta.scale)
        return Dense(forms.kronecker(*_sides(parts)), delta.scale)

    def load_diff(self, name: str) -> Dense:
        """Read a vector that is added to the base's `name`, as a matrix (n, 1)."""
        return Dense(self.weights.read(self.diffs[name]).reshape(-1, 1))

    def _parts(self, delta: Delta) -> dict[str, Tensor]:
        """The tensors of other forms, all in the widest of their dtypes, float32 at least."""
        import torch

        found = {part: self.weights.read(name) for part, name in delta.parts.items()}
        wide = functools.reduce(torch.promote_types, (widened(t.dtype) for t in found.values()))
        return {part: t.to(wide) for part, t in found.items()}

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


def _halves(parts: dict[str, Tensor]) -> tuple[LowRank, LowRank]:
    """LoHa's two low-rank matrices; with Tucker cores the first factors are stored (r, out)."""
    return tuple(_half(parts.get(f"hada_t{i}"), parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))  # type: ignore[return-value]


def _sides(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """LoKr's two matrices, a convolution's kernel flattened into the second."""
    found = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            found.append(parts[side].flatten(1))
        else:
            half = _half(parts.get(f"lokr_t{side[-1]}"), parts[f"{side}_a"], parts[f"{side}_b"])
            found.append(half.up @ half.down)
    return found[0], found[1]


def _half(core: Tensor | None, a: Tensor, b: Tensor) -> LowRank:
    from lorasurgery.linalg.forms import tucker

    if core is None:
        return LowRank(a.flatten(1), b.flatten(1))
    return LowRank(a.flatten(1).mT, tucker(core, b))


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
