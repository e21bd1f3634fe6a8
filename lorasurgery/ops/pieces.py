"""The work on one touched tensor, piece by piece, whatever becomes of the pieces: written, tried, or compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from lorasurgery.checkpoint.buffers import Buffers
from lorasurgery.checkpoint.flow import Job
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.ops.apply import Recipe
from lorasurgery.ops.jobs import Slot, StretchJob, WholeJob, is_by_rows
from lorasurgery.ops.recorder import Recorder
from lorasurgery.ops.row_jobs import Rows, RowsJob


def jobs_of(
    recipe: Recipe, tensor: PlannedTensor, slot: Slot, device: torch.device, buffers: Buffers,
    recorder: Recorder | None = None, *, skip: Collection[str] = (),
) -> Iterator[tuple[str, Job]]:  # fmt: skip
    """(key, job) of each piece of a tensor that an edit changes, or that a merge is taken back from.

    Args:
        recorder: Keeps what the undoing needs. skip: Keys of pieces that are done already.
    """
    for key, job in _all_jobs(recipe, tensor, slot, device, buffers, recorder):
        if key not in skip:
            yield key, job
        elif isinstance(job, RowsJob):
            job.work.skip()


def _all_jobs(
    recipe: Recipe, tensor: PlannedTensor, slot: Slot, device: torch.device, buffers: Buffers,
    recorder: Recorder | None,
) -> Iterator[tuple[str, Job]]:  # fmt: skip
    edit = recipe.edits.edits.get(tensor.name)
    back = recipe.restored.tensors.get(tensor.name) if recipe.restored else None
    if edit is None and back is not None:
        slot.expect(len(back.stretches))
        for i, stretch in enumerate(back.stretches):
            yield f"{i} {tensor.name}", StretchJob(recipe.base, tensor.name, i, stretch, slot)
        return
    if is_by_rows(edit, recorded=recipe.undo is not None) and tensor.nbytes:
        rows = Rows(recipe, edit, tensor, device, slot, recorder)
        # a piece is written while others are still to be read, so each must come back from its own bytes alone
        if back is None or [(s.start, s.size) for s in back.stretches] == rows.spans:
            yield from ((f"{i} {tensor.name}", RowsJob(rows, i, buffers)) for i in range(len(rows.pieces)))
            return
    if edit is not None:
        yield f"0 {tensor.name}", WholeJob(recipe, edit, tensor, device, slot, recorder)
