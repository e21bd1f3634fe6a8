"""What becomes of each tensor of a checkpoint: the plan that merge and unmerge carry out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.lowrank import Update


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's term weight · ΔW in a tensor's sum, transposed where the base stores it so.

    Args:
        delta: The update; None for a whole vector that is added (`diff` says which).
        bias: It is lora_B.bias that is meant.
        expert: Which of fused experts; None for all of them, or where there are none.
        rows: The rows of the update that belong to this tensor, in its order; None is all of them.
        into: The rows of the tensor that it is added to; None is all of them.
        diff: Name of the added tensor in memory.
    """

    adapter: Adapter
    delta: Delta | None
    weight: float
    transposed: bool = False
    bias: bool = False
    expert: int | None = None
    rows: slice | list[int] | None = None
    into: slice | None = None
    diff: str = ""

    def load(self, expert: int | None = None) -> Update:
        """Read the update, in the orientation of the base's tensor; of one expert where there are several."""
        return self.plain(expert).times(self.weight)

    def plain(self, expert: int | None = None) -> Update:
        """The same without the weight, which DoRA applies later."""
        expert = self.expert if expert is None else expert
        update: Update
        if self.delta is None:
            update = self.adapter.load_diff(self.diff)
        elif self.bias:
            update = self.adapter.load_bias(self.delta)
        elif expert is not None:
            update = self.adapter.load_expert(self.delta, expert)
        else:
            update = self.adapter.load_update(self.delta)
        if self.rows is not None:
            update = update.part(self.rows)
        return update.transposed if self.transposed else update

    @property
    def stacked(self) -> bool:
        """Whether this adds to every expert of a three-dimensional tensor."""
        return self.delta is not None and self.delta.experts > 0 and self.expert is None

    @property
    def decomposes(self) -> bool:
        """Whether this is DoRA, which sets the weight's norm and so is not a sum."""
        return self.delta is not None and bool(self.delta.magnitude) and not self.bias


@dataclass(frozen=True, slots=True)
class Replacement:
    """A full tensor that takes the base's place; a weight w other than 1 means W + w·(R − W).

    Args:
        weights: What it is read from: an adapter's file, or another checkpoint.
        key: Its name there.
        adapter: Whose it is; None for a checkpoint's own.
        name: Its name in memory, as the adapter means it.
    """

    weights: TensorReader
    key: str
    weight: float = 1.0
    adapter: Adapter | None = None
    name: str = ""

    @property
    def info(self) -> TensorInfo:
        """The replacing tensor's header entry in its file."""
        return self.weights.tensors[self.key]

    @property
    def where(self) -> str:
        """Where it comes from, for messages."""
        return self.adapter.path if self.adapter else str(self.weights.path)


@dataclass(frozen=True, slots=True)
class RowReplacement:
    """Single rows that are replaced, of an embedding (trainable_token_indices) or of a tensor that a model cuts up.

    Args:
        key: The adapter's tensor.
        rows: Which rows of the base's it replaces.
        weight: As for Replacement.
        part: The rows of the adapter's tensor that are meant; None is all of them.
    """

    adapter: Adapter
    key: str
    rows: Sequence[int]
    weight: float
    part: slice | None = None


@dataclass(slots=True)
class Edit:
    """What becomes of one output tensor: where it starts from, what replaces it, what is added."""

    tensor: str
    source: TensorInfo | None
    shape: tuple[int, ...]
    contributions: list[Contribution] = field(default_factory=list)
    replacement: Replacement | None = None
    rows: list[RowReplacement] = field(default_factory=list)


@dataclass
class EditPlan:
    """All edits by output tensor name, and what they mean for config.json."""

    edits: dict[str, Edit] = field(default_factory=dict)
    untied: bool = False
    vocab_size: int | None = None
    unrestored: list[str] = field(default_factory=list)
    matched: int = 0

    def edit(self, name: str, source: TensorInfo | None, shape: tuple[int, ...] | None = None) -> Edit:
        """The edit of an output tensor, made when it is first asked for."""
        if name not in self.edits:
            self.edits[name] = Edit(name, source, shape or (source.shape if source else ()))
        return self.edits[name]
