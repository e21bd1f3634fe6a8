"""Where the updates of PEFT adapters go in a model's checkpoint: names, orientation, experts, fused projections."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.model_names.fused import is_turned
from lorasurgery.adapters.model_names.naming import BaseNames, is_head, module_of
from lorasurgery.adapters.model_names.projections import Rows, library_rows, projection_rows
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.errors import MismatchError, UnsupportedError, size_of
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.placement.edits import Contribution, Edit, EditPlan
from lorasurgery.ops.placement.image import Placer


class PeftPlacer:
    """Adds a PEFT adapter's updates to a plan.

    Args:
        names: The base's.
        plan: What the edits go into.
        placer: Knows the names of image models.
        replace: False (unmerge) leaves DoRA alone, for the norm it was divided by is gone.
    """

    def __init__(self, names: BaseNames, plan: EditPlan, placer: Placer, replace: bool) -> None:
        self.names, self.plan, self.placer, self.replace = names, plan, placer, replace

    def add(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        """Add one module's update, to as many tensors as it is spread over.

        Raises:
            NoTensorError: the base has no such module.
            MismatchError: it has another shape.
        """
        # of a pipeline's parts the denoiser comes first, or the VAE's conv_in could pass for the U-Net's
        if adapter.format != "peft" or (self.placer.base.parts and self.placer.knows(delta.path)):
            return self.placer.add(adapter, delta, weight)
        if delta.experts:
            return self._add_experts(adapter, delta, weight)
        target = self._find(self.names, delta)
        if target is not None:
            return self._add_to(adapter, delta, weight, target, self.names.tensors[target])
        shared = self.names.tied_source(delta.path)
        if shared is not None and self._shared_has_it(adapter, delta, shared):
            return None
        if shared is not None and is_head(delta.path):
            return self._add_to(adapter, delta, weight, f"{delta.path}.weight", self.names.tensors[shared])
        if shared is None and self.placer.knows(delta.path):
            return self.placer.add(adapter, delta, weight)
        if shared is None and self._is_copy(adapter, delta):
            return None
        return self._add_elsewhere(adapter, delta, weight)

    def _find(self, names: BaseNames, delta: Delta) -> str | None:
        target = names.find(delta.path, shapes=delta.stored_shapes)
        if target is None and delta.kind == "linear":
            target = names.find(delta.path, "in_proj_weight", delta.stored_shapes)
        return target

    def _add_to(self, adapter: Adapter, delta: Delta, weight: float, target: str, source: TensorInfo) -> None:
        if delta.magnitude and not self.replace:
            self.plan.unrestored.append(target)  # the norm it was divided by is gone
            return
        if is_head(delta.path) and self.names.ties and not adapter.tied:
            self.plan.untied = True
        edit = self.plan.edit(target, source)
        _check_free(adapter, edit, None, self.names.where)
        transposed = self._orientation(adapter, delta, edit)
        edit.contributions.append(Contribution(adapter, delta, weight, transposed))
        self.plan.matched += 1
        if delta.bias:
            self._add_bias(adapter, delta, weight, Rows(target))

    def _add_elsewhere(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        """A module that the base keeps fused with others, or apart, or that only transformers' own table finds."""
        places = projection_rows(self.names, delta.path, delta.shape, adapter.path) if delta.kind == "linear" else []
        if places:
            return self._add_rows(adapter, delta, weight, places)
        places = library_rows(self.names, f"{delta.path}.weight", delta.shape) if delta.kind == "linear" else []
        if places:
            return self._add_rows(adapter, delta, weight, places, f"{delta.path}.bias")
        library = self.names.by_library
        target = self._find(library, delta) if library else None
        if target is None:
            raise self.names.missing(delta.path, adapter.path)
        return self._add_to(adapter, delta, weight, target, self.names.tensors[target])

    def _add_rows(
        self, adapter: Adapter, delta: Delta, weight: float, places: list[Rows], bias: str | None = None
    ) -> None:
        if delta.magnitude and not self.replace:
            self.plan.unrestored += [p.tensor for p in places]
            return
        for place in places:
            edit = self.plan.edit(place.tensor, self.names.tensors[place.tensor])
            _check_free(adapter, edit, place.into, self.names.where)
            edit.contributions.append(Contribution(adapter, delta, weight, rows=place.rows, into=place.into))
            if delta.bias and bias is None:
                self._add_bias(adapter, delta, weight, place)
        if delta.bias and bias is not None:
            self._add_cut_bias(adapter, delta, weight, bias)
        self.plan.matched += 1

    def _add_cut_bias(self, adapter: Adapter, delta: Delta, weight: float, bias: str) -> None:
        """Add to the rows of biases that the library cuts up or joins as it does the weights."""
        places = library_rows(self.names, bias, delta.shape[:1])
        if not places:
            raise MismatchError(f"{adapter.path}: {delta.bias} needs a bias but {self.names.where} has no {bias}")
        for p in places:
            edit = self.plan.edit(p.tensor, self.names.tensors[p.tensor])
            edit.contributions.append(Contribution(adapter, delta, weight, bias=True, rows=p.rows, into=p.into))

    def _add_experts(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        if delta.magnitude:
            raise UnsupportedError(
                f"{adapter.path}: {delta.path} is DoRA on fused experts, which PEFT does not do either"
            )
        targets = expert_targets(self.names, delta)
        if not targets and self.names.by_library:
            targets = expert_targets(self.names.by_library, delta)
        if not targets:
            raise self.names.missing(delta.parameter, adapter.path)
        for target in targets:
            edit = self.plan.edit(target.tensor, self.names.tensors[target.tensor])
            edit.contributions.append(
                Contribution(adapter, delta, weight, target.transposed, expert=target.expert, rows=target.rows)
            )
        self.plan.matched += 1

    def _shared_has_it(self, adapter: Adapter, delta: Delta, shared: str) -> bool:
        if not adapter.tied:
            return False
        return any(self.names.find(p) == shared for p in adapter.deltas if p != delta.path)

    def _is_copy(self, adapter: Adapter, delta: Delta) -> bool:
        """Whether a module without a tensor of its own has the factors of one that has: they share it in memory."""
        if not adapter.tied or not delta.stores_factors:
            return False
        mine, sizes = adapter.load(delta), sorted(delta.shape)
        others = [
            d for d in adapter.deltas.values() if d is not delta and sorted(d.shape) == sizes and d.stores_factors
        ]
        tables = [self.names, *([self.names.by_library] if self.names.by_library else [])]
        stored = [d for d in others if any(self._find(names, d) is not None for names in tables)]
        return any(_same_update(mine, adapter.load(d)) for d in stored)

    def _orientation(self, adapter: Adapter, delta: Delta, edit: Edit) -> bool:
        if delta.kind == "conv":
            self._check_conv(adapter, delta, edit)
            return False
        conv1d = self.names.is_conv1d(delta.path)
        flipped = delta.shape[::-1]
        if delta.is_across or conv1d:
            fits, transposed = edit.shape == flipped, True
        else:
            transposed = edit.shape != delta.shape and edit.shape == flipped and adapter.fan_in_fan_out
            fits = edit.shape == delta.shape or transposed
        if not fits:
            expected = flipped if delta.is_across or conv1d else delta.shape
            raise MismatchError(
                f"{adapter.path}: {delta.path} is an update of {size_of(expected)} but {edit.tensor} in "
                f"{self.names.where} is {size_of(edit.shape)}; is this the adapter's base model?"
            )
        return transposed

    def _add_bias(self, adapter: Adapter, delta: Delta, weight: float, place: Rows) -> None:
        name = f"{module_of(place.tensor)}.bias"
        if name not in self.names.tensors:
            raise MismatchError(f"{adapter.path}: {delta.bias} needs a bias but {self.names.where} has no {name}")
        edit = self.plan.edit(name, self.names.tensors[name])
        wanted = len(range(delta.shape[0])[place.rows]) if isinstance(place.rows, slice) else delta.shape[0]
        found = edit.shape if place.into is None else (min(edit.shape[0], place.into.stop) - place.into.start,)
        if found != (wanted,):
            raise MismatchError(
                f"{adapter.path}: {delta.bias} has {delta.shape[0]} entries but {name} has {size_of(edit.shape)}"
            )
        edit.contributions.append(Contribution(adapter, delta, weight, bias=True, rows=place.rows, into=place.into))

    def _check_conv(self, adapter: Adapter, delta: Delta, edit: Edit) -> None:
        if edit.shape == delta.weight_shape:
            return
        grouped = edit.shape[:1] + edit.shape[2:] == delta.weight_shape[:1] + delta.weight_shape[2:]
        if grouped and delta.weight_shape[1] % edit.shape[1] == 0:
            raise UnsupportedError(
                f"{adapter.path}: {delta.path} is a grouped convolution ({size_of(edit.shape)}), whose dense factors "
                "have no merged form; PEFT does not merge it either"
            )
        raise MismatchError(
            f"{adapter.path}: {delta.path} is an update of {size_of(delta.weight_shape)} but {edit.tensor} is "
            f"{size_of(edit.shape)}"
        )


def _same_update(one: LowRank, other: LowRank) -> bool:
    """Whether two updates have the same factors, to the bit, one of them turned or not."""
    import torch

    return one.scale == other.scale and any(
        one.up.shape == o.up.shape and torch.equal(one.up, o.up) and torch.equal(one.down, o.down)
        for o in (other, other.transposed)
    )


def _check_free(adapter: Adapter, edit: Edit, into: slice | None, where: str) -> None:
    """No two modules of one adapter may mean the same rows."""
    for c in edit.contributions:
        apart = c.into is not None and into is not None and _are_apart(c.into, into)
        if c.adapter is adapter and not c.bias and not apart:
            raise MismatchError(f"{adapter.path}: two modules of the adapter mean {edit.tensor} in {where}")


def _are_apart(one: slice, other: slice) -> bool:
    """Whether two slices have no row in common."""
    first, second = (range(s.start, s.stop, s.step or 1) for s in (one, other))
    far = first.stop <= second.start or second.stop <= first.start
    return far or (first.step == second.step > 1 and (first.start - second.start) % first.step != 0)


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
