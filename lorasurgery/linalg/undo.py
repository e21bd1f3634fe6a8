"""Taking an update out of a merged weight to the bit: what round(W' − Δ) misses of W, found once and kept.

W' − Δ lies within half a step of W' from W, so its rounding is W again but where the steps around W are smaller: a
percent of the values or so. Those are kept, as steps. What is kept must do on any machine, and machines add up Δ in
other orders: so Δ is taken in float64 here, whatever it was merged in, and where the largest difference between two
orders could turn the rounding, the value itself is kept (docs/maths.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.engine.threads import parallel_for, scratch
from lorasurgery.linalg.norms import block_height
from lorasurgery.lowrank import Dense, Update

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_EPS = 2.0**-53
_AT_ONCE = 1 << 18  # corrections that are put in together


@dataclass(frozen=True)
class Corrections:
    """Where round(W' − Δ) is not W, in some rows taken as one list of values.

    Args:
        places: (n,) int32, rising.
        steps: (n,) int32 or int64, how many representable values W lies above it.
        doubtful: (k,) int32, where the rounding may turn from machine to machine.
        bits: (k,) W's own, as integers.
    """

    places: Tensor
    steps: Tensor
    doubtful: Tensor
    bits: Tensor


class Undoing:
    """One weight's updates in float64, to be taken out of its merged rows; several threads may.

    >>> from lorasurgery.lowrank import LowRank
    >>> undoing = Undoing([LowRank(torch.ones(1, 1), torch.ones(1, 2))], torch.bfloat16)
    >>> old = torch.tensor([[0.1, 3.0]], dtype=torch.bfloat16)
    >>> merged = (old.float() + 1).bfloat16()
    >>> found = undoing.corrections(old, merged, 0)
    >>> out = torch.empty_like(old)
    >>> undoing.restore(merged, found, out, 0)
    >>> torch.equal(out, old)
    True

    Args:
        updates: (m, n) each, of the whole weight, as they are stored: factors or a matrix, on the device of the rows.
        dtype: Of the weight before and after, at most 32 bits wide.
    """

    def __init__(self, updates: Sequence[Update], dtype: torch.dtype) -> None:
        self.terms = [u.to(torch.float64) for u in updates]
        self.dtype = dtype
        self.spread = sum(largest(u) for u in self.terms)
        products = sum(u.rank if not isinstance(u, Dense) else 1 for u in self.terms)
        self._slack = 2 * (products + 2 * len(self.terms) + 8) * _EPS  # two orders of summing, each half of it off

    def corrections(self, old: Tensor, merged: Tensor, first: int) -> Corrections:
        """What must be kept of some rows.

        Args:
            old: (b, n), these rows of W and of W'.
            merged: (b, n), these rows of W and of W'.
            first: Which row of the whole weight they begin with.
        """
        blocks = self._blocks(old)
        found: list[tuple[Tensor, ...]] = [()] * len(blocks)

        def work(i: int) -> None:
            rows = blocks[i]
            found[i] = self._compare(old[rows], merged[rows], first + rows.start, rows.start * old.shape[1])

        parallel_for(work, range(len(blocks)))
        return Corrections(*(torch.cat(part).cpu() for part in zip(*found, strict=True)))

    def restore(self, merged: Tensor, kept: Corrections, out: Tensor, first: int) -> None:
        """Write W of some rows.

        Args:
            merged: (b, n), these rows of W' and of the result.
            out: (b, n), these rows of W' and of the result.
        """
        blocks = self._blocks(merged)

        def work(i: int) -> None:
            rows = blocks[i]
            (value,) = scratch(merged[rows], torch.float64, 1)
            self._before(merged[rows], value, first + rows.start)
            out[rows] = narrowed(value, self.dtype)

        parallel_for(work, range(len(blocks)))
        bits = out.reshape(-1).view(BITS[self.dtype.itemsize])
        for start in range(0, len(kept.places), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            places, steps = kept.places[some].to(out.device), kept.steps[some].to(out.device)
            bits[places] = unordered(ordered(bits[places]) + steps, bits.dtype)
        bits[kept.doubtful.to(out.device)] = kept.bits.to(out.device, bits.dtype)

    def _before(self, merged: Tensor, value: Tensor, first: int) -> None:
        """W' − Δ in float64."""
        value.copy_(merged)
        rows = slice(first, first + merged.shape[0])
        for term in self.terms:
            term.times(-1.0).add_rows(value, rows)

    def _compare(self, old: Tensor, merged: Tensor, first: int, start: int) -> tuple[Tensor, ...]:
        value, off = scratch(merged, torch.float64, 2)
        self._before(merged, value, first)
        doubt, finite = self._doubt(value)
        kind = BITS[self.dtype.itemsize]
        wanted = old.reshape(-1).view(kind)
        low = narrowed(torch.sub(value, doubt, out=off), self.dtype).reshape(-1).view(kind)
        high = narrowed(torch.add(value, doubt, out=off), self.dtype).reshape(-1).view(kind)
        mask = (low != wanted) | (high != wanted)
        if finite is not None:  # what a NaN looks like is each machine's own affair
            mask |= ~finite
        at = mask.nonzero()[:, 0]
        sure = low[at] == high[at]
        if finite is not None:
            sure &= finite[at]
        places, doubtful = at[sure], at[~sure]
        steps = ordered(wanted[places]) - ordered(low[places])
        narrow = torch.int32 if self.dtype.itemsize <= 2 else torch.int64
        return (places + start).int(), steps.to(narrow), (doubtful + start).int(), wanted[doubtful]

    def _doubt(self, value: Tensor) -> tuple[float, Tensor | None]:
        """How far another machine's values may lie from these, and which are finite where not all are."""
        if not value.numel():
            return 0.0, None
        low, high = value.aminmax()
        most, finite = float(torch.maximum(-low, high)), None
        if not math.isfinite(most):
            finite = torch.isfinite(value.reshape(-1))
            most = float(value.abs().nan_to_num(0.0, 0.0).amax())
        return self._slack * (2 * self.spread + most), finite

    @staticmethod
    def _blocks(rows: Tensor) -> list[slice]:
        step = block_height(2 * rows.shape[1], rows.device)  # values are twice as wide as in float32
        return [slice(s, min(s + step, rows.shape[0])) for s in range(0, rows.shape[0], step)]


def largest(update: Update) -> float:
    """A bound on every |Δᵢⱼ| and on the sum of the products' sizes behind it: ‖uᵢ‖·‖vⱼ‖ by Cauchy–Schwarz.

    >>> from lorasurgery.lowrank import LowRank
    >>> largest(LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 2.0))
    10.0
    """
    if isinstance(update, Dense):
        return abs(update.scale) * float(update.matrix.abs().amax()) if update.matrix.numel() else 0.0
    if not (update.up.numel() and update.down.numel()):
        return 0.0
    up, down = torch.linalg.vector_norm(update.up, dim=1), torch.linalg.vector_norm(update.down, dim=0)
    return abs(update.scale) * float(up.amax()) * float(down.amax())


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a storage dtype by way of float32: each step rounds to nearest even, the same everywhere."""
    single = value.to(torch.float32)
    if dtype.itemsize == 1:
        single = single.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return single.to(dtype)


def ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of the floats: neighbours differ by 1 (−0 comes before +0)."""
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, -wide + (-(1 << (8 * bits.dtype.itemsize - 1)) - 1), wide)


def unordered(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits again."""
    return torch.where(order < 0, -order + (-(1 << (8 * dtype.itemsize - 1)) - 1), order).to(dtype)
