"""The skeleton of a model from the library that has its class, where that is installed: no weights, no network.

The class is taken by name from transformers or diffusers themselves, never from code beside the weights, and built on
torch's meta device, where a tensor has a shape and no bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorasurgery.adapters.cuts import Cut, Shapes
from lorasurgery.adapters.loading import Loading
from lorasurgery.adapters.skeleton import Skeleton, skeleton_from
from lorasurgery.engine.process import own_settings

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

    Example:
        installed_model({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2})

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
