"""Which tensors of two checkpoints belong together, and what extract does with each: settled from headers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from lorasurgery.adapters.cuts import Cut
from lorasurgery.adapters.fused import ExpertPlace, expert_place
from lorasurgery.adapters.naming import (
    BaseNames,
    align_names,
    is_buffer,
    is_embedding,
    is_head,
    is_position_table,
    is_router,
    module_of,
)
from lorasurgery.adapters.patterns import PRESETS, any_match, check_patterns
from lorasurgery.adapters.renames import memory_name, model_types
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError

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
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the weight as it is decomposed: a convolution's inputs and kernel are one axis."""
        return (self.tuned.shape[0], prod(self.tuned.shape[1:])) if self.tuned.shape else (1, 1)


@dataclass(frozen=True)
class Selection:
    """--target, --exclude and --full, as the command line gives them.

    >>> Selection(exclude=("lm_head",)).wants("model.layers.0.mlp.up_proj")
    True
    """

    target: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    full: tuple[str, ...] = ("auto",)

    def wants(self, path: str) -> bool:
        """Whether --target and --exclude leave this module in."""
        return (not self.target or any_match(self.target, path)) and not any_match(self.exclude, path)

    def names(self, path: str) -> bool:
        """Whether --target means this module by name, not by a preset: convolutions are only factored on demand."""
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


def plan_pairs(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> list[Pair]:
    """Pair the tensors of two checkpoints and decide how each change would be kept.

    Raises:
        MismatchError: a tensor is missing or has another shape, and no option leaves it out.
        UsageError: a pattern matches nothing.
    """
    names = _Matcher(base, tuned, selection)
    selection.check(sorted(names.paths))
    return list(names.pairs())


class _Matcher:
    def __init__(self, base: Checkpoint, tuned: Checkpoint, selection: Selection) -> None:
        self.base, self.tuned, self.selection = base, tuned, selection
        self.base_names = BaseNames(base.tensors, base.config, str(base.path))
        self.tuned_names = BaseNames(tuned.tensors, tuned.config, str(tuned.path))
        self.base_prefix, self.tuned_prefix = align_names(set(base.tensors), set(tuned.tensors))
        self.prefix = self.base_prefix or self.tuned_prefix  # memory has the longer path, where they differ
        everything = [*map(self._from_base, base.tensors), *map(self._from_tuned, tuned.tensors)]
        self.config = base.config | tuned.config
        places = (expert_place(n, t.shape, self.config) for n, t in zip(everything, self._infos(), strict=True))
        self.paths = {module_of(n) for n in everything}
        self.paths |= {n for p in places if p for n in (p.parameter, module_of(p.parameter))}

    def _infos(self) -> list[TensorInfo]:
        return [*self.base.tensors.values(), *self.tuned.tensors.values()]

    def _from_base(self, name: str) -> str:
        return memory_name(self.tuned_prefix + name, model_types(self.base.config))

    def _from_tuned(self, name: str) -> str:
        """The in-memory name; a tuned tensor outside the shared prefix (lm_head) keeps its own."""
        return memory_name(self.base_prefix + name, model_types(self.tuned.config))

    def pairs(self) -> Iterator[Pair]:
        tuned_by_memory = {self._from_tuned(n): t for n, t in self.tuned.tensors.items()}
        for name, info in self.base.tensors.items():
            memory = self._from_base(name)
            twin = tuned_by_memory.pop(memory, None) or self._tied_twin(memory, self.tuned_names)
            if twin is not None:
                yield self._pair(name, memory, info, twin)
            elif not self._may_be_missing(memory, info):
                raise MismatchError(
                    f"{self.tuned.path}: has no {memory}, which {self.base.path} has; "
                    f"--exclude {module_of(memory)} leaves it out"
                )
        for memory, info in tuned_by_memory.items():
            twin = self._tied_twin(memory, self.base_names)
            yield self._pair(memory, memory, twin, info)

    def _tied_twin(self, memory: str, names: BaseNames) -> TensorInfo | None:
        """A tied head has no tensor of its own: the input embedding stands for it."""
        shared = names.tied_source(module_of(memory)) if memory.endswith(".weight") else None
        return names.tensors[shared] if shared else None

    def _may_be_missing(self, memory: str, info: TensorInfo) -> bool:
        return is_buffer(memory) or not info.is_float or not self.selection.wants(module_of(memory))

    def _pair(self, name: str, memory: str, base: TensorInfo | None, tuned: TensorInfo) -> Pair:
        path = module_of(memory)
        place = expert_place(memory, tuned.shape, self.config)
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
        if any(any_match(selection.exclude, n) for n in names):
            return "skipped", "--target/--exclude"
        if selection.target and not any(any_match(selection.target, n) for n in names):
            return "skipped", "--target/--exclude"
        if base is None or base.shape != tuned.shape:
            found = f"has {_size(base)}" if base else "has none of this name"
            raise MismatchError(
                f"{self.tuned.path}: {tuned.name} is {_size(tuned)} but the base {found}; --exclude experts leaves "
                "all of them out"
            )
        self._check_float(base, tuned)
        return "experts", ""

    def _treatment(self, memory: str, path: str, base: TensorInfo | None, tuned: TensorInfo) -> tuple[Treatment, str]:
        selection = self.selection
        if any_match(selection.full_patterns, path) or any_match(selection.full_patterns, memory):
            return "full", "--full"
        if not selection.wants(path):
            return "skipped", "--target/--exclude"
        whole: Treatment = "full" if "auto" in selection.full else "left out"
        if base is None:
            return whole, "new in the tuned model"
        if base.shape != tuned.shape:
            self._check_growth(path, base, tuned)
            return whole, f"shape changed from {_size(base)} to {_size(tuned)}"
        if len(base.shape) in (3, 4, 5) and memory.endswith(".weight") and selection.names(path):
            self._check_float(base, tuned)
            return "conv", ""
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

    def _check_growth(self, path: str, base: TensorInfo, tuned: TensorInfo) -> None:
        table = len(base.shape) == 2 and base.shape[1:] == tuned.shape[1:]
        if not (table and (is_embedding(path) or is_head(path))):
            raise MismatchError(
                f"{self.tuned.path}: {tuned.name} is {_size(tuned)} but the base has {_size(base)}; "
                f"--exclude {path.rpartition('.')[2]} leaves it out"
            )

    def _check_float(self, base: TensorInfo, tuned: TensorInfo) -> None:
        for info, where in ((base, self.base.path), (tuned, self.tuned.path)):
            if not info.is_float:
                raise UnsupportedError(
                    f"{where}: {info.name} is {info.dtype}, a quantized weight; dequantize the checkpoint first, "
                    f"or leave it out with --exclude"
                )


def _size(info: TensorInfo) -> str:
    return "×".join(map(str, info.shape)) or "a scalar"
