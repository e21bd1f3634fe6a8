"""Where the updates of image models' adapters go: names are looked up in the base's dictionary, shapes are checked.

One module of the adapter may be several tensors of the base, or some rows of one (fused qkv).
"""

from __future__ import annotations

import math
from functools import cached_property

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.image_names.components import PartPath, adapter_place
from lorasurgery.adapters.image_names.dictionary import BaseRows, Dictionary
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.checkpoint.tensor_reader import ModelHeaders
from lorasurgery.errors import MismatchError, UnsupportedError, size_of
from lorasurgery.ops.placement.edits import Contribution, Edit, EditPlan


class Placer:
    """Adds an adapter's updates to a plan, by the base's dictionary.

    Args:
        base: The checkpoint.
        plan: What the edits go into.
        replace: False (unmerge) leaves DoRA alone, for the norm it was divided by is gone.
    """

    def __init__(self, base: ModelHeaders, plan: EditPlan, replace: bool) -> None:
        self.base, self.plan, self.replace = base, plan, replace
        self.where = str(base.path)

    @cached_property
    def _dictionary(self) -> Dictionary:
        return Dictionary(self.base.tensors, pipeline=bool(self.base.parts), config=self.base.config_of)

    def knows(self, path: str) -> bool:
        """Whether the base has a module of this name, or of one that stands for it."""
        return bool(self._dictionary.find(adapter_place(path) or PartPath("denoiser", path)))

    def check(self, adapter: Adapter) -> None:
        """See that every module of an adapter is one of the base's.

        Raises:
            MismatchError: how many are not, the first of them and the names nearest to it.
        """
        names = [(path, "weight") for path in adapter.deltas]
        names += [(module_of(n), n.rpartition(".")[2]) for n in (*adapter.diffs, *adapter.replaced)]
        missing = [(path, leaf) for path, leaf in names if not self._dictionary.find(self._of(adapter, path), leaf)]
        if missing:
            raise self._missing(adapter, missing, len(names))

    def _missing(self, adapter: Adapter, names: list[tuple[str, str]], total: int) -> MismatchError:
        said = [path if leaf == "weight" else f"{path} ({leaf})" for path, leaf in names]
        verb = "matches" if len(names) == 1 else "match"
        hint = self._dictionary.hint(self._of(adapter, names[0][0]))
        return MismatchError(
            f"{adapter.path}: {len(names)} of {total} modules {verb} no tensor in {self.where}: {', '.join(said[:3])}"
            f"{' …' if len(said) > 3 else ''}; nothing was changed{hint}"
        )

    def _of(self, adapter: Adapter, path: str) -> PartPath:
        """The part a path's prefix names; without one a PEFT adapter is taken to be the denoiser's."""
        return adapter_place(path) or PartPath("denoiser" if adapter.format == "peft" else "any", path)

    def _slots(self, adapter: Adapter, path: str, leaf: str = "weight") -> tuple[BaseRows, ...]:
        found = self._dictionary.find(self._of(adapter, path), leaf)
        if not found:
            raise self._missing(adapter, [(path, leaf)], len(adapter.deltas) + len(adapter.diffs))
        return found

    def tensor(self, adapter: Adapter, path: str, leaf: str) -> str:
        """The one tensor of the base that a whole tensor of the adapter takes the place of."""
        slots = self._slots(adapter, path, leaf)
        if len(slots) > 1 or slots[0].into is not None:
            raise UnsupportedError(f"{adapter.path}: {path}.{leaf} replaces only a part of {slots[0].tensor}")
        return slots[0].tensor

    def add(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        """Add one module's update, to as many tensors as it is spread over."""
        slots = self._slots(adapter, delta.path)
        if delta.magnitude and not self.replace:
            self.plan.unrestored.append(f"{delta.path}.weight")
            return
        if delta.magnitude and delta.magnitude.by_input and len(slots) > 1:
            raise UnsupportedError(
                f"{adapter.path}: {delta.path} has a DoRA norm for each input, over all rows of a fused layer, but "
                f"{self.where} keeps its rows in {len(slots)} tensors; merge it into the checkpoint it was trained on"
            )
        for slot in slots:
            edit = self._place(adapter, slot, delta.path, delta.shape, len(slots))
            edit.contributions.append(
                Contribution(adapter, delta, weight, slot.transposed, rows=slot.rows, into=slot.into)
            )
        self.plan.matched += 1
        if delta.bias:
            for slot in self._slots(adapter, delta.path, "bias"):
                edit = self._place(adapter, slot, delta.path, (delta.shape[0], 1), len(slots))
                edit.contributions.append(
                    Contribution(adapter, delta, weight, bias=True, rows=slot.rows, into=slot.into)
                )

    def add_diff(self, adapter: Adapter, name: str, weight: float) -> None:
        """Add a whole vector: a norm's or a bias's."""
        path, leaf = module_of(name), name.rpartition(".")[2]
        count = math.prod(adapter.weights.tensors[adapter.diffs[name]].shape)
        slots = self._slots(adapter, path, leaf)
        for slot in slots:
            edit = self._place(adapter, slot, name, (count, 1), len(slots))
            edit.contributions.append(Contribution(adapter, None, weight, rows=slot.rows, into=slot.into, diff=name))
        self.plan.matched += 1

    def _place(self, adapter: Adapter, slot: BaseRows, path: str, shape: tuple[int, int], slots: int) -> Edit:
        """The edit of a slot's tensor, once the update's shape is seen to fit."""
        edit = self.plan.edit(slot.tensor, self.base.tensors[slot.tensor])
        height, width = edit.shape[0] if edit.shape else 1, math.prod(edit.shape[1:])
        rows = height if slot.into is None else slot.into.stop - slot.into.start
        found = shape if slot.rows is None else (slot.rows.stop - slot.rows.start, shape[1])
        found = found[::-1] if slot.transposed else found
        too_few = slot.rows is not None and slot.rows.stop > shape[0]
        if found != (rows, width) or too_few or (slots > 1 and slot.rows is None):
            raise MismatchError(
                f"{adapter.path}: {path} is an update of {size_of(shape)} but {edit.tensor} in {self.where} is "
                f"{size_of(edit.shape)}; is this the adapter's base model?"
            )
        if any(c.adapter is adapter and _meet(c.into, slot.into) for c in edit.contributions):
            raise MismatchError(f"{adapter.path}: two modules of the adapter mean {edit.tensor} in {self.where}")
        return edit


def _meet(a: slice | None, b: slice | None) -> bool:
    return a is None or b is None or (a.start < b.stop and b.start < a.stop)
