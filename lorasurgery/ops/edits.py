"""What becomes of each tensor of a checkpoint: the plan that merge and unmerge carry out."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.lowrank import LowRank


@dataclass(frozen=True)
class Contribution:
    """One adapter's term weight · scale · up @ down in a tensor's sum, transposed where the base stores it so."""

    adapter: Adapter
    delta: Delta
    weight: float
    transposed: bool
    bias: bool = False
    expert: int | None = None
    rows: slice | None = None

    def load(self, expert: int | None = None) -> LowRank:
        """Read the factors, in the orientation of the base's tensor; of one expert where there are several."""
        return self.plain(expert).times(self.weight)

    def plain(self, expert: int | None = None) -> LowRank:
        """The same without the weight, which DoRA applies later."""
        expert = self.expert if expert is None else expert
        if self.bias:
            update = self.adapter.load_bias(self.delta)
        elif expert is not None:
            update = self.adapter.load_expert(self.delta, expert)
        else:
            update = self.adapter.load(self.delta)
        if self.rows is not None:
            update = LowRank(update.up[self.rows], update.down, update.scale)
        return update.transposed if self.transposed else update

    @property
    def stacked(self) -> bool:
        """Whether this adds to every expert of a three-dimensional tensor."""
        return self.delta.experts > 0 and self.expert is None


@dataclass(frozen=True)
class Replacement:
    """A full tensor that takes the base's place; a weight w other than 1 means W + w·(R − W)."""

    adapter: Adapter
    name: str
    weight: float

    @property
    def info(self) -> TensorInfo:
        """The replacing tensor's header entry in the adapter file."""
        return self.adapter.weights.tensors[self.adapter.replaced[self.name]]


@dataclass(frozen=True)
class RowReplacement:
    """Single rows of an embedding that are replaced (trainable_token_indices); w other than 1 as for Replacement."""

    adapter: Adapter
    key: str
    rows: tuple[int, ...]
    weight: float


@dataclass
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
