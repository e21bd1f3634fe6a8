"""What PEFT would do with an adapter on a model, and what it would not load, mostly in silence: from names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.library import installed_model
from lorasurgery.adapters.peft.patterns import Selection
from lorasurgery.adapters.peft.read import PREFIX
from lorasurgery.checkpoint.locate import load_config
from lorasurgery.clients.host import Host
from lorasurgery.clients.issue import MERGE, PORTABLE, TO_PEFT, Issue, Rule, Setting, Verdict, briefly
from lorasurgery.clients.peft import Shutter, for_task, saved_for

_EXPERT = re.compile(r"(.+\.experts)\.\d{1,6}\.\w+")


@dataclass(frozen=True)
class Problem:
    """One way in which PEFT would not run, or not merge, what the file says.

    Args:
        kind: It stops (`rejected`), leaves something out (`dropped`), has the right model when merged but not before
            (`run wrongly`), or the other way round (`merged wrongly`).
        names: Modules or keys that it is about.
        why: The reason, in a few words.
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
        config: adapter_config.json.
        keys: The tensors of adapter_model.safetensors.
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


# Inits that leave the base as it is; those that do not are refused when the adapter is opened.
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# A part of PEFT's keys that still carries the adapter's name: `lora_A.default.weight`.
_NAMED = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?!weight$|bias$)[^.]+(?:\.weight|\.bias)?$")
_DEFAULT = re.compile(r"\.default(?:\.weight|\.bias)?$")  # the name that PEFT gives an adapter, which it finds again


_VERDICTS: dict[str, Verdict] = {
    "rejected": "rejected", "dropped": "dropped", "run wrongly": "wrong", "merged wrongly": "wrong"
}  # fmt: skip


def is_folder(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """PEFT, and all that build on it, read adapter_config.json beside adapter_model.safetensors."""
    if adapter.format != "peft":
        yield Issue("rejected", f"a {adapter.format} file, where a PEFT folder is expected", TO_PEFT)


def _keys(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """set_peft_model_state_dict puts the adapter's name into each key and loads what the model then has."""
    if adapter.format != "peft":
        return
    keys = [k for a in _single(adapter) for k in a.weights.tensors]
    bare = [k for k in keys if not k.startswith(PREFIX)]
    if bare:
        yield Issue("dropped", f"keys without {PREFIX} ({briefly(bare)}) are not loaded", PORTABLE)
    compiled = [k for k in keys if k.startswith(f"{PREFIX}_orig_mod.")]
    if compiled:
        yield Issue("dropped", f"keys of a compiled model ({briefly(compiled)}) are not loaded", PORTABLE)
    named = [k for k in named_keys(adapter) if not _DEFAULT.search(k)]
    if named:
        yield Issue("dropped", f"keys that carry the adapter's name ({briefly(named)}) are not loaded", PORTABLE)


def _init(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """A layer is initialised before its factors are loaded, and stops at a word it doesn't know."""
    for one in _single(adapter):
        init = one.config.get("init_lora_weights", True)
        if one.format == "peft" and isinstance(init, str) and init.lower() not in INITS:
            yield Issue("rejected", f"init_lora_weights is {init!r}, which PEFT does not know", PORTABLE)


def named_keys(adapter: Adapter) -> list[str]:
    """Keys that still carry the adapter's name, which PEFT takes off when it saves."""
    return [k for a in _single(adapter) for k in a.weights.tensors if _NAMED.search(k)]


def _targets(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Only modules that target_modules selects get layers for their factors."""
    for one in _single(adapter):
        if one.format != "peft":
            continue
        chosen = Selection(one.config, one.path)
        parameters = tuple(one.config.get("target_parameters") or ())
        outside = [p for p, d in one.deltas.items() if not d.experts and not chosen.means(p)]
        outside = [p for p in outside if not f"{p}.weight".endswith(parameters)] if parameters else outside
        if outside:
            what = f"factors of {briefly(outside)}, which target_modules does not select, are not loaded"
            yield Issue("dropped", what, PORTABLE)


def _model(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """What becomes of the file on the very model, where that is known: layers, saved modules, tied weights."""
    for one in _single(adapter):
        config = _base_config(one, setting) if one.format == "peft" else {}
        host = Host(config, frozenset(), installed_model(config, for_task(config, one.config.get("task_type"))))
        for problem in PeftLoad(one.config, list(one.weights.tensors), host).problems():
            verdict = _VERDICTS[problem.kind]
            yield Issue(verdict, f"{briefly(list(problem.names))}: {problem.why}", MERGE)


def _base_config(adapter: Adapter, setting: Setting) -> dict[str, Any]:
    """config.json of the base: the one given, else the folder on this machine that the adapter names."""
    if setting.base is not None:
        return setting.base.config
    folder = Path(str(adapter.config.get("base_model_name_or_path") or ""))
    return load_config(folder / "config.json") if folder.is_absolute() and folder.is_dir() else {}


def _single(adapter: Adapter) -> list[Adapter]:
    """The folders that PEFT loads one by one."""
    return list(adapter.members.values()) or [adapter]


RULES: tuple[Rule, ...] = (is_folder, _keys, _targets, _init, _model)
