"""Two checkpoints side by side: which tensor of one is which of the other, and what has no partner."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.model_names.align import PairNames
from lorasurgery.adapters.model_names.fused import ExpertPlace, expert_place
from lorasurgery.adapters.model_names.naming import BaseNames, is_buffer, is_embedding, is_head, module_of
from lorasurgery.adapters.model_names.patterns import exclude_only
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, size_of, some
from lorasurgery.module_location import ModuleLocation, location_of

if TYPE_CHECKING:
    from lorasurgery.ops.extraction.options import Selection


class Sides:
    """The tensors of both by their names in memory, and what the selection means by them.

    Args:
        base: The checkpoints, of which only headers are read.
        tuned: The checkpoints, of which only headers are read.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, selection: Selection) -> None:
        self.base, self.tuned, self.selection = base, tuned, selection
        self.base_names = BaseNames(base.tensors, base.config, str(base.path))
        self.tuned_names = BaseNames(tuned.tensors, tuned.config, str(tuned.path))
        self.config = base.config | tuned.config
        self.names = PairNames.of(base, tuned)
        self.other_task = other_task(base.config, tuned.config)
        self.notes: list[str] = []

    @cached_property
    def places(self) -> dict[str, ExpertPlace]:
        """Of the experts' tensors, where they lie in the parameter that holds them in memory."""
        shapes = {m: self.base.tensors[n].shape for m, n in self.names.base.items()}
        shapes |= {m: self.tuned.tensors[n].shape for m, n in self.names.tuned.items()}
        found = {memory: expert_place(memory, shape, self.config) for memory, shape in shapes.items()}
        return {memory: place for memory, place in found.items() if place}

    def twin(self, memory: str) -> TensorInfo | None:
        """The tuned model's tensor of a name that the base has, or what stands for it."""
        name = self.names.tuned.get(memory)
        return self.tuned.tensors[name] if name is not None else self._tied(memory, self.tuned_names)

    def old(self, memory: str) -> TensorInfo | None:
        """What stands for a tensor on the base's side that only the tuned model has by name."""
        return self._tied(memory, self.base_names)

    def _tied(self, memory: str, names: BaseNames) -> TensorInfo | None:
        """A tied head has no tensor of its own: the input embedding stands for it, if the model has such a head."""
        if not memory.endswith(".weight") or (self.other_task and is_head(module_of(memory))):
            return None
        shared = names.tied_source(module_of(memory))
        return names.tensors[shared] if shared else None

    def called(self, memory: str) -> tuple[str, ...]:
        """What --exclude may call a tensor: its module, its own name, or the parameter that holds it with others."""
        path, place = module_of(memory), self.places.get(memory)
        if place is not None:
            return place.parameter, module_of(place.parameter), path
        return (path,) if memory.endswith(".weight") else (path, memory)

    @property
    def paths(self) -> set[str]:
        """All that a pattern may mean."""
        return {n for side in (self.names.base, self.names.tuned) for m in side for n in self.called(m)}

    def wants(self, memory: str) -> bool:
        """Whether --target and --exclude leave a tensor in."""
        return self._is_meant(memory, self.selection)

    def is_beside_target(self, memory: str) -> bool:
        """Whether --target is given and does not mean a tensor, whatever --exclude says of it."""
        return not self._is_meant(memory, self._targets)

    @cached_property
    def _targets(self) -> Selection:
        return replace(self.selection, exclude=())

    def _is_meant(self, memory: str, selection: Selection) -> bool:
        names = self.called(memory)
        return selection.wants(*names) if memory in self.places else selection.wants(names[0], tensor=memory)

    def odd(self) -> Odd:
        """What has no partner or another shape, is wanted, and is no matter of course."""
        odd, names = Odd(str(self.base.path), str(self.tuned.path)), self.names
        foreign = self.other_task or any(m not in names.base and is_task_head(m) for m in names.tuned)
        other_heads: list[str] = []
        for memory, name in names.base.items():
            info, twin = self.base.tensors[name], self.twin(memory)
            if twin is None and self._matters(memory, info):
                (other_heads if foreign and is_task_head(memory) else odd.missing).append(memory)
            elif twin is not None and self._is_reshaped(memory, info, twin):
                odd.reshaped[memory] = (info, twin)
        odd.new = [m for m in names.tuned if m not in names.base and self._has_no_place(m)]
        self._note(other_heads)
        odd.options = self.exclude(odd.names) if odd.names else ""
        return odd

    def unwanted(self) -> list[str]:
        """What only one side has and --target or --exclude leave out."""
        lone = [m for m in self.names.base if self.twin(m) is None]
        lone += [m for m in self.names.tuned if m not in self.names.base and self.old(m) is None]
        return [m for m in lone if not is_buffer(m) and not self.wants(m)]

    def _matters(self, memory: str, info: TensorInfo) -> bool:
        return not is_buffer(memory) and info.is_float and self.wants(memory)

    def _is_reshaped(self, memory: str, old: TensorInfo, new: TensorInfo) -> bool:
        if old.shape == new.shape or not self._matters(memory, new) or is_growth(memory, old, new):
            return False
        return not self.selection.stores(module_of(memory), memory)

    def _has_no_place(self, memory: str) -> bool:
        """Whether the base's model has nowhere to put a tensor that only the tuned one has."""
        info = self.tuned.tensors[self.names.tuned[memory]]
        if not self._matters(memory, info) or self.selection.stores(module_of(memory), memory):
            return False
        return self.old(memory) is None and (self.selection.common or not is_task_head(memory))

    def _note(self, heads: list[str]) -> None:
        if heads:
            task = task_of(self.tuned.config)
            self.notes.append(
                f"{self.tuned.path} has no {some(sorted({module_of(n) for n in heads}))}, which {self.base.path} has: "
                f"it is for another task{f' ({task})' if task else ''}, and the adapter leaves the base's as it is"
            )

    def quantized(self) -> list[str]:
        """The weights that are wanted and no floating numbers on one of the sides."""
        found = []
        for memory, name in self.names.base.items():
            twin = self.twin(memory)
            floats = twin is None or (self.base.tensors[name].is_float and twin.is_float)
            if not floats and memory.endswith(".weight") and self.wants(memory):
                found.append(memory)
        return found

    def exclude(self, names: Collection[str]) -> str:
        """The options that leave out these tensors and no others, as they are typed; "" if they would be too many."""
        meant = set(names)
        groups = {self.places[m].parameter for m in meant if m in self.places}
        modules = {module_of(m) for m in meant if m.endswith(".weight")}  # a weight is only left out with its module
        others: set[str] = set()
        for memory in {**self.names.base, **self.names.tuned}:
            place = self.places.get(memory)
            if memory not in meant and module_of(memory) not in modules and not (place and place.parameter in groups):
                others.update(self.called(memory))
        paths = {m: self.places[m].parameter if m in self.places else module_of(m) for m in meant}
        return exclude_only({m if path in others else path for m, path in paths.items()}, others)


@dataclass
class Odd:
    """Names in memory of what has no partner of the same shape, in the order on disk.

    Args:
        missing: Of the base only.
        new: Of the tuned model only.
        reshaped: name -> what both sides have.
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


def _place(name: str) -> ModuleLocation:
    return location_of(module_of(name))


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


_BODIES = re.compile(r"(?:(?:model|transformer|backbone|bert|roberta|electra|distilbert|vit|deit|esm)\.)*")
_HEAD_WORDS = re.compile(
    r"(?:.*_)?(?:heads?|classifier|cls|scores?|pooler|predictions|summary|logits|outputs|regressor)(?:_.*)?"
    r"|embed_out|output_projection|vocab_.*|pred_layer|project_(?:q|hid)|quantizer|logits_proj"
)


def is_task_head(name: str) -> bool:
    """Tell what a task puts on a model's body: a language model's head, a classifier, a pooler, a score.

    >>> [is_task_head(n) for n in ("score.weight", "bert.pooler.dense.bias", "h.2.mlp.c_fc.weight")]
    [True, True, False]
    """
    path = module_of(name)
    top = _BODIES.sub("", path, count=1).partition(".")[0]
    return is_head(path) or (location_of(path).layer is None and _HEAD_WORDS.fullmatch(top) is not None)


def task_of(config: dict[str, Any]) -> str:
    """The class of a model, as config.json has it: LlamaForCausalLM; "" when it is silent."""
    names = [a for a in config.get("architectures") or [] if isinstance(a, str)]
    return names[0] if names else ""


def other_task(base: dict[str, Any], tuned: dict[str, Any]) -> bool:
    """Whether two models of one body have heads for different tasks, by what their config.json say.

    >>> other_task({"architectures": ["BertForMaskedLM"]}, {"architectures": ["BertModel"]})
    True
    """
    first, second = task_of(base), task_of(tuned)
    return bool(first and second) and _task(first) != _task(second)


def _task(architecture: str) -> str:
    match = re.search(r"For[A-Z].*|LMHeadModel|DoubleHeadsModel|Model$", architecture)
    task = match[0] if match else architecture
    return "ForCausalLM" if task in ("LMHeadModel", "ForConditionalGeneration") else task


def is_growth(name: str, base: TensorInfo, tuned: TensorInfo) -> bool:
    """Whether a shape differs by the size of the vocabulary alone: an embedding's or an output head's rows."""
    path = module_of(name)
    if len(base.shape) == len(tuned.shape) == 1:
        return is_head(path) or path.endswith("predictions")
    table = len(base.shape) == 2 and base.shape[1:] == tuned.shape[1:]
    return table and (is_embedding(path) or is_head(path))
