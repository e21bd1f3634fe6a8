"""Which modules of several adapters belong together, settled from headers: the plan of rerank and blend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter, Delta, Kind
from lorasurgery.adapters.model_names.naming import is_embedding, is_head, module_of
from lorasurgery.checkpoint.same import same_tensors
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError, size_of
from lorasurgery.lowrank import LowRank, Update
from lorasurgery.ops.placement.block_weight import Blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One adapter's update of a module, with the strength it gets."""

    adapter: Adapter
    delta: Delta
    weight: float

    def load(self) -> LowRank:
        """The factors from disk, with scale alpha/r but not yet the weight."""
        return self.adapter.load(self.delta)

    def load_update(self) -> Update:
        """The same, or the matrix where factors would be no smaller."""
        return self.load() if self.delta.is_thin else self.adapter.load_update(self.delta)

    def load_bias(self) -> LowRank:
        """lora_B.bias as an (out, 1) update."""
        return self.adapter.load_bias(self.delta)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors on disk."""
        return self.adapter.nbytes_of(self.delta.path)


@dataclass
class Joint:
    """One module of the result: the terms that meet in it; an adapter that lacks it adds nothing."""

    path: str
    kind: Kind
    shape: tuple[int, int]
    terms: list[Term] = field(default_factory=list)
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The most that the sum can have."""
        return min(*self.shape, sum(t.delta.directions for t in self.terms))

    @property
    def is_thin(self) -> bool:
        """Whether all terms have thin factors, so that the matrix need not be formed."""
        return all(t.delta.is_thin for t in self.terms)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(t.nbytes for t in self.terms)


def join(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Joint]:
    """Bring the adapters' modules together by path, in the order they are first met.

    Raises:
        MismatchError: adapters of different formats, whose names don't meet; two adapters adapt one module in
            different shapes or kinds, or disagree on tied weights.
    """
    joints: dict[str, Joint] = {}
    other = next((a for a in adapters if a.format != adapters[0].format), None)
    if other is not None:
        raise MismatchError(
            f"{adapters[0].path} is in {adapters[0].format}'s format and {other.path} in {other.format}'s, so their "
            "modules have different names; convert one to the other's format first: lorasurgery convert"
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in adapter.deltas.items():
            _check_linear(adapter, delta)
            joint = joints.setdefault(path, Joint(path, delta.kind, delta.shape, kernel=delta.kernel))
            if joint.kernel != delta.kernel or joint.shape != delta.shape or joint.kind != delta.kind:
                first = joint.terms[0].adapter if joint.terms else adapter
                raise MismatchError(
                    f"{adapter.path}: {path} is {_kind(delta.kind, delta.shape)} but {first.path} has "
                    f"{_kind(joint.kind, joint.shape)}; adapters of different base models can't be blended"
                )
            joint.terms.append(Term(adapter, delta, weight))
    _check_tied(adapters)
    return list(joints.values())


def _check_linear(adapter: Adapter, delta: Delta) -> None:
    """What is not a sum of low-rank terms can be merged but not brought to another rank."""
    if delta.magnitude:
        raise UnsupportedError(
            f"{adapter.path}: {delta.path} is DoRA, which is not a low-rank update by itself; lorasurgery convert "
            "--portable --base BASE makes a LoRA of it"
        )
    if delta.merge_only:
        raise UnsupportedError(
            f"{adapter.path}: {delta.path} {delta.merge_only}: it can be merged but not reranked or blended"
        )


def _check_tied(adapters: Sequence[Adapter]) -> None:
    """With ensure_weight_tying the embedding's update also means the head's; one file can't mean both things."""
    touching = [a for a in adapters if any(is_embedding(p) or is_head(p) for p in a.deltas)]
    if len({a.tied for a in touching}) > 1:
        tied = next(a for a in touching if a.tied)
        free = next(a for a in touching if not a.tied)
        raise MismatchError(
            f"{tied.path} ties embedding and head (ensure_weight_tying) and {free.path} does not, so their updates "
            "of these modules mean different things; merge them one after the other"
        )


def base_models(adapters: Sequence[Adapter]) -> list[str]:
    """The different base models that the adapters name, in order."""
    named = [a.config.get("base_model_name_or_path") for a in adapters]
    return list(dict.fromkeys(n for n in named if isinstance(n, str) and n))


@dataclass(frozen=True)
class Whole:
    """A tensor stored whole by some of the adapters, and the share of each copy in the result."""

    name: str
    copies: tuple[tuple[Adapter, float], ...]

    @property
    def key(self) -> str:
        """Its name in the first adapter's file."""
        return self.copies[0][0].replaced[self.name]

    def value(self, dtype: str | None = None) -> Tensor:
        """The tensor, or the weighted mean of its copies; floating ones in `dtype` when one is given."""
        from lorasurgery.checkpoint.dtypes import torch_dtype

        (first, share), *others = self.copies
        found = first.load_replaced(self.name)
        wanted = torch_dtype(dtype) if dtype and found.is_floating_point() else found.dtype
        if others:
            found = found.float() * share
            for adapter, weight in others:
                found += adapter.load_replaced(self.name).float() * weight
        return found.to(wanted)


def whole_tensors(adapters: Sequence[Adapter], weights: Sequence[float], *, average: bool) -> Iterator[Whole]:
    """The replaced tensors of all adapters: equal ones pass, different ones are averaged when that was asked for.

    Args:
        average: Σwᵢ·Rᵢ / Σwᵢ over the adapters that hold the tensor.

    Raises:
        MismatchError: copies differ in shape, or in value without `average`.
        UsageError: the weights of the copies to average sum to 0.
    """
    for name in dict.fromkeys(n for a in adapters for n in a.replaced):
        held = [(a, w) for a, w in zip(adapters, weights, strict=True) if name in a.replaced]
        first = held[0][0]
        different = next((a for a, _ in held[1:] if not _equal(first, a, name)), None)
        if different is None:
            yield Whole(name, ((first, 1.0),))
            continue
        infos = [a.weights.tensors[a.replaced[name]] for a, _ in held]
        if len({i.shape for i in infos}) > 1 or not all(i.is_float for i in infos):
            shapes = " and ".join(f"{i.dtype} {list(i.shape)}" for i in infos[:2])
            raise MismatchError(f"{different.path}: {name} is stored whole in forms that can't be averaged: {shapes}")
        if not average:
            raise MismatchError(
                f"{first.path} and {different.path} store {name} whole with different values; "
                "--average-replaced takes their weighted mean"
            )
        total = sum(w for _, w in held)
        if total == 0:
            raise UsageError(f"the weights of the adapters that store {name} whole sum to 0, so it has no mean")
        yield Whole(name, tuple((a, w / total) for a, w in held))


def _equal(a: Adapter, b: Adapter, name: str) -> bool:
    one, two = (x.weights.tensors[x.replaced[name]] for x in (a, b))
    return same_tensors(a.weights, one, b.weights, two)


def _kind(kind: str, shape: tuple[int, int]) -> str:
    return f"a {kind} update of {size_of(shape)}"


def weigh_joints(
    joints: Sequence[Joint], given: Sequence[str], adapters: Sequence[Adapter]
) -> tuple[list[Joint], Blocks | None]:
    """The same for the terms of a blend: what is left of its modules, and the weights for its added vectors.

    Raises:
        UnsupportedError: a block weight for a tensor stored whole, which a blend takes as it is.
    """
    if not given:
        return list(joints), None
    blocks = Blocks(given, adapters)
    for joint in joints:
        weighed = [replace(t, weight=t.weight * blocks.of(t.adapter, joint.path)) for t in joint.terms]
        joint.terms = [t for t in weighed if t.weight]
    for adapter in adapters:
        for name in adapter.replaced:
            factor = blocks.of(adapter, module_of(name))
            if factor != 1:
                raise UnsupportedError(
                    f"{adapter.path}: {name} is stored whole, so a blend can't give it a block weight of {factor:g}; "
                    "merge can"
                )
    return [j for j in joints if j.terms], blocks
