"""A model's modules by the paths they had before adapters were put on, and what may not be put there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from lorasurgery.errors import UnsupportedError, UsageError, nearest
from lorasurgery.nn.adapted import AdaptedModule
from lorasurgery.nn.linear import layer_for

# These read their layers' weights without calling the layers, always or when they may take their fast path.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path in the model as it was; where adapters are, the layer that stands there."""
    return dict(_walk(model, "", set()))


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    plain = inner(module)
    if id(plain) in seen:  # a module in two places has one path, the first, as for PEFT
        return
    seen.add(id(plain))
    yield path, module
    for name, child in plain.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def inner(module: nn.Module) -> nn.Module:
    """The module itself, without the layer around it."""
    return module.original if isinstance(module, AdaptedModule) else module


def layers_of(model: nn.Module) -> dict[str, AdaptedModule]:
    """The layers that hold adapters, by path."""
    return {path: m for path, m in modules_of(model).items() if isinstance(m, AdaptedModule)}


def layer_at(modules: dict[str, nn.Module], path: str) -> AdaptedModule:
    """The layer at a path, put around the module there if none is yet."""
    module = modules[path]
    if not isinstance(module, AdaptedModule):
        active = next((m.active for m in modules.values() if isinstance(m, AdaptedModule)), {})
        modules[path] = module = layer_for(module)
        module.active = dict(active)
        parent, _, name = path.rpartition(".")
        setattr(inner(modules[parent]), name, module)
    return module


def freeze(modules: Mapping[str, nn.Module]) -> None:
    """Freeze the model's own parameters; adapters stay as they are."""
    for module in modules.values():
        for parameter in inner(module).parameters(recurse=False):
            parameter.requires_grad_(False)


def check_new(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or that torch can't hold, and a merged model."""
    layers = layers_of(model)
    check_unmerged(layers)
    if any(name in layer.adapters for layer in layers.values()):
        raise UsageError(f"adapter {name}: the model has one of this name already; give another name")
    reserved = hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or reserved:
        raise UsageError(f"adapter name {name!r}: expected letters, digits, - and _, and no word of torch's own")


def check_known(layers: Mapping[str, AdaptedModule], name: str) -> None:
    """Refuse a name that no adapter has."""
    known = sorted({a for layer in layers.values() for a in layer.adapters})
    if name not in known:
        there = f"; there are: {', '.join(known)}" if known else "; the model has none"
        raise UsageError(f"adapter {name}: not in this model{nearest(name, known) or there}")


def check_called(modules: Mapping[str, nn.Module], path: str) -> None:
    """Refuse a layer on which factors would do nothing, because its weight is read and its forward never run."""
    parent = inner(modules[path.rpartition(".")[0]])
    if isinstance(parent, _READ_WEIGHTS):
        raise UnsupportedError(
            f"{path}: {type(parent).__name__} reads this layer's weight without calling the layer, so factors on it "
            "would do nothing; leave it out, or let `lorasurgery merge` write it into the checkpoint"
        )


def check_unmerged(layers: Mapping[str, AdaptedModule]) -> None:
    """Refuse a merged model, whose tensors hold what would be added or changed."""
    if any(layer.merged for layer in layers.values()):
        raise UsageError("the model is merged; unmerge(model) first")
