"""The kinds of update in adapter files without a config: LoRA, LoCon's core, LoHa, LoKr and whole differences.

A class for each (LyCORIS, arXiv:2309.14859): how it is read from a module's tensors, and what matrix it means. `KINDS`
is the table that keys and files are read by.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.adapters.deltas import Delta, Lora
from lorasurgery.adapters.single_file.stored import StoredModule
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, size_of
from lorasurgery.lowrank import Dense, LowRank, Update, widened

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


def read_lora(module: StoredModule) -> Lora | Tucker:
    """Read factors from their headers, with a core between them or without."""
    module.expect(("down", "up"), ("mid", "alpha", "bias", "dora_scale", "magnitude"))
    down, up = module.shape("down"), module.shape("up")
    core = module.shape("mid") if "mid" in module.parts else ()
    if core and (len(core) < 3 or core[0] != up[1] or core[1] != down[0] or math.prod(down[2:]) != 1):
        raise module.mismatch("lora_mid", core, (up[1], down[0]))
    if not core and up[1] != down[0]:
        raise MismatchError(
            f"{module.where}: {module.path}: lora_down is {size_of(down)} but lora_up is {size_of(up)}; "
            "their ranks must agree"
        )
    module.check_no_kernel("up", up)
    kernel = core[2:] if core else down[2:]
    flat = (up[0], down[1] * math.prod(kernel))
    alpha, scale = module.scaling(down[0])
    magnitude, bias = module.magnitude(flat), module.parts.get("bias")
    if core:
        return Tucker(
            path=module.path, shape=flat, rank=down[0], alpha=alpha, scale=scale, kernel=kernel, bias=bias,
            magnitude=magnitude, parts={part: module.parts[part] for part in ("up", "mid", "down")},
        )  # fmt: skip
    return Lora(
        path=module.path, shape=flat, rank=down[0], alpha=alpha, scale=scale, kernel=kernel, bias=bias,
        magnitude=magnitude, down=module.parts["down"], up=module.parts["up"],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Product(Delta):
    """An update whose factors are computed from the file's tensors, in float32 or wider.

    Args:
        parts: The tensors' names by part, e.g. `hada_w1_a`.
    """

    parts: dict[str, str] = field(hash=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parts."""
        return tuple(self.parts.values())

    def prefixed(self, prefix: str) -> Self:
        """The same update, where the module's path and the file's names have a prefix."""
        return replace(super().prefixed(prefix), parts={part: prefix + name for part, name in self.parts.items()})

    def load(self, weights: Checkpoint) -> LowRank:
        """Compute the exact factors, on the CPU."""
        return self.factors(self.read_parts(weights)).times(self.scale)

    def read_parts(self, weights: Checkpoint) -> dict[str, Tensor]:
        """Read the tensors by part, all in the widest of their dtypes, float32 at least."""
        import torch

        found = {part: weights.read(name) for part, name in self.parts.items()}
        wide = functools.reduce(torch.promote_types, (widened(t.dtype) for t in found.values()))
        return {part: t.to(wide) for part, t in found.items()}

    @abstractmethod
    def factors(self, parts: dict[str, Tensor]) -> LowRank:
        """The product as factors, without the scale."""


class Tucker(Product):
    """LoCon with a core: up · core · down, a convolution's kernel in the core."""

    form = "tucker"
    title = "LoCon"
    special = "LoCon's core"

    def factors(self, parts: dict[str, Tensor]) -> LowRank:
        """Multiply the core into the down factor."""
        from lorasurgery.linalg.forms import tucker

        return LowRank(parts["up"].flatten(1), tucker(parts["mid"], parts["down"]))


@dataclass(frozen=True, kw_only=True)
class WideProduct(Product):
    """A product that may have more directions than its rank says, so that the matrix itself is the cheaper form.

    Args:
        width: Directions of the exact factors.
    """

    width: int

    @property
    def directions(self) -> int:
        """How many directions the exact factors have."""
        return self.width

    @property
    def is_thin(self) -> bool:
        """Whether the exact factors are much smaller than the matrix, so that it need not be formed."""
        return 2 * self.width <= min(self.shape)

    def load_update(self, weights: Checkpoint) -> Update:
        """Compute the matrix."""
        return Dense(self.matrix(self.read_parts(weights)), self.scale)

    @abstractmethod
    def matrix(self, parts: dict[str, Tensor]) -> Tensor:
        """The product as a matrix (out, in·kernel), without the scale."""


class Hadamard(WideProduct):
    """LoHa: (B₁A₁) ∘ (B₂A₂), each half with a Tucker core or without."""

    form = "hadamard"
    title = special = "LoHa"
    endings = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    @classmethod
    def read(cls, module: StoredModule) -> Self:
        """Read the kind from headers."""
        cores = {"hada_t1", "hada_t2"}
        module.expect(set(cls.endings) - (set() if cores & set(module.parts) else cores), ("alpha", "dora_scale"))
        one, two = (_half_shape(module, *names) for names in _HALVES)
        if one[0] != two[0]:
            raise module.mismatch("the two halves of LoHa", two[0], one[0])
        ranks = [module.shape(f"hada_w{i}_b")[0] for i in (1, 2)]
        alpha, scale = module.scaling(ranks[0])
        return cls(
            path=module.path, shape=one[0], rank=ranks[0], alpha=alpha, scale=scale, kernel=one[1],
            magnitude=module.magnitude(one[0]), parts=_own(module), width=math.prod(ranks),
        )  # fmt: skip

    def factors(self, parts: dict[str, Tensor]) -> LowRank:
        """Factors of rank r₁·r₂."""
        from lorasurgery.linalg.forms import hadamard_factors

        return hadamard_factors(*(_half(parts, *names) for names in _HALVES))

    def matrix(self, parts: dict[str, Tensor]) -> Tensor:
        """The entrywise product of the two halves."""
        from lorasurgery.linalg.forms import hadamard

        return hadamard(*(_half(parts, *names) for names in _HALVES))


_HALVES = tuple((f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))


class Kronecker(WideProduct):
    """LoKr: w₁ ⊗ w₂, each side whole or a product of its own; a convolution's kernel is in the second."""

    form = "kronecker"
    title = special = "LoKr"
    endings = (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )  # fmt: skip

    @classmethod
    def read(cls, module: StoredModule) -> Self:
        """Read the kind from headers."""
        sides: list[tuple[int, int]] = []
        kernel: tuple[int, ...] = ()
        rank, width = None, 1
        for i in (1, 2):
            flat, own, inner = _side_shape(module, i)
            sides.append(flat)
            kernel, rank = own or kernel, inner or rank
            width *= min(*flat, inner) if inner else min(flat)
        flat = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
        module.expect((), ("alpha", "dora_scale", *cls.endings))
        # where both sides are whole, LyCORIS sets the scale to 1, whatever alpha says
        alpha, scale = module.scaling(rank) if rank else (min(flat), 1.0)
        return cls(
            path=module.path, shape=flat, rank=rank or min(flat), alpha=alpha, scale=scale, kernel=kernel,
            magnitude=module.magnitude(flat), parts=_own(module), width=width,
        )  # fmt: skip

    def factors(self, parts: dict[str, Tensor]) -> LowRank:
        """The factors of its two sides' SVDs."""
        from lorasurgery.linalg.forms import kronecker_factors

        return kronecker_factors(_side(parts, 1), _side(parts, 2))

    def matrix(self, parts: dict[str, Tensor]) -> Tensor:
        """The Kronecker product of the two sides."""
        from lorasurgery.linalg.forms import kronecker

        return kronecker(_side(parts, 1), _side(parts, 2))


class Difference(WideProduct):
    """A whole difference of a matrix or a kernel; its strength is all the scale it has."""

    form = "full"
    title = special = "whole differences"
    endings = ("diff",)

    @classmethod
    def read(cls, module: StoredModule) -> Self:
        """Read the kind from headers."""
        module.expect(cls.endings, ("alpha",))
        shape = module.shape("diff")
        flat = (shape[0], math.prod(shape[1:]))
        return cls(
            path=module.path, shape=flat, rank=min(flat), alpha=float(min(flat)), scale=1.0, kernel=shape[2:],
            parts=_own(module), width=min(flat),
        )  # fmt: skip

    def factors(self, parts: dict[str, Tensor]) -> LowRank:
        """The difference itself and the identity, on its shorter side."""
        import torch

        whole = self.matrix(parts)
        rows, columns = whole.shape
        if rows <= columns:
            return LowRank(torch.eye(rows, dtype=whole.dtype), whole)
        return LowRank(whole, torch.eye(columns, dtype=whole.dtype))

    def matrix(self, parts: dict[str, Tensor]) -> Tensor:
        """The difference, a kernel flattened."""
        return parts["diff"].flatten(1)


KINDS: tuple[tuple[tuple[str, ...], Callable[[StoredModule], Delta]], ...] = (
    (("down", "up"), read_lora),
    (Hadamard.endings, Hadamard.read),
    (Kronecker.endings, Kronecker.read),
    (Difference.endings, Difference.read),
)
"""The parts that tell a kind, and what reads it."""


def read_delta(module: StoredModule) -> Delta:
    """Read a module's update by the first kind that any of its parts belongs to.

    Raises:
        FormatError: parts are missing or one too many.
        MismatchError: shapes that contradict each other.
        UnsupportedError: alpha is unknown, or a shape that no factor has.
    """
    found = (read for parts, read in KINDS if not module.parts.keys().isdisjoint(parts))
    return next(found, Difference.read)(module)


def _own(module: StoredModule) -> dict[str, str]:
    """The parts that make up the product."""
    return {part: name for part, name in module.parts.items() if part not in ("alpha", "dora_scale")}


def _half_shape(module: StoredModule, core: str, a: str, b: str) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(out, in·kernel) of core ×₁ a ×₂ b, or of a @ b, and the kernel if the tensors tell it."""
    first, second = module.shape(a), module.shape(b)
    module.check_no_kernel(a, first)
    if core in module.parts:
        module.check_no_kernel(b, second)
        shape = module.shape(core)
        if len(shape) < 3 or shape[:2] != (first[0], second[0]):
            raise module.mismatch(core, shape, (first[0], second[0]))
        return (first[1], second[1] * math.prod(shape[2:])), shape[2:]
    if first[1] != second[0]:
        raise module.mismatch(b, second, (first[1],))
    return (first[0], math.prod(second[1:])), second[2:]


def _half(parts: dict[str, Tensor], core: str, a: str, b: str) -> LowRank:
    """A low-rank matrix; with a Tucker core its first factor is stored (r, out)."""
    from lorasurgery.linalg.forms import tucker

    if core in parts:
        return LowRank(parts[a].flatten(1).mT, tucker(parts[core], parts[b]))
    return LowRank(parts[a].flatten(1), parts[b].flatten(1))


def _side_shape(module: StoredModule, side: int) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """(rows, columns·kernel) of one side of LoKr, its kernel, and the rank of its factors; 0 where it is whole."""
    name = f"lokr_w{side}"
    if name in module.parts:
        shape = module.shape(name)
        return (shape[0], math.prod(shape[1:])), shape[2:], 0
    if not {f"{name}_a", f"{name}_b"} <= set(module.parts):
        raise module.incomplete(f"{name} is missing")
    flat, kernel = _half_shape(module, f"lokr_t{side}", f"{name}_a", f"{name}_b")
    return flat, kernel, module.shape(f"{name}_b")[0]


def _side(parts: dict[str, Tensor], side: int) -> Tensor:
    """One side of LoKr as a matrix."""
    name = f"lokr_w{side}"
    if name in parts:
        return parts[name].flatten(1)
    half = _half(parts, f"lokr_t{side}", f"{name}_a", f"{name}_b")
    return half.up @ half.down
