"""What PEFT would do with an adapter on a model whose modules are known: from names alone, nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lorasurgery.adapters.peft.patterns import Selection
from lorasurgery.adapters.peft.read import PREFIX
from lorasurgery.clients.host import Host
from lorasurgery.clients.peft import Shutter, saved_for

_EXPERT = re.compile(r"(.+\.experts)\.\d{1,6}\.\w+")


@dataclass(frozen=True)
class Problem:
    """One way in which PEFT would not run, or not merge, what the file says.

    Args:
        kind: It stops (`rejected`), leaves something out (`dropped`), has the right model when merged but not before
            (`run wrongly`), or the other way round (`merged wrongly`).
        names: Modules or keys that it is about. why: The reason, in a few words.
        full: What --full of extract calls the tensor that would be right if it were stored whole.
    """

    kind: Literal["rejected", "dropped", "run wrongly", "merged wrongly"]
    names: tuple[str, ...]
    why: str
    full: str = ""


@dataclass(frozen=True)
class PeftLoad:
    """PeftModel.from_pretrained, as far as names decide it (peft 0.21.2).

    Args:
        config: adapter_config.json. keys: The tensors of adapter_model.safetensors.
    """

    config: dict[str, Any]
    keys: Collection[str]
    host: Host

    def problems(self) -> Iterator[Problem]:
        """Everything that would go wrong; nothing where the model is not known."""
        if self.host.skeleton is None:
            return
        if self.host.skeleton.closed:
            yield Problem(
                "rejected", (str((self.host.config.get("architectures") or [""])[0]),), self.host.skeleton.closed
            )
        refused = sorted(p for p in self.targets if self.host.kind(p) == "other")
        if refused:
            yield Problem("rejected", tuple(refused), self.host.why_not(refused[0]))
        lacking = sorted(self._wanted() - set(self._bare))
        if lacking:
            yield Problem("rejected", tuple(lacking), "modules that it stores whole are not in the file")
        empty = sorted(p for p in self.targets - set(refused) if not self._factors_of(p))
        if empty:
            yield Problem("dropped", tuple(empty), "target_modules means modules that the file has no factors of")
        unknown = sorted(k for k in self._bare if not self._has_place(k))
        if unknown:
            yield Problem("dropped", tuple(unknown), "the model has no module or parameter of this name")
        past = sorted(p for p in self.targets if self.host.runs_only_merged(p))
        if past:
            yield Problem("run wrongly", tuple(past), "the model reads their weight past PEFT's layer")
        yield from self._twice()

    @cached_property
    def _bare(self) -> list[str]:
        return [k.removeprefix(PREFIX) for k in self.keys]

    @cached_property
    def _saved(self) -> set[str]:
        names = tuple(self.config.get("modules_to_save") or ())
        own = {p for p in self.host.paths if names and p.endswith(names)}
        return own | saved_for(self.config.get("task_type"), self.host.paths)

    @cached_property
    def targets(self) -> frozenset[str]:
        """The modules that get factors."""
        chosen = Selection(self.config)
        found = [p for p in self.host.paths if chosen.means(p)]
        names = self.config.get("modules_to_save") or []
        return frozenset(p for p in found if not any(Shutter([p]).shuts(n) for n in names))

    def _wanted(self) -> set[str]:
        """The tensors of the modules that are stored whole."""
        assert self.host.skeleton is not None
        return {n for path in self._saved for n in self.host.skeleton.inside(path)}

    def _factors_of(self, path: str) -> bool:
        return path in self._stems

    @cached_property
    def _stems(self) -> set[str]:
        return {k.rpartition(".lora_")[0] for k in self._bare if ".lora_" in k}

    def _has_place(self, key: str) -> bool:
        stem, mark, _ = key.rpartition(".lora_")
        if mark:
            expert = _EXPERT.fullmatch(stem)
            if expert and any(self.host.has(f"{expert[1]}.{leaf}") for leaf in ("gate_up_proj", "up_proj")):
                return True  # PEFT itself puts the experts' factors together
            return stem in self.targets or ".base_layer" in stem or any(self.config.get("target_parameters") or ())
        return self.host.has(re.sub(r"(\.base_layer)+\.", ".", key))

    def _twice(self) -> Iterator[Problem]:
        """Layers that share a tensor and each have the update: merging adds it to the one tensor each time."""
        assert self.host.skeleton is not None
        for group in self.host.skeleton.shared:
            layers = [n.removesuffix(".weight") for n in group if n.removesuffix(".weight") in self.targets]
            if len(layers) > 1:
                yield Problem(
                    "merged wrongly", tuple(layers), f"merge_and_unload adds their update {len(layers)} times"
                )
