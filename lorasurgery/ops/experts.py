"""Where the experts of a fused adapter module lie in a base: in one three-dimensional tensor, or a matrix each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from lorasurgery.adapters.adapter import Delta
from lorasurgery.adapters.model_names.fused import is_turned
from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.errors import MismatchError

# Names of a single expert's matrices, from top to bottom, by the parameter that holds them in memory.
_MATRICES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
}


@dataclass(frozen=True)
class ExpertTarget:
    """A tensor that takes one expert's update, or all of them (expert None): `rows` of up belong to it."""

    tensor: str
    expert: int | None
    rows: slice | None
    transposed: bool


def expert_targets(names: BaseNames, delta: Delta) -> list[ExpertTarget]:
    """The base's tensors that an update of fused experts (PEFT's target_parameters) adds to; none when it has none.

    Raises:
        MismatchError: the base has more experts.
    """
    return _stacked(names, delta) or _split(names, delta)


def _stacked(names: BaseNames, delta: Delta) -> list[ExpertTarget]:
    """One tensor for all experts, stored (E, out, in) or (E, in, out)."""
    out, into = delta.shape
    exact = [delta.parameter] if delta.parameter in names.tensors else []
    for name in (*exact, *names.renamed(delta.parameter)):
        shape = names.tensors[name].shape
        plain, turned = shape == (delta.experts, out, into), shape == (delta.experts, into, out)
        if plain and turned:
            turned = is_turned(delta.parameter, shape, names.config)
        if plain or turned:
            return [ExpertTarget(name, None, None, turned)]
    return []


def _split(names: BaseNames, delta: Delta) -> list[ExpertTarget]:
    """A matrix for each expert, and two of them for gate_up_proj."""
    module, _, leaf = delta.parameter.rpartition(".")
    for leaves in _MATRICES.get(leaf, ()):
        rows = delta.shape[0] // len(leaves)
        parts = [(part, slice(i * rows, (i + 1) * rows)) for i, part in enumerate(leaves)]
        found = []
        for e, (part, own) in product(range(delta.experts), parts):
            tensor = names.find(f"{module}.{e}.{part}", shapes=((rows, delta.shape[1]),))
            if tensor is None:
                break
            found.append(ExpertTarget(tensor, e, own, False))
        else:
            _check_count(names, f"{module}.{delta.experts}.{leaves[0]}", delta)
            return found
    return []


def _check_count(names: BaseNames, following: str, delta: Delta) -> None:
    if names.find(following):
        raise MismatchError(f"{delta.path}: has factors for {delta.experts} experts but {names.where} has more of them")
