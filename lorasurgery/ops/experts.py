"""Where the experts of a fused adapter module lie in a base: in one three-dimensional tensor, or a matrix each."""

from __future__ import annotations

from dataclasses import dataclass

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.naming import BaseNames
from lorasurgery.adapters.renames import disk_names
from lorasurgery.errors import MismatchError

# Names of a single expert's matrices: first those that are the upper and lower half of gate_up_proj, then down_proj.
_SPLIT = ((("gate_proj", "up_proj"), ("down_proj",)), (("w1", "w3"), ("w2",)))
_TRANSPOSED = {"gpt_oss", "llama4", "llama4_text"}  # experts stored (in, out)


@dataclass(frozen=True)
class ExpertTarget:
    """A tensor that takes one expert's update, or all of them (expert None): `rows` of up belong to it."""

    tensor: str
    expert: int | None
    rows: slice | None
    transposed: bool


def expert_targets(names: BaseNames, adapter: Adapter, delta: Delta) -> list[ExpertTarget]:
    """The base's tensors that an update of fused experts (PEFT's target_parameters) adds to.

    Raises:
        MismatchError: no tensors of these shapes.
    """
    found = _stacked(names, delta) or _split(names, delta)
    if not found:
        raise names.missing(delta.parameter, adapter.path)
    return found


def _stacked(names: BaseNames, delta: Delta) -> list[ExpertTarget]:
    """One tensor for all experts, stored (E, out, in) or (E, in, out)."""
    out, into = delta.shape
    for name in (delta.parameter, *disk_names(delta.parameter)):
        shape = names.tensors[name].shape if name in names.tensors else ()
        plain, turned = shape == (delta.experts, out, into), shape == (delta.experts, into, out)
        if plain and turned:
            turned = names.config.get("model_type") in _TRANSPOSED
        if plain or turned:
            return [ExpertTarget(name, None, None, turned)]
    return []


def _split(names: BaseNames, delta: Delta) -> list[ExpertTarget]:
    """A matrix for each expert, and two of them for gate_up_proj."""
    out, into = delta.shape
    module, _, leaf = delta.parameter.rpartition(".")
    for stem in (module, *disk_names(module)):
        for both, single in _SPLIT:
            leaves = both if leaf == "gate_up_proj" else single
            rows = out // len(leaves)
            parts = [(part, slice(i * rows, (i + 1) * rows)) for i, part in enumerate(leaves)]
            wanted = [(f"{stem}.{e}.{part}.weight", e, own) for e in range(delta.experts) for part, own in parts]
            if all(n in names.tensors and names.tensors[n].shape == (rows, into) for n, _, _ in wanted):
                _check_count(names, stem, delta)
                return [ExpertTarget(n, e, own, False) for n, e, own in wanted]
    return []


def _check_count(names: BaseNames, stem: str, delta: Delta) -> None:
    more = f"{stem}.{delta.experts}."
    if any(n.startswith(more) for n in names.tensors):
        raise MismatchError(
            f"{delta.path}: has factors for {delta.experts} experts but {names.where} has more at {stem}"
        )
