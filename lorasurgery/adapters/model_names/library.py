"""What an installed library knows of a model: its skeleton on the meta device, its renames, its rules of loading.

The tool works without transformers, and a plan that finds all its names never imports it (it would import torch).
Facts: transformers 5.23, `conversion_mapping.get_checkpoint_conversion_mapping`, `WeightRenaming.rename_source_key`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorasurgery.adapters.model_names.cuts import Cut, Shapes, numbered, read_cuts
from lorasurgery.adapters.model_names.renames import model_types
from lorasurgery.adapters.model_names.skeleton import Skeleton, skeleton_from
from lorasurgery.engine.process import own_settings


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


# A config is somebody's file: numbers beyond these are no real model's, and building it would take for ever.
_MOST, _MOST_LAYERS, _MOST_EXPERTS, _MOST_LABELS = 20_000_000, 2_000, 100_000, 100_000
_FREE = ("theta", "base", "token", "_id", "scale", "max_", "factor", "length", "rate", "seed")
_COUNTS = ("layers", "blocks", "depth", "depths", "experts", "layer", "stages")  # how keys that count modules end


@dataclass(frozen=True)
class Installed:
    """A model as an installed library builds it.

    Args:
        name_of: The name in memory that the library loads a tensor on disk to; None where it has none, or where the
            tensor is cut up or joined with others on loading.
        keeps: Whether PEFT leaves a module's name in an adapter's keys as it is: it renames them as if they were the
            checkpoint's, and some rules change what is right already.
        cuts: Where the rows of each tensor on disk go that is cut up, joined or put in another order on loading, from
            all tensors' shapes; () for one that becomes something else.
    """

    skeleton: Skeleton
    name_of: Callable[[str], str | None]
    keeps: Callable[[str], bool] = lambda path: True
    cuts: Callable[[Shapes], dict[str, tuple[Cut, ...]]] = lambda shapes: {}


def installed_model(config: dict[str, Any], architecture: str | None = None) -> Installed | None:
    """The model that config.json describes; None where no installed library has its class or can build it.

    Examples:
        ```python
        installed_model({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2})
        ```

    Args:
        architecture: A class of transformers, instead of the first that the config names.
    """
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return _built(text, architecture)


@lru_cache(maxsize=8)
def _built(text: str, architecture: str | None) -> Installed | None:
    try:
        config: dict[str, Any] = json.loads(text, object_hook=_numbers)
        if not _reasonable(config):
            return None
        build = _diffusers if isinstance(config.get("_class_name"), str) else _transformers
        with _quiet():
            return build(config, architecture)
    except Exception:  # not installed, too old for this model, or a config that its class does not take
        return None


def _transformers(config: dict[str, Any], architecture: str | None) -> Installed | None:
    named = config.get("architectures") or []
    architecture = architecture or (named[0] if named and isinstance(named[0], str) else None)
    if not architecture:  # nothing to ask for, and importing the library takes seconds
        return None
    import torch
    import transformers

    known = getattr(transformers, architecture, None)
    if known is None or not issubclass(known, transformers.PreTrainedModel):
        return None
    settings = known.config_class.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
    with torch.device("meta"), torch.no_grad():
        model = known(settings)
        model.tie_weights()
    skeleton = skeleton_from(model, f"transformers {transformers.__version__}")
    return _loading(model, skeleton)


def _loading(model: Any, skeleton: Skeleton) -> Installed:
    """How from_pretrained renames and converts what it reads."""
    try:
        rules = Loading(model)
    except ImportError:  # transformers 4 renames nothing but prefixes
        return Installed(skeleton, lambda name: name if name in skeleton.names else None)
    return Installed(skeleton, rules.name_of, rules.keeps, rules.cuts)


def _diffusers(config: dict[str, Any], _: str | None) -> Installed | None:
    import diffusers
    import torch

    known = getattr(diffusers, config["_class_name"], None)
    if known is None or not issubclass(known, diffusers.ModelMixin):
        return None
    with torch.device("meta"), torch.no_grad():
        model = known.from_config(config)
    skeleton = skeleton_from(model, f"diffusers {diffusers.__version__}")
    return Installed(skeleton, lambda name: name if name in skeleton.names else None)


def _numbers(value: dict[str, Any]) -> Any:
    """Infinity and NaN, which transformers writes as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def _reasonable(value: Any, key: str = "") -> bool:
    """Whether no number in a config is beyond those of real models."""
    if isinstance(value, dict):
        return _modules(value) <= _MOST_EXPERTS and all(_reasonable(v, str(k).lower()) for k, v in value.items())
    if isinstance(value, list):
        counted = sum(v for v in value if type(v) is int) if key.endswith(_COUNTS) else 0
        return len(value) < _MOST_LAYERS * 100 and counted <= _MOST_LAYERS and all(_reasonable(v, key) for v in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return True
    if key.endswith(_COUNTS):
        return value <= _MOST_LAYERS
    if "label" in key:  # each becomes a word in memory
        return value <= _MOST_LABELS
    return value <= _MOST or any(part in key for part in _FREE)


def _modules(config: dict[str, Any]) -> int:
    """Experts in all layers together, where each may be a module of its own."""
    numbers = {str(k).lower(): v for k, v in config.items() if type(v) is int}
    layers = max((v for k, v in numbers.items() if k.endswith(("layers", "layer"))), default=1)
    return layers * max((v for k, v in numbers.items() if k.endswith("experts")), default=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say while they are imported and build is not about the user's files."""
    with own_settings():
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            warnings.simplefilter("ignore")
            yield
        finally:
            logging.disable(before)


class Loading:
    """The library's own rules for one model.

    Args:
        model: On the meta device.

    Raises:
        ImportError: transformers 4, which renames nothing but prefixes.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        steps = get_model_conversion_mapping(model)
        self.model, self._rename = model, rename_source_key
        self.renamings = [s for s in steps if isinstance(s, WeightRenaming)]
        self.converters = [s for s in steps if isinstance(s, WeightConverter)]
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def name_of(self, name: str) -> str | None:
        """The name in memory of a tensor that is loaded as it is; None for others."""
        found, pattern = self._place(name)
        return found if found in self.shapes and pattern is None else None

    def keeps(self, path: str) -> bool:
        """Whether PEFT, which renames an adapter's keys by the same rules, leaves this module's as they are."""
        key = f"{path}.lora_A.weight"
        return key.endswith(self._rename(key, self.renamings, [])[0])

    def cuts(self, shapes: Shapes) -> dict[str, tuple[Cut, ...]]:
        """Where the rows of each tensor go that is not loaded as it is; () where it becomes something else.

        Args:
            shapes: Of the tensors on disk; experts are left to the rules for experts.
        """
        by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for name in sorted(shapes, key=_natural) if by_pattern else ():
            memory, pattern = self._place(name)
            if pattern is not None and memory in self.shapes and not _is_of_experts(by_pattern[pattern]):
                groups[memory][name] = pattern
        found: dict[str, tuple[Cut, ...]] = {}
        for memory, members in groups.items():
            converter = copy.deepcopy(by_pattern[next(iter(members.values()))])
            found |= dict.fromkeys(members, ()) | self._converted(converter, memory, members, shapes)
        return found

    def _place(self, name: str) -> tuple[str, str | None]:
        """The first name in memory that a tensor is loaded to, and the pattern of the conversion on the way."""
        prefix = self.model.base_model_prefix
        found, pattern = self._rename(name, self.renamings, self.converters, prefix, self.shapes)
        if found not in self.shapes and name in self.shapes:
            found, pattern = self._rename(name, [], [], base_model_prefix=prefix, meta_state_dict=self.shapes)
        return found, pattern

    def _converted(
        self, converter: Any, memory: str, members: dict[str, str], shapes: Shapes
    ) -> dict[str, tuple[Cut, ...]]:
        own = {name: shapes[name] for name in members}
        if not all(own.values()):  # a scalar has no rows
            return {}
        numbers, owned = numbered(own)
        for name, pattern in members.items():
            converter.add_tensor(memory, name, pattern, numbers[name])
        try:
            loaded = converter.convert(memory, model=self.model, config=self.model.config)
        except Exception:  # a conversion of columns, or of more than rows
            return {}
        return read_cuts({n: v[0] if isinstance(v, list) else v for n, v in loaded.items()}, owned, own, self.shapes)


def _is_of_experts(converter: Any) -> bool:
    names = [type(op).__name__ for op in converter.operations]
    patterns = [p.replace("shared_experts", "") for p in (*converter.source_patterns, *converter.target_patterns)]
    return any("Modulelist" in n or "Experts" in n for n in names) or any("experts" in p for p in patterns)


def _natural(name: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)
