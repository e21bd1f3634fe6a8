"""The model in memory that an adapter is for, from its checkpoint's names, its config and the library that has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorasurgery.adapters.model_names.cuts import Cut
from lorasurgery.adapters.model_names.library import Installed
from lorasurgery.adapters.model_names.renames import model_types
from lorasurgery.adapters.model_names.skeleton import LayerKind, Module, Skeleton
from lorasurgery.clients.layer_kinds import KINDS, ending_of
from lorasurgery.clients.peft import LAYERS_PAST, MERGED_ONLY, READ_PAST, saved_for, task_type


def kind_is_plain(name: str) -> bool:
    """Whether a class is one of those that PEFT does have layers for."""
    return name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Conv1D", "NonDynamicallyQuantizableLinear")


@dataclass(frozen=True)
class Host:
    """A model as PEFT will meet it, as far as that is known.

    Args:
        config: Its config.json.
        names: Its tensors' names in memory, as the checkpoint tells them.
        model: What a library that has the class makes of it, where one is installed.
        cuts: Tensor on disk -> where its rows go, of those that are not loaded as they are; () for one that becomes
            something else.
    """

    config: dict[str, Any]
    names: frozenset[str]
    model: Installed | None = None
    cuts: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)

    @property
    def skeleton(self) -> Skeleton | None:
        """Its modules, where they are known."""
        return self.model.skeleton if self.model is not None else None

    @cached_property
    def paths(self) -> frozenset[str]:
        """All modules' paths; without a skeleton those that tensors' names tell."""
        if self.skeleton is not None:
            return frozenset(p for p in self.skeleton.modules if p)
        return frozenset(n[:i] for n in self.names for i, c in enumerate(n) if c == ".")

    @cached_property
    def task(self) -> str | None:
        """PEFT's task type."""
        return task_type(self.config)

    @cached_property
    def saved(self) -> frozenset[str]:
        """Modules that PEFT stores whole by itself, the outermost of those that lie in one another."""
        found = saved_for(self.task, self.paths)
        return frozenset(p for p in found if not any(p.startswith(f"{q}.") for q in found))

    def saver_of(self, path: str) -> str | None:
        """The module that PEFT stores whole by itself and that holds this one, or is it."""
        return next((p for p in self.saved if path == p or path.startswith(f"{p}.")), None)

    def module(self, path: str) -> Module | None:
        """A module of the skeleton."""
        return self.skeleton.modules.get(path) if self.skeleton is not None else None

    def kind(self, path: str) -> LayerKind | None:
        """What PEFT's LoRA sees in a module; None where that is not known."""
        if path.rpartition(".")[2] in LAYERS_PAST.get(str(self.config.get("model_type")), ()):
            return "other"
        module = self.module(path)
        if module is None or self.model is None:
            return self._known_kind(path)
        if not self.model.keeps(path):
            return "other"
        return "other" if self._is_read_past(path, READ_PAST) else module.kind

    def _known_kind(self, path: str) -> LayerKind | None:
        """The kind of a layer that its name tells wrongly, from our own table of transformers' models."""
        if self.skeleton is not None:
            return None
        for model in model_types(self.config):
            for parts in (2, 3, 4):
                found = KINDS.get(model, {}).get(ending_of(path, parts))
                if found:
                    return found
        return None

    def runs_only_merged(self, path: str) -> bool:
        """Whether a layer's factors do nothing before they are merged: its weight is read past PEFT's layer."""
        return self._is_read_past(path, MERGED_ONLY)

    def _is_read_past(self, path: str, table: Mapping[str, tuple[str, ...]]) -> bool:
        stem, _, leaf = path.rpartition(".")
        parent = self.module(stem)
        return parent is not None and leaf in table.get(parent.name, ())

    def why_not(self, path: str) -> str:
        """Why PEFT has no LoRA for a layer, in a few words."""
        module = self.module(path)
        if module is None:
            return "a layer that PEFT has no LoRA for"
        if module.twice:
            return f"{module.name} that stands at several places, of which PEFT adapts one"
        if kind_is_plain(module.name):
            return f"{module.name} that PEFT can't adapt here, for the model reads its weight past the layer"
        return f"{module.name}, which PEFT has no LoRA for"

    def holds_modules(self, path: str) -> bool:
        """Whether a module has others in it, so that saving it whole would save more than its own tensors."""
        module = self.module(path)
        if module is not None:
            return module.container
        return path in self._parents

    def stands_twice(self, path: str) -> bool:
        """Whether a module stands at several paths."""
        module = self.module(path)
        return module is not None and module.twice

    @cached_property
    def _parents(self) -> frozenset[str]:
        return frozenset(p.rpartition(".")[0] for p in self.paths)

    def tensors_of(self, path: str) -> list[str]:
        """All tensors that PEFT asks for of a module that is stored whole."""
        if self.skeleton is not None and path in self.skeleton.modules:
            return self.skeleton.inside(path)
        return sorted(n for n in self.names if n.startswith(f"{path}."))

    def others_of(self, name: str) -> list[str]:
        """The other names of a parameter's tensor in memory: of layers that share it."""
        group = self.skeleton.group_of.get(name, ()) if self.skeleton is not None else ()
        return [n for n in group if n != name]

    def has(self, name: str) -> bool:
        """Whether the model has a parameter or buffer of this name; without a skeleton that is taken to be so."""
        return self.skeleton is None or name in self.skeleton.names

    def find(self, name: str, disk: str | None = None) -> str | None:
        """The name in memory that a name told by our own tables stands for: itself, or the one that it ends as.

        Args:
            disk: The tensor's name on disk, of which the library says what it is loaded as.
        """
        told = self.model.name_of(disk) if self.model is not None and disk else None
        if told or self.has(name):
            return told or name
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if self.has(".".join(parts[i:])):
                return ".".join(parts[i:])
        longer = self._by_ending.get(name, [])
        return longer[0] if len(longer) == 1 else None

    @cached_property
    def _by_ending(self) -> Mapping[str, list[str]]:
        """Every proper ending of a name of two parts or more -> the names that end so."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.skeleton.names if self.skeleton is not None else ():
            parts = name.split(".")
            for i in range(1, len(parts) - 1):
                found[".".join(parts[i:])].append(name)
        return found
