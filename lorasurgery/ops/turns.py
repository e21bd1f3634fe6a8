"""Contributions one after the other, some rows at a time: DoRA's norm is that of the weight it meets, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.linalg.dora import decomposed
from lorasurgery.linalg.norms import row_blocks
from lorasurgery.linalg.rounding import Rounding, Survival, set_values
from lorasurgery.linalg.threads import each
from lorasurgery.lowrank import Update, widened
from lorasurgery.ops.edits import Contribution, Edit


class Turns:
    """Like rounding.Merger, for edits with DoRA whose output features are rows.

    Args:
        source: Dtype of the weight. height: Its rows.
        dtype, rounding, seed, finite: as for Merger.
    """

    def __init__(
        self, edit: Edit, height: int, source: torch.dtype, dtype: torch.dtype, device: torch.device, *,
        rounding: Rounding, seed: int, finite: bool,
    ) -> None:  # fmt: skip
        self.finite = finite
        self.wide, self.dtype, self.rounding, self.seed = widened(source), dtype, rounding, seed
        self.turns = [(c.into or slice(0, height), *_loaded(c, device, self.wide)) for c in edit.contributions]

    def rows(self, weight: Tensor, out: Tensor, first: int) -> Survival:
        """Write the new rows; see Merger.rows."""
        blocks = list(row_blocks(weight))
        found = [Survival(0.0, 0.0, 0.0)] * len(blocks)

        def work(i: int) -> None:
            old, at = weight[blocks[i]].to(self.wide), first + blocks[i].start
            new, found[i] = set_values(
                old,
                self._turned(old.clone(), at),
                self.dtype,
                rounding=self.rounding,
                seed=self.seed,
                first=at,
                finite=self.finite,
            )
            out[blocks[i]] = new

        each(work, range(len(blocks)))
        return sum(found, Survival(0.0, 0.0, 0.0))

    def _turned(self, value: Tensor, first: int) -> Tensor:
        for into, update, magnitude, strength in self.turns:
            low, high = max(first, into.start), min(first + len(value), into.stop)
            if low >= high:
                continue
            here, there = slice(low - first, high - first), slice(low - into.start, high - into.start)
            if magnitude is None:
                value[here] += update.rows(there, self.wide)
            else:
                new = decomposed(value[here], update.part(there), magnitude[there], by_column=False)
                value[here] = new if strength == 1 else value[here].lerp(new, strength)
        return value


def is_by_row(contribution: Contribution) -> bool:
    """Whether a row of the result depends on that row of the weight alone; rows apart are left to the whole tensor."""
    c = contribution
    if c.into is not None and (c.into.step or 1) != 1:
        return False
    assert c.delta is not None or not c.decomposes
    return not c.decomposes or not (c.transposed or (c.delta is not None and c.delta.lycoris))


def _loaded(c: Contribution, device: torch.device, wide: torch.dtype) -> tuple[Update, Tensor | None, float]:
    if not c.decomposes:
        return c.load().to(device, wide), None, 1.0
    assert c.delta is not None
    assert c.delta.magnitude is not None
    magnitude = c.adapter.weights.read(c.delta.magnitude).to(device).flatten()
    return c.plain().to(device, wide), magnitude if c.rows is None else magnitude[c.rows], c.weight
