"""transformers' own table of renames as a last resort: asked only when a path would otherwise be an error.

The tool works without transformers, and a plan that finds all its names never imports it (it would import torch).
Facts: transformers 5.23, `conversion_mapping.get_checkpoint_conversion_mapping`, `WeightRenaming.rename_source_key`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from lorasurgery.adapters.cuts import Cut, Shapes
from lorasurgery.adapters.installed import installed_model
from lorasurgery.adapters.renames import model_types


def library_names(tensors: Shapes, config: dict[str, Any]) -> dict[str, list[str]]:
    """Name in memory -> tensors on disk, by the renames that transformers would apply on loading; {} without it.

    What it says is a proposal: a caller takes it only where the shape fits too.

    Args:
        tensors: The names on disk, with shapes.
        config: config.json, whose architectures and model types pick the renames.
    """
    found: dict[str, list[str]] = defaultdict(list)
    model = installed_model(config)
    converted: Mapping[str, tuple[Cut, ...]] = model.cuts(tensors) if model is not None else {}
    names = [name for name in tensors if name not in converted]  # a new name alone would not be right for them
    for name in names if model is not None else ():
        memory = model.name_of(name) if model is not None else None
        if memory and memory != name:
            found[memory].append(name)
    for rules in _rules(config):
        for name in names:
            memory = _renamed(name, rules)
            if memory != name and name not in found[memory]:
                found[memory].append(name)
    return {memory: disk for memory, disk in found.items() if disk}


def library_cuts(tensors: Shapes, config: dict[str, Any]) -> dict[str, list[tuple[str, Cut]]]:
    """Name in memory -> the tensors on disk that it is cut from or joined from, top to bottom; {} without the library.

    Args:
        tensors: The names on disk, with shapes.
    """
    model, found = installed_model(config), defaultdict(list)
    for name, cuts in model.cuts(tensors).items() if model is not None else ():
        for cut in cuts:
            found[cut.memory].append((name, cut))
    return {memory: sorted(parts, key=lambda p: p[1].into.start) for memory, parts in found.items()}


def _rules(config: dict[str, Any]) -> list[list[Any]]:
    """Several lists to try: the whole model's renames, then also those of its parts, wherever in it they lie."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except Exception:  # not installed, too old, or broken: then there is no last resort
        return []
    lookup: Callable[[str], list[Any] | None] = get_checkpoint_conversion_mapping
    architectures = [a for a in config.get("architectures") or [] if isinstance(a, str)]
    kind = str(config.get("model_type"))
    parts = sorted(model_types(config) - {kind})
    bodies = [a.partition("For")[0] + "Model" for a in architectures if "For" in a]
    whole = next((k for k in (*architectures, kind) if lookup(k)), kind)
    tries = [[whole], [whole, *parts], [whole, *bodies, *parts], [kind], parts]
    found = []
    for keys in tries:
        steps = [step for key in keys for step in lookup(key) or []]
        found.append([s for s in steps if isinstance(s, WeightRenaming)])
    return found


def _renamed(name: str, rules: list[Any]) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name
