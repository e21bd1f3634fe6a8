"""Two checkpoints side by side: which tensor of one is which of the other, and what has no partner."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from lorasurgery.adapters.exclusions import exclude_only
from lorasurgery.adapters.fused import ExpertPlace, expert_place
from lorasurgery.adapters.naming import BaseNames, is_buffer, is_head, module_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import some
from lorasurgery.ops.pair_heads import is_growth, is_task_head, other_task, task_of
from lorasurgery.ops.pair_names import PairNames
from lorasurgery.ops.pair_odd import Odd

if TYPE_CHECKING:
    from lorasurgery.ops.pairs import Selection


class Sides:
    """The tensors of both by their names in memory, and what the selection means by them.

    Args:
        base, tuned: The checkpoints, of which only headers are read.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, selection: Selection) -> None:
        self.base, self.tuned, self.selection = base, tuned, selection
        self.base_names = BaseNames(base.tensors, base.config, str(base.path))
        self.tuned_names = BaseNames(tuned.tensors, tuned.config, str(tuned.path))
        self.config = base.config | tuned.config
        self.names = PairNames.of(base, tuned)
        self.other_task = other_task(base.config, tuned.config)
        self.notes: list[str] = []

    @cached_property
    def places(self) -> dict[str, ExpertPlace]:
        """Of the experts' tensors, where they lie in the parameter that holds them in memory."""
        shapes = {m: self.base.tensors[n].shape for m, n in self.names.base.items()}
        shapes |= {m: self.tuned.tensors[n].shape for m, n in self.names.tuned.items()}
        found = {memory: expert_place(memory, shape, self.config) for memory, shape in shapes.items()}
        return {memory: place for memory, place in found.items() if place}

    def twin(self, memory: str) -> TensorInfo | None:
        """The tuned model's tensor of a name that the base has, or what stands for it."""
        name = self.names.tuned.get(memory)
        return self.tuned.tensors[name] if name is not None else self._tied(memory, self.tuned_names)

    def old(self, memory: str) -> TensorInfo | None:
        """What stands for a tensor on the base's side that only the tuned model has by name."""
        return self._tied(memory, self.base_names)

    def _tied(self, memory: str, names: BaseNames) -> TensorInfo | None:
        """A tied head has no tensor of its own: the input embedding stands for it, if the model has such a head."""
        if not memory.endswith(".weight") or (self.other_task and is_head(module_of(memory))):
            return None
        shared = names.tied_source(module_of(memory))
        return names.tensors[shared] if shared else None

    def called(self, memory: str) -> tuple[str, ...]:
        """What --exclude may call a tensor: its module, its own name, or the parameter that holds it with others."""
        path, place = module_of(memory), self.places.get(memory)
        if place is not None:
            return place.parameter, module_of(place.parameter), path
        return (path,) if memory.endswith(".weight") else (path, memory)

    @property
    def paths(self) -> set[str]:
        """All that a pattern may mean."""
        return {n for side in (self.names.base, self.names.tuned) for m in side for n in self.called(m)}

    def wants(self, memory: str) -> bool:
        """Whether --target and --exclude leave a tensor in."""
        return self._is_meant(memory, self.selection)

    def is_beside_target(self, memory: str) -> bool:
        """Whether --target is given and does not mean a tensor, whatever --exclude says of it."""
        return not self._is_meant(memory, self._targets)

    @cached_property
    def _targets(self) -> Selection:
        return replace(self.selection, exclude=())

    def _is_meant(self, memory: str, selection: Selection) -> bool:
        names = self.called(memory)
        return selection.wants(*names) if memory in self.places else selection.wants(names[0], tensor=memory)

    def odd(self) -> Odd:
        """What has no partner or another shape, is wanted, and is no matter of course."""
        odd, names = Odd(str(self.base.path), str(self.tuned.path)), self.names
        foreign = self.other_task or any(m not in names.base and is_task_head(m) for m in names.tuned)
        other_heads: list[str] = []
        for memory, name in names.base.items():
            info, twin = self.base.tensors[name], self.twin(memory)
            if twin is None and self._matters(memory, info):
                (other_heads if foreign and is_task_head(memory) else odd.missing).append(memory)
            elif twin is not None and self._is_reshaped(memory, info, twin):
                odd.reshaped[memory] = (info, twin)
        odd.new = [m for m in names.tuned if m not in names.base and self._has_no_place(m)]
        self._note(other_heads)
        odd.options = self.exclude(odd.names) if odd.names else ""
        return odd

    def unwanted(self) -> list[str]:
        """What only one side has and --target or --exclude leave out."""
        lone = [m for m in self.names.base if self.twin(m) is None]
        lone += [m for m in self.names.tuned if m not in self.names.base and self.old(m) is None]
        return [m for m in lone if not is_buffer(m) and not self.wants(m)]

    def _matters(self, memory: str, info: TensorInfo) -> bool:
        return not is_buffer(memory) and info.is_float and self.wants(memory)

    def _is_reshaped(self, memory: str, old: TensorInfo, new: TensorInfo) -> bool:
        if old.shape == new.shape or not self._matters(memory, new) or is_growth(memory, old, new):
            return False
        return not self.selection.stores(module_of(memory), memory)

    def _has_no_place(self, memory: str) -> bool:
        """Whether the base's model has nowhere to put a tensor that only the tuned one has."""
        info = self.tuned.tensors[self.names.tuned[memory]]
        if not self._matters(memory, info) or self.selection.stores(module_of(memory), memory):
            return False
        return self.old(memory) is None and (self.selection.common or not is_task_head(memory))

    def _note(self, heads: list[str]) -> None:
        if heads:
            task = task_of(self.tuned.config)
            self.notes.append(
                f"{self.tuned.path} has no {some(sorted({module_of(n) for n in heads}))}, which {self.base.path} has: "
                f"it is for another task{f' ({task})' if task else ''}, and the adapter leaves the base's as it is"
            )

    def quantized(self) -> list[str]:
        """The weights that are wanted and no floating numbers on one of the sides."""
        found = []
        for memory, name in self.names.base.items():
            twin = self.twin(memory)
            floats = twin is None or (self.base.tensors[name].is_float and twin.is_float)
            if not floats and memory.endswith(".weight") and self.wants(memory):
                found.append(memory)
        return found

    def exclude(self, names: Collection[str]) -> str:
        """The options that leave out these tensors and no others, as they are typed; "" if they would be too many."""
        meant = set(names)
        groups = {self.places[m].parameter for m in meant if m in self.places}
        modules = {module_of(m) for m in meant if m.endswith(".weight")}  # a weight is only left out with its module
        others: set[str] = set()
        for memory in {**self.names.base, **self.names.tuned}:
            place = self.places.get(memory)
            if memory not in meant and module_of(memory) not in modules and not (place and place.parameter in groups):
                others.update(self.called(memory))
        paths = {m: self.places[m].parameter if m in self.places else module_of(m) for m in meant}
        return exclude_only({m if path in others else path for m, path in paths.items()}, others)
