"""Which tensors of two checkpoints belong together, and what extract does with each: settled from headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from lorasurgery.adapters.image_names.components import (
    class_of,
    is_convolution,
    is_image_model,
    is_own_layer,
    not_factored,
)
from lorasurgery.adapters.model_names.cuts import Cut
from lorasurgery.adapters.model_names.fused import ExpertPlace, is_turned
from lorasurgery.adapters.model_names.naming import is_buffer, is_embedding, is_position_table, is_router, module_of
from lorasurgery.adapters.model_names.patterns import any_match
from lorasurgery.checkpoint.header import FLOAT_DTYPES, TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError, size_of
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.extraction.sides import Sides, refuse_layers, refuse_strangers

Treatment = Literal["linear", "conv1d", "embedding", "conv", "experts", "full", "left out", "skipped"]
FACTORED: tuple[Treatment, ...] = ("linear", "conv1d", "embedding", "conv", "experts")


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in both checkpoints (`base` is None when it is new) and how its change is kept.

    Args:
        name: The tensor's name in the base (in the tuned checkpoint when it is new or was tied).
        path: Module path in memory, as PEFT names it.
        why: For what is left out or stored whole against expectation, the reason in a few words.
        place: Where the tensor lies in a parameter that holds all experts in memory.
        leaf: The last part of the tensor's name in memory: weight, bias, or a parameter of its own.
        count: How many matrices of this size there are (experts).
        called: Module path as --target, --exclude and --full have it, where the path in memory is another.
        cuts: Where its rows go in memory, for one that is cut up, joined or put in another order on loading; its path
            is then that on disk.
    """

    name: str
    path: str
    base: TensorInfo | None
    tuned: TensorInfo
    treatment: Treatment
    why: str = ""
    place: ExpertPlace | None = None
    leaf: str = "weight"
    count: int = 1
    called: str = ""
    cuts: tuple[Cut, ...] = ()

    @property
    def tensors(self) -> tuple[Pair, ...]:
        """The tensors on disk that are taken together: this one."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tuned side."""
        return sum(p.tuned.nbytes for p in self.tensors)

    @property
    def is_comparable(self) -> bool:
        """Whether both sides are floating numbers of one shape, so that ‖ΔW‖ can be told."""
        base = self.base
        return base is not None and base.shape == self.tuned.shape and {base.dtype, self.tuned.dtype} <= FLOAT_DTYPES

    @property
    def is_measured(self) -> bool:
        """Whether its change is looked at though it is left out: what --target does not mean is not even read."""
        return self.is_comparable and self.why != "--target"

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the weight as it is decomposed: a convolution's inputs and kernel are one axis."""
        return prod(self.tuned.shape[:1]), prod(self.tuned.shape[1:])  # of a scalar 1 × 1


@dataclass(frozen=True)
class Matched:
    """The pairs of two checkpoints, and in words what has no partner and is not an error.

    Args:
        notes: For the report's warnings.
        lone: How many tensors only one side has, which --target, --exclude or --common leave out.
    """

    pairs: list[Pair]
    notes: list[str]
    lone: int = 0


def plan_pairs(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> list[Pair]:
    """The pairs of `match_pairs` alone."""
    return match_pairs(base, tuned, selection).pairs


def match_pairs(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> Matched:
    """Pair the tensors of two checkpoints and decide how each change would be kept.

    Raises:
        MismatchError: layers or tensors are missing or have other shapes, and no option leaves them out.
        UsageError: a pattern matches nothing.
    """
    sides = Sides(base, tuned, selection)
    selection.check(sorted(sides.paths))
    odd = sides.odd()
    refuse_strangers(sides.names.base, sides.names.tuned, odd)
    if selection.common and odd.names:
        sides.notes.append(f"--common: {odd.tuned} {odd.words()}; left out of the adapter")
    elif odd.names:
        refuse_layers(odd, sides.names.base, sides.names.tuned, (base.config, tuned.config))
        odd.refuse()
    lone = len(sides.unwanted()) + len(odd.missing) + len(odd.new)
    return Matched(list(_Matcher(sides, set(odd.names)).pairs()), sides.notes, lone)


class _Matcher:
    """Makes the pairs, without what is left out; of experts held as one parameter, none where one of them is."""

    def __init__(self, sides: Sides, left_out: set[str]) -> None:
        self.sides, self.left_out = sides, left_out
        self.base, self.tuned, self.selection = sides.base, sides.tuned, sides.selection
        self.base_names, self.config = sides.base_names, sides.config
        self.is_image = is_image_model(self.base) or is_image_model(self.tuned)
        self.groups = {sides.places[m].parameter for m in left_out if m in sides.places}

    def pairs(self) -> Iterator[Pair]:
        for memory, name in self.sides.names.base.items():
            twin = self.sides.twin(memory)
            if twin is None:
                continue
            if self._is_left_out(memory):
                leaf = memory.rpartition(".")[2]
                yield Pair(name, module_of(memory), self.base.tensors[name], twin, "skipped", "--common", leaf=leaf)
            else:
                yield self._pair(name, memory, self.base.tensors[name], twin)
        for memory, name in self.sides.names.tuned.items():
            if not (memory in self.sides.names.base or self._is_left_out(memory) or is_buffer(memory)):
                yield self._pair(memory, memory, self.sides.old(memory), self.tuned.tensors[name])

    def _is_left_out(self, memory: str) -> bool:
        place = self.sides.places.get(memory)
        return memory in self.left_out or (place is not None and place.parameter in self.groups)

    def _pair(self, name: str, memory: str, base: TensorInfo | None, tuned: TensorInfo) -> Pair:
        path = module_of(memory)
        place = self.sides.places.get(memory)
        if place is not None:
            treatment, why = self._expert_treatment(memory, place, base, tuned)
        else:
            treatment, why = self._treatment(memory, path, base, tuned)
        return Pair(name, path, base, tuned, treatment, why, place, memory.rpartition(".")[2])

    def _expert_treatment(
        self, memory: str, place: ExpertPlace, base: TensorInfo | None, tuned: TensorInfo
    ) -> tuple[Treatment, str]:
        """Experts go by the names of their module, of the parameter in it, and of their own matrix."""
        names, selection = (place.parameter, module_of(place.parameter), module_of(memory)), self.selection
        if any(any_match(selection.full_patterns, n) for n in names):
            if place.expert is not None:
                raise UsageError(
                    f"--full on {memory}: PEFT holds the experts as one parameter, {place.parameter}, which is not "
                    "on disk; leave it to factors, or --exclude it"
                )
            return "full", "--full"
        if selection.target and not any(any_match(selection.target, n) for n in names):
            return "skipped", "--target"
        if any(any_match(selection.exclude, n) for n in names):
            return "skipped", "--exclude"
        assert base is not None and base.shape == tuned.shape  # or it would have been odd
        self._check_float(base, tuned)
        return "experts", ""

    def _treatment(self, memory: str, path: str, base: TensorInfo | None, tuned: TensorInfo) -> tuple[Treatment, str]:
        selection = self.selection
        if any_match(selection.full_patterns, path) or any_match(selection.full_patterns, memory):
            return "full", "--full"
        if not self.sides.wants(memory):
            return "skipped", "--target" if self.sides.is_beside_target(memory) else "--exclude"
        whole: Treatment = "full" if "auto" in selection.full else "left out"
        if base is None:
            return whole, "new in the tuned model"
        if base.shape != tuned.shape:
            return whole, f"shape changed from {size_of(base.shape)} to {size_of(tuned.shape)}"
        if is_own_layer(class_of(self.config), path, base.shape):
            return whole, "a layer of the model's own, which PEFT has no LoRA for"
        if is_convolution(memory, base.shape) and (self.is_image or selection.names(path)):
            self._check_float(base, tuned)
            bias = self.tuned.tensors.get(f"{tuned.name.removesuffix('weight')}bias")
            why = not_factored(base.shape, bias.shape if bias else None)
            return (whole, why) if why else ("conv", "")
        if len(base.shape) != 2 or not memory.endswith(".weight"):
            return whole, ""
        self._check_float(base, tuned)
        if is_position_table(path):
            return whole, "a position table looked up with an offset, which no LoRA can follow"
        if is_router(path):
            return whole, "a router, which PEFT has no LoRA for"
        if is_embedding(path):
            return "embedding", ""
        return ("conv1d" if self.base_names.is_conv1d(path) else "linear"), ""

    def _check_float(self, base: TensorInfo, tuned: TensorInfo) -> None:
        for info, where in ((base, self.base.path), (tuned, self.tuned.path)):
            if not info.is_float:
                options = self.sides.exclude(self.sides.quantized())
                way = f", or leave out all such weights with {options}" if options else ""
                raise UnsupportedError(
                    f"{where}: {info.name} is {info.dtype}, a quantized weight; dequantize the checkpoint first{way}"
                )


@dataclass(frozen=True, slots=True)
class ExpertPair(Pair):
    """All experts of one parameter; `base` and `tuned` are its first tensor's, `name` is what messages call it.

    Args:
        members: The one three-dimensional tensor, or each expert's matrices in order (gate before up).
        turned: The tensor is stored (experts, in, out).
    """

    members: tuple[Pair, ...] = ()
    turned: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether one tensor holds all experts."""
        return len(self.tuned.shape) == 3

    @property
    def tensors(self) -> tuple[Pair, ...]:
        """The tensors on disk."""
        return self.members

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one expert as PEFT holds it."""
        shape = self.tuned.shape
        if self.is_stack:
            return (shape[2], shape[1]) if self.turned else (shape[1], shape[2])
        return shape[0] * (len(self.members) // self.count), shape[1]

    def of(self, expert: int) -> tuple[Pair, ...]:
        """The tensors that one expert's matrix is made of, from top to bottom."""
        if self.is_stack:
            return self.members
        parts = len(self.members) // self.count
        return self.members[expert * parts : (expert + 1) * parts]


def group_experts(pairs: Sequence[Pair], config: dict[str, Any]) -> list[Pair]:
    """Put the tensors of each fused parameter together, in the place of the first of them.

    Raises:
        UsageError: --target or --exclude mean some of a parameter's tensors only.
        MismatchError: an expert is missing, or has another shape than the others.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.place is not None and pair.treatment in ("experts", "skipped"):
            groups[pair.place.parameter].append(pair)
    found: list[Pair] = []
    done: set[str] = set()
    for pair in pairs:
        if pair.place is None or pair.treatment != "experts":
            found.append(pair)
        elif pair.place.parameter not in done:
            done.add(pair.place.parameter)
            found.append(_group(pair.place.parameter, groups[pair.place.parameter], config))
    return found


def _group(parameter: str, members: list[Pair], config: dict[str, Any]) -> ExpertPair:
    left_out = [m for m in members if m.treatment == "skipped"]
    if left_out:
        raise UsageError(
            f"--target/--exclude leave out {left_out[0].path}, which is a part of {parameter}: PEFT holds its "
            f"{len(members)} matrices as one parameter, so name {parameter.rpartition('.')[2]} instead"
        )
    first = members[0]
    assert first.place is not None
    if first.place.expert is None:
        turned = is_turned(parameter, first.tuned.shape, config)
        return _pair(first.name, parameter, [first], first.tuned.shape[0], turned)
    ordered = sorted(members, key=lambda m: (m.place.expert, m.place.part) if m.place else ())
    count = 1 + max(m.place.expert or 0 for m in members if m.place)
    _check_complete(parameter, ordered, count, first.place.parts)
    return _pair(parameter, parameter, ordered, count, False)


def _check_complete(parameter: str, ordered: list[Pair], count: int, parts: int) -> None:
    places = [(m.place.expert, m.place.part) for m in ordered if m.place]
    missing = sorted(set(_places(count, parts)) - set(places))
    shapes = {m.tuned.shape for m in ordered}
    if missing or len(shapes) > 1:
        what = f"expert {missing[0][0]} is incomplete" if missing else f"its experts' shapes differ: {sorted(shapes)}"
        raise MismatchError(f"{parameter}: {what}, so they are not one parameter; --exclude {parameter} leaves it out")


def _places(count: int, parts: int) -> Iterable[tuple[int, int]]:
    return ((e, p) for e in range(count) for p in range(parts))


def _pair(name: str, parameter: str, members: list[Pair], count: int, turned: bool) -> ExpertPair:
    first = members[0]
    return ExpertPair(
        name, parameter, first.base, first.tuned, "experts", count=count, members=tuple(members), turned=turned
    )
