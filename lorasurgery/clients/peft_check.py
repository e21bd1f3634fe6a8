"""What PEFT itself would not load, mostly in silence: peft 0.21.2, each rule run in tests/ops/test_check.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.library import installed_model
from lorasurgery.adapters.peft.patterns import Selection
from lorasurgery.adapters.peft.read import PREFIX
from lorasurgery.checkpoint.locate import load_config
from lorasurgery.clients.finding import MERGE, PORTABLE, TO_PEFT, Finding, Rule, Setting, Verdict, some
from lorasurgery.clients.host import Host
from lorasurgery.clients.peft import for_task
from lorasurgery.clients.peft_load import PeftLoad

# Inits that leave the base as it is; those that do not are refused when the adapter is opened.
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# A part of PEFT's keys that still carries the adapter's name: `lora_A.default.weight`.
_NAMED = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?!weight$|bias$)[^.]+(?:\.weight|\.bias)?$")
_DEFAULT = re.compile(r"\.default(?:\.weight|\.bias)?$")  # the name that PEFT gives an adapter, which it finds again


_VERDICTS: dict[str, Verdict] = {
    "rejected": "rejected", "dropped": "dropped", "run wrongly": "wrong", "merged wrongly": "wrong"
}  # fmt: skip


def is_folder(adapter: Adapter, _: Setting) -> Iterator[Finding]:
    """PEFT, and all that build on it, read adapter_config.json beside adapter_model.safetensors."""
    if adapter.format != "peft":
        yield Finding("rejected", f"a {adapter.format} file, where a PEFT folder is expected", TO_PEFT)


def _keys(adapter: Adapter, _: Setting) -> Iterator[Finding]:
    """set_peft_model_state_dict puts the adapter's name into each key and loads what the model then has."""
    if adapter.format != "peft":
        return
    keys = [k for a in _single(adapter) for k in a.weights.tensors]
    bare = [k for k in keys if not k.startswith(PREFIX)]
    if bare:
        yield Finding("dropped", f"keys without {PREFIX} ({some(bare)}) are not loaded", PORTABLE)
    compiled = [k for k in keys if k.startswith(f"{PREFIX}_orig_mod.")]
    if compiled:
        yield Finding("dropped", f"keys of a compiled model ({some(compiled)}) are not loaded", PORTABLE)
    named = [k for k in named_keys(adapter) if not _DEFAULT.search(k)]
    if named:
        yield Finding("dropped", f"keys that carry the adapter's name ({some(named)}) are not loaded", PORTABLE)


def _init(adapter: Adapter, _: Setting) -> Iterator[Finding]:
    """A layer is initialised before its factors are loaded, and stops at a word it doesn't know."""
    for one in _single(adapter):
        init = one.config.get("init_lora_weights", True)
        if one.format == "peft" and isinstance(init, str) and init.lower() not in INITS:
            yield Finding("rejected", f"init_lora_weights is {init!r}, which PEFT does not know", PORTABLE)


def named_keys(adapter: Adapter) -> list[str]:
    """Keys that still carry the adapter's name, which PEFT takes off when it saves."""
    return [k for a in _single(adapter) for k in a.weights.tensors if _NAMED.search(k)]


def _targets(adapter: Adapter, _: Setting) -> Iterator[Finding]:
    """Only modules that target_modules selects get layers for their factors."""
    for one in _single(adapter):
        if one.format != "peft":
            continue
        chosen = Selection(one.config, one.path)
        parameters = tuple(one.config.get("target_parameters") or ())
        outside = [p for p, d in one.deltas.items() if not d.experts and not chosen.means(p)]
        outside = [p for p in outside if not f"{p}.weight".endswith(parameters)] if parameters else outside
        if outside:
            what = f"factors of {some(outside)}, which target_modules does not select, are not loaded"
            yield Finding("dropped", what, PORTABLE)


def _model(adapter: Adapter, setting: Setting) -> Iterator[Finding]:
    """What becomes of the file on the very model, where that is known: layers, saved modules, tied weights."""
    for one in _single(adapter):
        config = _base_config(one, setting) if one.format == "peft" else {}
        host = Host(config, frozenset(), installed_model(config, for_task(config, one.config.get("task_type"))))
        for problem in PeftLoad(one.config, list(one.weights.tensors), host).problems():
            verdict = _VERDICTS[problem.kind]
            yield Finding(verdict, f"{some(list(problem.names))}: {problem.why}", MERGE)


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
