"""What two checkpoints differ in besides values: layers, tensors that one side lacks, shapes. All refused at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lorasurgery.adapters.naming import module_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.errors import MismatchError, some
from lorasurgery.ops.edits import size_of
from lorasurgery.places import Place, place_of


@dataclass
class Odd:
    """Names in memory of what has no partner of the same shape, in the order on disk.

    Args:
        missing: Of the base only. new: Of the tuned model only. reshaped: name -> what both sides have.
        options: Those that leave out all of it and nothing else; "" if they would be too many.
    """

    base: str
    tuned: str
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)
    options: str = ""

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.missing, *self.new, *self.reshaped]

    def words(self) -> str:
        """What is odd, with counts and the first few names."""
        found = []
        if self.missing:
            found.append(f"lacks {_tensors(self.missing)} of {self.base} ({some(self.missing)})")
        if self.new:
            found.append(f"has {_tensors(self.new)} that {self.base} lacks ({some(self.new)})")
        if self.reshaped:
            shapes = [
                f"{new.name} is {size_of(new.shape)} but the base has {size_of(old.shape)}"
                for old, new in self.reshaped.values()
            ]
            found.append(f"has {_tensors(self.reshaped)} of another shape ({some(shapes)})")
        return ", ".join(found)

    def refuse(self) -> None:
        """Raise for all of them at once.

        Raises:
            MismatchError: with the options that leave out these tensors and nothing else.
        """
        if self.names:
            them = "it" if len(self.names) == 1 else "them"
            way = f"{self.options} leaves {them} out, " if self.options else ""
            raise MismatchError(f"{self.tuned}: {self.words()}; {way}--common takes what both have")


def refuse_strangers(base: Collection[str], tuned: Collection[str], odd: Odd) -> None:
    """Refuse two models of which no tensor is called the same.

    Raises:
        MismatchError: with a name of each.
    """
    if odd.names and not set(base) & set(tuned):
        raise MismatchError(
            f"{odd.tuned}: no tensor of it has a name of {odd.base} (here {next(iter(tuned))}, there "
            f"{next(iter(base))}); is this a fine-tune of that base, saved in the same format?"
        )


def _tensors(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def refuse_layers(
    odd: Odd, base: Collection[str], tuned: Collection[str], configs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Refuse a model of more or fewer layers than the base has.

    Raises:
        MismatchError: with both counts of each stack that differs.
    """
    layers = [_layers(side) for side in (base, tuned)]
    lone = {(p.stack, p.layer) for p in map(_place, (*odd.missing, *odd.new)) if p.layer is not None}
    declared = _declared(configs)
    found = []
    for stack in sorted({s for s, _ in lone}):
        old, new = layers[0].get(stack, {}), layers[1].get(stack, {})
        extra = {n for s, n in lone if s == stack and (n in old) != (n in new)}
        if old and new and any(_is_layer(n, old, new, declared) for n in extra):
            numbers = f"{stack}.{min(new)}" + (f" to {max(new)}" if len(new) > 1 else "")
            found.append(f"{len(new)} layer{'s' if len(new) > 1 else ''} ({numbers}) where {odd.base} has {len(old)}")
    if found:
        raise MismatchError(
            f"{odd.tuned}: has {', '.join(found)}; a LoRA changes the weights of layers that are there, it adds and "
            "removes none: extract against the model that this one was tuned from, or --common compares the layers of "
            "the same number"
        )


def _place(name: str) -> Place:
    return place_of(module_of(name))


def _layers(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Stack -> layer -> the kinds of modules in it."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for place in map(_place, names):
        if place.layer is not None:
            found[place.stack][place.layer].add(place.kind)
    return found


def _is_layer(number: int, old: dict[int, set[str]], new: dict[int, set[str]], declared: int | None) -> bool:
    """Whether a number on one side is a layer like the others; a layer that predicts further tokens is not.

    Such a layer has modules of its own (eh_proj), or comes after as many layers as both config.json say there are.
    """
    if declared is not None and number >= declared:
        return False
    both = old.keys() & new.keys()
    known = {kind for n in both for kind in old[n] | new[n]}
    return (old.get(number) or new[number]) <= known


def _declared(configs: Iterable[dict[str, Any]]) -> int | None:
    """num_hidden_layers, where both config.json say the same."""
    found = set()
    for config in configs:
        text = config.get("text_config")
        sources = (config, text if isinstance(text, dict) else {})
        found.add(next((c["num_hidden_layers"] for c in sources if isinstance(c.get("num_hidden_layers"), int)), None))
    return found.pop() if len(found) == 1 else None
