"""Casting an updated weight to its storage dtype, once; what survives it, and what differs by rounding alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lorasurgery.engine.threads import parallel_for, scratch
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.norms import row_blocks
from lorasurgery.lowrank import Update, widened

Rounding = Literal["nearest", "stochastic"]
_PRODUCTS = 1e-25, 1e35  # sums of products of which float32 has lost nothing that counts
_BITS = {1: torch.int8, 2: torch.int16}


@dataclass(frozen=True, slots=True)
class Survival:
    """What rounding left of an update Δ, with D = round(W + Δ) − W: ⟨D,Δ⟩, ‖Δ‖² and ‖D − Δ‖².

    >>> (Survival(1.0, 2.0, 0.5) + Survival(1.0, 0.0, 0.0)).retention
    1.0
    """

    dot: float
    update: float
    residue: float

    def __add__(self, other: Survival) -> Survival:
        """The survival of both updates together."""
        return Survival(self.dot + other.dot, self.update + other.update, self.residue + other.residue)

    @property
    def retention(self) -> float:
        """⟨D,Δ⟩/‖Δ‖²: 1 when the update is in the weights, 0 when rounding swallowed it."""
        return self.dot / self.update if self.update else 1.0

    @property
    def noise(self) -> float:
        """‖D − Δ‖/‖Δ‖: rounding error beside the update's size."""
        return math.sqrt(self.residue / self.update) if self.update else 0.0

    @property
    def delta_norm(self) -> float:
        """‖Δ‖_F."""
        return math.sqrt(self.update)


def round_to(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round to a storage dtype: to nearest even, or stochastically when a generator is given.

    Stochastic rounding takes one of the two neighbours with the probability that makes the mean exact. 8-bit
    floats saturate at their largest finite value, as hardware does.

    >>> round_to(torch.tensor([1.001, 500.0]), torch.float8_e4m3fn).tolist()
    [1.0, 448.0]

    Args:
        x: Any floating dtype.
        generator: On x's device.
    """
    if dtype.is_floating_point and dtype.itemsize == 1:
        x = x.to(torch.float32) if x.dtype.itemsize == 1 else x
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    near = x.to(dtype)
    if generator is None or dtype.itemsize > 2:
        return near
    return _stochastic(x, near, generator)


def _stochastic(x: Tensor, near: Tensor, generator: torch.Generator) -> Tensor:
    """Move from the nearest value to the neighbour on x's side with probability |x − near| / gap."""
    bits = near.view(_BITS[near.dtype.itemsize])
    low = near.to(x.dtype)
    away = (x - low).sign() * torch.where(bits < 0, -1, 1).to(x.dtype)  # +1: towards larger magnitude
    step = torch.where(away > 0, 1, torch.where(away < 0, -1, 0)).to(bits.dtype)
    zero = low == 0
    tiny = torch.where(x < 0, torch.iinfo(bits.dtype).min + 1, 1).to(bits.dtype)  # the smallest subnormal of x's sign
    other = torch.where(zero & (x != 0), tiny, bits + step).view(near.dtype)
    gap = (other.to(x.dtype) - low).abs()
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    move = draw * gap < (x - low).abs()
    return torch.where(move & torch.isfinite(other.to(x.dtype)), other.to(x.dtype), low).to(near.dtype)


class Merger:
    """Merges one weight, some of its rows at a time; several threads may.

    Args:
        source: Dtype of the weight.
        updates: (m, n) each, of the whole weight, on the device where the rows will be.
        dtype: Storage dtype of the result.
        seed: For stochastic rounding.
        finite: Whether values that are not finite are an error.
    """

    def __init__(
        self, source: torch.dtype, updates: Sequence[Update], dtype: torch.dtype, *, rounding: Rounding = "nearest",
        seed: int = 0, finite: bool = True,
    ) -> None:  # fmt: skip
        self.finite = finite
        self.source, self.dtype, self.wide = source, dtype, widened(source)
        self.terms = [u.to(self.wide) for u in updates]
        self.seed = seed if rounding == "stochastic" else None

    def rows(self, weight: Tensor, out: Tensor, first: int) -> Survival:
        """Write round(W + Σ Δ) of some rows, in blocks that stay in cache: upcast, add and downcast touch memory once.

        Args:
            weight: These rows of W and of the result.
            out: These rows of W and of the result.
            first: Which row of the whole weight they begin with, where a block begins.

        Raises:
            SurgeryError: the sum is not finite in the storage dtype though it should be.
        """
        blocks = list(row_blocks(weight))
        found = [Survival(0.0, 0.0, 0.0)] * len(blocks)

        def work(i: int) -> None:
            found[i] = self._block(weight[blocks[i]], out[blocks[i]], first + blocks[i].start)

        parallel_for(work, range(len(blocks)))
        survival = sum(found, Survival(0.0, 0.0, 0.0))
        if self.finite and not math.isfinite(survival.residue):
            raise SurgeryError(_overflow(weight, self.dtype))
        return survival

    def _block(self, weight: Tensor, out: Tensor, first: int) -> Survival:
        generator = None if self.seed is None else draws(weight.device, self.seed, first)
        if not self.terms:
            self._store(weight.to(self.wide), out, generator)
            # taken from an adapter or cast to a narrower dtype: nothing else would tell that a value is not finite
            return Survival(0.0, 0.0, 0.0 if is_finite(out) else math.nan)
        old, delta, new = scratch(weight, self.wide, 3)
        old.copy_(weight)
        rows = slice(first, first + weight.shape[0])
        _sum(self.terms, rows, delta)
        update = _dot(delta, delta)
        if _needs_float64(old, delta, update, self.dtype):
            old, delta, new = scratch(weight, torch.float64, 3)
            old.copy_(weight)
            _sum(self.terms, rows, delta)
            update = _dot(delta, delta)
        torch.add(old, delta, out=new)
        self._store(new, out, generator)
        if out.dtype.itemsize < new.dtype.itemsize:
            return _left(delta, update, old.copy_(out).sub_(new))
        return _survived(old, delta, new.copy_(out))

    def _store(self, value: Tensor, out: Tensor, generator: torch.Generator | None) -> None:
        plain = generator is None and out.dtype.itemsize > 1  # then a copy rounds as it goes
        out.copy_(value if plain else round_to(value, self.dtype, generator))


def add_updates(
    weight: Tensor,
    updates: Sequence[Update],
    dtype: torch.dtype,
    *,
    rounding: Rounding = "nearest",
    seed: int = 0,
    finite: bool = True,
) -> tuple[Tensor, Survival]:
    """W' = round(W + Σ scale·up@down), formed in float32 (float64 for float64 weights) and rounded once.

    Works through rows in blocks that stay in cache, so that upcast, update and downcast touch memory once.

    >>> from lorasurgery.lowrank import LowRank
    >>> add_updates(torch.zeros(2, 2), [LowRank(torch.ones(2, 1), torch.ones(1, 2))], torch.float16)[1].retention
    1.0

    Args:
        weight: (m, n), any floating dtype.
        updates: (m, n) each, on the weight's device.
        dtype: Storage dtype of the result.
        seed: For stochastic rounding.
        finite: Whether values that are not finite are an error.

    Returns:
        The new weight (m, n) and what survived of the update.

    Raises:
        SurgeryError: the sum is not finite in `dtype` though it should be.
    """
    merger = Merger(weight.dtype, updates, dtype, rounding=rounding, seed=seed, finite=finite)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return out, merger.rows(weight, out, 0)


def set_values(
    weight: Tensor, values: Tensor, dtype: torch.dtype, *, rounding: Rounding = "nearest", seed: int = 0,
    first: int = 0, finite: bool = True,
) -> tuple[Tensor, Survival]:  # fmt: skip
    """round(values), and what survives of the update values − weight: for merges that are more than a sum.

    >>> set_values(torch.zeros(1, 2), torch.ones(1, 2), torch.float16)[1].delta_norm ** 2
    2.0000000000000004

    Args:
        weight: W (m, n), any floating dtype.
        values: (m, n), float32 or float64.
        first: Which row of the whole weight they begin with, where a block begins.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    survival = Survival(0.0, 0.0, 0.0)
    for rows in row_blocks(weight):
        generator = draws(weight.device, seed, first + rows.start) if rounding == "stochastic" else None
        old = weight[rows].to(values.dtype)
        out[rows] = round_to(values[rows], dtype, generator)
        survival = survival + _survived(old, values[rows] - old, out[rows].to(old.dtype, copy=True))
    if finite and not math.isfinite(survival.residue):
        raise SurgeryError(_overflow(weight, dtype))
    return out, survival


def draws(device: torch.device, seed: int, first: int = 0) -> torch.Generator:
    """Random numbers for the block of rows that begins at `first`: each block has its own, whoever works on it."""
    return torch.Generator(device).manual_seed((seed ^ (first * 0x9E3779B97F4A7C15)) & (2**63 - 1))


def _sum(terms: Sequence[Update], rows: slice, total: Tensor) -> None:
    """Rows of the updates' sum, into `total`."""
    first, *others = terms
    first.put_rows(total, rows)
    for term in others:
        term.add_rows(total, rows)


def _needs_float64(old: Tensor, delta: Tensor, update: float, dtype: torch.dtype) -> bool:
    """Whether float32's error in Δ could move more than one in 10⁴ of the roundings to 16 bits.

    That error is about 2⁻²⁴·|Δ|, so it only matters for updates as large as the weights, which are rare.
    """
    if dtype.itemsize != 2 or delta.dtype != torch.float32 or delta.device.type == "mps":
        return False
    return update > 0.0625 * _dot(old, old)


def _survived(old: Tensor, delta: Tensor, new: Tensor) -> Survival:
    """What `new` has of the update; its memory is used up."""
    change = new.sub_(old)
    dot = _dot(change, delta)
    rest = change.sub_(delta)
    return Survival(dot, _dot(delta, delta), _dot(rest, rest))


def _left(delta: Tensor, update: float, rounding: Tensor) -> Survival:
    """The same from ‖Δ‖² and the rounding error round(W + Δ) − (W + Δ), where that is far above the sum's own."""
    overlap = _dot(rounding, delta)
    return Survival(update + overlap, update, _dot(rounding, rounding))


def _dot(a: Tensor, b: Tensor) -> float:
    """⟨A,B⟩: a cache-sized block in its own precision, or in float64 where products may leave it."""
    one, two = a.reshape(-1), b.reshape(-1)
    found = float(torch.dot(one, two))
    if _PRODUCTS[0] < abs(found) < _PRODUCTS[1] or not (bool(one.any()) and bool(two.any())):
        return found
    return float(torch.dot(one.cpu().to(torch.float64), two.cpu().to(torch.float64)))


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, 8-bit floats too.

    >>> is_finite(torch.tensor([1.0, 3e38, 3e38])), is_finite(torch.tensor([torch.nan]))
    (True, False)
    """
    wide = values.to(torch.float32) if values.dtype.itemsize == 1 else values
    if bool(torch.isfinite(wide.sum(dtype=widened(values.dtype)))):
        return True
    return bool(torch.isfinite(wide).all())  # a sum may overflow where no value does


def _overflow(weight: Tensor, dtype: torch.dtype) -> str:
    if not bool(torch.isfinite(weight.to(torch.float32)).all()):
        return "holds values that are not finite (NaN or infinity); repair the checkpoint first, or --allow-nonfinite"
    name = str(dtype).removeprefix("torch.")
    return f"the merged values are not finite in {name}: the update is not, or is too large; try --dtype bfloat16"


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENT = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # where a float keeps it
_PART, _PART_ON_GPU = 1 << 16, 1 << 20  # elements at a time: in a core's cache; worth a kernel's launch


def same_but_rounded(a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether at every place there is a number that rounds to a's value in one dtype and to b's in the other.

    That is so where the two are at most half a step apart, of the dtype whose steps are wider there. A cast of one
    side would ask for too much: float16 and bfloat16 of one float32 weight are not casts of each other in one place of
    sixteen, for the cast meets half-way values that the weight was only near to. Half-way counts for both neighbours.

    >>> x = torch.tensor([0.1, -3.3, 1e-7])
    >>> same_but_rounded(x.half().float(), x, (torch.float16, torch.float32))
    True
    >>> same_but_rounded(x.half().float(), x * 1.001, (torch.float16, torch.float32))
    False

    Args:
        a: Of one shape, both float32 or both float64, contiguous; NaN and infinity are not roundings.
        b: Of one shape, both float32 or both float64, contiguous; NaN and infinity are not roundings.
        dtypes: What a and b were stored in.
    """
    one = max(step_at_one(d) for d in dtypes) / 2
    least = max(_least_step(d) for d in dtypes) / 2
    part = _PART if a.device.type == "cpu" else _PART_ON_GPU
    # torch casts float64 to less than 32 bits by way of float32, and so rounds twice
    dtype = torch.float64 if {*dtypes} == {torch.float32, torch.float64} else torch.float32
    for x, y in zip(torch.split(a.reshape(-1), part), torch.split(b.reshape(-1), part), strict=True):
        x, y = x.to(dtype), y.to(dtype)
        if not ((x - y).abs_() <= _half_steps(x, y, one, least)).all():
            return False
    return True


def _half_steps(x: Tensor, y: Tensor, one: float, least: float) -> Tensor:
    """Half a step next to the smaller of two values, for below a power of two steps are half as wide as above it."""
    bits = torch.minimum(x.abs(), y.abs()).view(_WORDS[x.dtype.itemsize])
    return bits.bitwise_and_(_EXPONENT[x.dtype]).view(x.dtype).mul_(one).clamp_min_(least)


@cache
def step_at_one(dtype: torch.dtype) -> float:
    """From 1 to the next larger value: torch.finfo's eps, save for float8_e5m2fnuz, where that is half of it.

    >>> step_at_one(torch.bfloat16)
    0.0078125
    """
    one = torch.ones(1).to(dtype).view(_WORDS[dtype.itemsize])
    return (one + 1).view(dtype).double().item() - 1


@cache
def _least_step(dtype: torch.dtype) -> float:
    """From 0 to the least positive value."""
    return torch.ones(1, dtype=_WORDS[dtype.itemsize]).view(dtype).double().item()
