"""One output tensor of merge and unmerge: what it starts from, what is added, and the one rounding at the end."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.engine.threads import parallel_for
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.dora import decomposed
from lorasurgery.linalg.norms import row_blocks
from lorasurgery.linalg.rounding import Rounding, Survival, add_updates, set_values
from lorasurgery.lowrank import Update, widened
from lorasurgery.ops.placement.edits import Contribution, Edit


def apply_edit(
    base: TensorReader, edit: Edit, tensor: PlannedTensor, device: torch.device, *, rounding: Rounding, seed: int,
    finite: bool = True,
) -> tuple[torch.Tensor, Survival]:  # fmt: skip
    """Compute one output tensor: replace, add every contribution in float32, round once.

    Args:
        base: Where the tensor starts from.
        tensor: Name, dtype and shape of what is written.
        seed: Of stochastic rounding; each tensor's name makes a seed of its own from it.
        finite: Whether values that are not finite are an error.

    Returns:
        The new tensor, on `device`, and what survived of the updates.
    """
    start = _start(base, edit).to(device)
    how: dict[str, Any] = {
        "rounding": rounding, "seed": seed ^ zlib.crc32(tensor.name.encode()), "finite": finite
    }  # fmt: skip
    dtype = torch_dtype(tensor.dtype)
    if any(c.stacked for c in edit.contributions):
        value, survival = _experts(edit, start, dtype, how)
    else:
        matrix = start.reshape(start.shape[0], -1) if start.ndim else start.reshape(1, 1)
        if any(c.decomposes for c in edit.contributions):
            value, survival = set_values(matrix, in_turn(edit, matrix), dtype, **how)
        else:
            updates = [placed(c, matrix.shape[0]).to(device) for c in edit.contributions]
            value, survival = add_updates(matrix, updates, dtype, **how)
    return value.reshape(tensor.shape), survival


def placed(contribution: Contribution, height: int) -> Update:
    """A contribution's update, as high as the tensor it goes into."""
    update = contribution.load()
    return update if contribution.into is None else update.placed(contribution.into, height)


def _experts(edit: Edit, start: torch.Tensor, dtype: torch.dtype, how: dict[str, Any]) -> tuple[torch.Tensor, Survival]:
    """All experts of one three-dimensional tensor, each with its own factors."""
    value = torch.empty(start.shape, dtype=dtype, device=start.device)
    total = Survival(0.0, 0.0, 0.0)
    for e in range(start.shape[0]):
        updates = [c.load(e).to(start.device) for c in edit.contributions]
        value[e], survival = add_updates(start[e], updates, dtype, **(how | {"seed": how["seed"] + e}))
        total = total + survival
    return value, total


def in_turn(edit: Edit, matrix: torch.Tensor) -> torch.Tensor:
    """Contributions one after the other in float32, for DoRA's norm is that of the weight it meets.

    Args:
        matrix: The weight, a convolution's flattened; it is not changed.
    """
    value = matrix.to(widened(matrix.dtype), copy=True)
    for c in edit.contributions:
        rows = slice(None) if c.into is None else c.into
        if c.decomposes:
            value[rows] = _decompose(c, value[rows], edit.shape)
        else:
            value[rows] += c.load().to(value.device).rows(slice(None), value.dtype)
    return value


def _decompose(c: Contribution, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """One DoRA update as its own family defines it (docs/formats.md: their strengths mean different things)."""
    assert c.delta is not None
    assert c.delta.magnitude is not None
    norms = c.delta.magnitude.load(c.adapter.weights, c.rows).to(value.device)
    return c.delta.magnitude.decompose(
        value, c.plain().to(value.device), norms, c.weight, kernel=shape[1:], transposed=c.transposed
    )


def _start(base: TensorReader, edit: Edit) -> torch.Tensor:
    """W itself, or what replaces it or some of its rows; at a weight w other than 1, W + w·(R − W) in float32."""
    new = edit.replacement
    if new is None:
        assert edit.source is not None
        value = base.read(edit.source.name)
    else:
        value = new.weights.read(new.key)
        if new.weight != 1:
            if edit.source is None:
                raise SurgeryError("is new to the base, so it can only be taken whole; use weight 1")
            old = base.read(edit.source.name).to(torch.float32)
            value = old + new.weight * (value.to(torch.float32) - old)
    for item in edit.rows:
        rows, place = item.adapter.weights.read(item.key), torch.tensor(item.rows)
        rows = rows if item.part is None else rows[item.part]
        if item.weight != 1 or value.dtype != rows.dtype:
            value = value.to(widened(value.dtype))
        value[place] = torch.lerp(value[place], rows.to(value.dtype), item.weight)
    return value


class DoraRows:
    """Like rounding.Merger, for edits with DoRA whose output features are rows.

    Args:
        source: Dtype of the weight.
        height: Its rows.
        dtype: as for Merger.
        rounding: as for Merger.
        seed: as for Merger.
        finite: as for Merger.
    """

    def __init__(
        self, edit: Edit, height: int, source: torch.dtype, dtype: torch.dtype, device: torch.device, *,
        rounding: Rounding, seed: int, finite: bool,
    ) -> None:  # fmt: skip
        self.finite = finite
        self.wide, self.dtype, self.rounding, self.seed = widened(source), dtype, rounding, seed
        self.parts = [(c.into or slice(0, height), *_loaded(c, device, self.wide)) for c in edit.contributions]

    def rows(self, weight: Tensor, out: Tensor, first: int) -> Survival:
        """Write the new rows; see Merger.rows."""
        blocks = list(row_blocks(weight))
        found = [Survival(0.0, 0.0, 0.0)] * len(blocks)

        def work(i: int) -> None:
            old, at = weight[blocks[i]].to(self.wide), first + blocks[i].start
            new, found[i] = set_values(
                old,
                self._updated(old.clone(), at),
                self.dtype,
                rounding=self.rounding,
                seed=self.seed,
                first=at,
                finite=self.finite,
            )
            out[blocks[i]] = new

        parallel_for(work, range(len(blocks)))
        return sum(found, Survival(0.0, 0.0, 0.0))

    def _updated(self, value: Tensor, first: int) -> Tensor:
        for into, update, magnitude, strength in self.parts:
            low, high = max(first, into.start), min(first + len(value), into.stop)
            if low >= high:
                continue
            here, there = slice(low - first, high - first), slice(low - into.start, high - into.start)
            if magnitude is None:
                value[here] += update.rows(there, self.wide)
            else:
                rows, norms = update.part(there), magnitude[there]
                value[here] = decomposed(value[here], rows, norms, strength, by_column=False)
        return value


def is_by_row(contribution: Contribution) -> bool:
    """Whether a row of the result depends on that row of the weight alone; rows apart are left to the whole tensor."""
    c = contribution
    if c.into is not None and (c.into.step or 1) != 1:
        return False
    if not c.decomposes:
        return True
    assert c.delta is not None
    assert c.delta.magnitude is not None
    return c.delta.magnitude.is_by_row(transposed=c.transposed)


def _loaded(c: Contribution, device: torch.device, wide: torch.dtype) -> tuple[Update, Tensor | None, float]:
    if not c.decomposes:
        return c.load().to(device, wide), None, 1.0
    assert c.delta is not None
    assert c.delta.magnitude is not None
    norms = c.delta.magnitude.load(c.adapter.weights, c.rows).to(device)
    return c.plain().to(device, wide), norms, c.weight
