"""Which tensors of two checkpoints belong together, and what extract does with each: settled from headers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from lorasurgery.adapters.cuts import Cut
from lorasurgery.adapters.fused import ExpertPlace
from lorasurgery.adapters.image_models import class_of, is_convolution, is_image_model, is_own_layer, not_factored
from lorasurgery.adapters.naming import is_buffer, is_embedding, is_position_table, is_router, module_of
from lorasurgery.adapters.patterns import PRESETS, any_match, check_patterns
from lorasurgery.checkpoint.header import FLOAT_DTYPES, TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import UnsupportedError, UsageError
from lorasurgery.ops.edits import size_of
from lorasurgery.ops.pair_odd import refuse_layers, refuse_strangers
from lorasurgery.ops.pair_sides import Sides

Treatment = Literal["linear", "conv1d", "embedding", "conv", "experts", "full", "left out", "skipped"]
FACTORED: tuple[Treatment, ...] = ("linear", "conv1d", "embedding", "conv", "experts")


@dataclass(frozen=True)
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
class Selection:
    """--target, --exclude, --full and --common, as the command line gives them.

    >>> Selection(exclude=("lm_head",)).wants("model.layers.0.mlp.up_proj")
    True
    """

    target: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    full: tuple[str, ...] = ("auto",)
    common: bool = False

    def wants(self, *paths: str, tensor: str = "") -> bool:
        """Whether --target and --exclude leave a module in, by any of its paths or by its tensor's whole name."""

        def meant(patterns: Sequence[str]) -> bool:
            by_name = [p for p in patterns if p not in PRESETS] if tensor and not tensor.endswith(".weight") else []
            return any(any_match(patterns, p) for p in paths) or any_match(by_name, tensor)

        return (not self.target or meant(self.target)) and not meant(self.exclude)

    def stores(self, *names: str) -> bool:
        """Whether --full means one of these names by a pattern."""
        return any(any_match(self.full_patterns, n) for n in names)

    def names(self, path: str) -> bool:
        """Whether --target means this module by name, not by a preset: so only are a language model's convolutions."""
        return any_match([t for t in self.target if t not in PRESETS], path)

    @property
    def full_patterns(self) -> tuple[str, ...]:
        """The patterns among --full, without the words auto and none."""
        return tuple(f for f in self.full if f not in ("auto", "none"))

    def check(self, paths: Sequence[str]) -> None:
        """Raise UsageError for patterns that mean nothing, with the nearest names."""
        if "none" in self.full and len(self.full) > 1:
            raise UsageError("--full none contradicts the other --full; give one of them")
        check_patterns("--target", self.target, paths)
        check_patterns("--exclude", self.exclude, paths)
        check_patterns("--full", self.full_patterns, paths)


@dataclass(frozen=True)
class Matched:
    """The pairs of two checkpoints, and in words what has no partner and is no error.

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
