"""DoRA as plain LoRA: the difference that it makes to its base's weights, at the best approximation of a rank.

W' = m·V/‖V‖ is no low-rank update of W, so the base is needed and something is lost; how much is measured.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.linalg.blocks import InMemory
from lorasurgery.linalg.fit import narrowed
from lorasurgery.linalg.norms import row_squares
from lorasurgery.linalg.ranged import ranged
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import truncated_svd
from lorasurgery.lowrank import Dense, LowRank, widened
from lorasurgery.ops.compute import in_turn
from lorasurgery.ops.convert_modules import Reduced
from lorasurgery.ops.edits import Contribution, Edit
from lorasurgery.ops.planner import plan_edits

Places = list[tuple[Edit, Contribution]]


def plain_lora(
    base: Checkpoint, adapter: Adapter, dtype: torch.dtype, device: torch.device, rank: int | None = None
) -> dict[str, Reduced]:
    """Factors of W' − W for every DoRA module, one matrix in memory at a time, each with its measured error.

    Args:
        dtype: What factors are written in. rank: Of all of them; None keeps each module's own.
    """
    found = {}
    for path, places in _places(base, adapter).items():
        delta = adapter.deltas[path]
        difference = _difference(base, delta, places, device)
        found[path] = _factor(delta, difference, rank or delta.rank, dtype)
    return found


def _places(base: Checkpoint, adapter: Adapter) -> dict[str, Places]:
    found: dict[str, Places] = defaultdict(list)
    for edit in plan_edits(base, [adapter], [1.0]).edits.values():
        for c in edit.contributions:
            if c.decomposes and c.delta is not None:
                found[c.delta.path].append((edit, c))
    return found


def _difference(base: Checkpoint, delta: Delta, places: Places, device: torch.device) -> Tensor:
    """W' − W in the orientation of the update (out, in), put together from all tensors it is spread over."""
    total: Tensor | None = None
    for edit, c in places:
        assert edit.source is not None
        weight = base.read(edit.source.name).to(device).flatten(1)
        weight = weight.to(widened(weight.dtype))
        part = in_turn(replace(edit, contributions=[c]), weight).sub_(weight)
        part = part if c.into is None else part[c.into]
        part = part.mT if c.transposed else part
        if c.rows is None:
            return part
        total = part.new_zeros(delta.shape) if total is None else total
        total[c.rows] = part
    assert total is not None
    return total


def _factor(delta: Delta, difference: Tensor, rank: int, dtype: torch.dtype) -> Reduced:
    matrix, power = ranged(InMemory(difference))
    found = truncated_svd(matrix, RankChoice(rank=min(rank, *delta.shape)))
    root = (found.s * 2.0**power).sqrt().to(difference)
    update = narrowed(LowRank(found.u * root, root[:, None] * found.vt), dtype)
    squares = row_squares(Dense(difference, 2.0**power), update)
    return Reduced(LowRank(update.up.cpu().contiguous(), update.down.cpu().contiguous()), *squares)
