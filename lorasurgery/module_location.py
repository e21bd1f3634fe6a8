"""Where a module stands in its network, read from its name alone: which stack, which layer, which kind of module."""

from __future__ import annotations

from dataclasses import dataclass

_DIGITS = 6  # of a layer's number: more are something else, and a range up to it would fill the memory


@dataclass(frozen=True)
class ModuleLocation:
    """A module's place.

    Args:
        stack: What holds the layers, such as `model.layers`; empty for what stands outside of them.
        layer: Which one, from 0; None outside.
        kind: The rest of the name, alike in every layer: `mlp.up_proj`. Further numbers (experts) are `*`.
    """

    stack: str
    layer: int | None
    kind: str


def location_of(name: str) -> ModuleLocation:
    """The place of a module by its path: the first number in it counts the layers.

    >>> location_of("model.layers.9.mlp.up_proj")
    ModuleLocation(stack='model.layers', layer=9, kind='mlp.up_proj')
    >>> location_of("model.layers.0.mlp.experts.3.w1").kind, location_of("lm_head")
    ('mlp.experts.*.w1', ModuleLocation(stack='', layer=None, kind='lm_head'))
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) <= _DIGITS), None)
    if first is None or first == len(parts) - 1:  # `net.2` is a module of a sequence, not a layer of many parts
        return ModuleLocation("", None, name)
    kind = ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return ModuleLocation(".".join(parts[:first]), int(parts[first]), kind)
