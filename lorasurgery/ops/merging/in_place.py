"""merge, unmerge and switch inside a checkpoint's own files: only the tensors that change are read and written.

Everything is computed twice: once without writing, so that nothing but a kill or the disk can stop it half-way, and
once for good (checkpoint/inplace/transaction.py has how that survives a kill).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.engine.pipeline import Job, Pipeline
from lorasurgery.engine.threads import thread_pool
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.merging.finish import check_survival, describe, files_before, with_tensors
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.stream import TEAM, joined, listed, room
from lorasurgery.ops.merging.targets import check_in_place, is_touched
from lorasurgery.ops.merging.tensor_jobs import Destination, Note, jobs_of
from lorasurgery.ops.merging.undo.record import (
    UndoRecord,
    next_name,
    planned_record,
    stack,
    undo_folder,
    write_planned,
)
from lorasurgery.ops.merging.undo.recorder import Recorder
from lorasurgery.report import Report, Source

_RECORD = "record"


def run_in_place(
    recipe: Recipe, state: RunState, about: dict[str, Any], files: Callable[[], dict[str, bytes]], report: Report, *,
    resume: bool,
) -> None:  # fmt: skip
    """Carry out a recipe inside the files of its base.

    Args:
        recipe: Whose `out` is the checkpoint itself; names, dtypes, shapes and files stay as they are.
        about: What decides the result; only the same goes on after a kill.
        files: Called when all else is known: small files that change too, below the folder -> their new content.

    Raises:
        SurgeryError: as merge and unmerge; nothing was changed then, unless the message says so.
    """
    check_in_place(recipe)
    with (
        Surgery(recipe.disk.path, about, resume=resume, inputs=report.inputs) as surgery,
        thread_pool(min(TEAM, torch.get_num_threads())),
    ):
        work = _InPlaceRun(recipe, state, surgery)
        if not surgery.checked:
            check_survival(recipe, work.rehearse())
            surgery.check_passed([s.to_dict() for s in report.sources or ()])
        report.sources = [Source(**s) for s in surgery.noted]  # the files as they were, whatever is in them by now
        work.perform()
        report.warnings += state.fallback.warnings
        notes = work.notes()
        check_survival(recipe, notes)
        describe(recipe.files, recipe.edits, notes, report)
        work.end(files(), notes)
        report.bytes_written, report.resumed = surgery.bytes_written, surgery.resumed
    report.bytes_read = recipe.disk.bytes_read + sum(a.weights.bytes_read for a in recipe.adapters)


class _InPlaceRun:
    """All pieces of one operation, first for trying and then for good."""

    def __init__(self, recipe: Recipe, state: RunState, surgery: Surgery) -> None:
        self.recipe, self.state, self.surgery = recipe, state, surgery
        self.touched = [t for f in recipe.files for t in f.tensors if is_touched(recipe, t.name)]
        self.total, self.bytes = sum(t.nbytes for t in self.touched), 0
        self._lock = threading.Lock()

    def rehearse(self) -> dict[str, Any]:
        """Compute everything and write nothing; what is known of each tensor afterwards."""
        slots = {t.name: _Dropped() for t in self.touched}
        Pipeline(room(self.recipe)).run(job for t in self.touched for job in self._jobs(t, slots[t.name], None))
        return {name: _record(joined(slot.notes)) for name, slot in slots.items()}

    def perform(self) -> None:
        """Compute and write what is not there yet."""
        recorder = None
        if self.recipe.undo is not None:
            recorder = Recorder(self.surgery.scratch, self.recipe.base, self.state.device, self.state.fallback)
        Pipeline(room(self.recipe), (1, 2, 1)).run(
            job for t in self.touched for job in self._jobs(t, _Placed(self, t), recorder)
        )
        self.surgery.flush()

    def notes(self) -> dict[str, Any]:
        """What is known of each tensor, from the journal."""
        pieces: dict[str, dict[int, Note]] = defaultdict(dict)
        for key, (survived, stretches) in self.surgery.done.items():
            number, _, name = key.partition(" ")
            pieces[name][int(number)] = Note(Survival(*survived) if survived else None, stretches)
        return {t.name: _record(joined(pieces[t.name])) for t in self.touched}

    def end(self, files: dict[str, bytes], notes: dict[str, Any]) -> None:
        """Put the records in order, and end."""
        recipe, surgery = self.recipe, self.surgery
        path = recipe.disk.path
        below = stack(path)
        old = recipe.restored.path if recipe.restored and recipe.restored.path in below else None
        # a merge that keeps no record leaves none, for those that are there speak of bytes that are gone
        stale = below if recipe.undo is None and recipe.restored is None else [old] if old else []
        removed = [f"{undo_folder(path).name}/{record.name}" for record in stale]
        staged = {}
        if recipe.undo is not None:
            _stage(with_tensors(recipe, notes), surgery)
            name = old.name if old else next_name(len(below))
            staged, removed = {f"{undo_folder(path).name}/{name}": _RECORD}, []
        gone = [n for n, data in files_before(recipe).items() if data is None and n not in files]
        back = {n: data for n, data in files_before(recipe).items() if data is not None} | files
        surgery.finish(back, staged=staged, removed=[*removed, *gone])

    def _jobs(self, tensor: PlannedTensor, slot: Destination, recorder: Recorder | None) -> Iterator[Job]:
        done = self.surgery.done
        return (j for _, j in jobs_of(self.recipe, tensor, slot, self.state, recorder, skip=done))

    def written(self, tensor: PlannedTensor, size: int) -> None:
        """Tell how far it is."""
        with self._lock:
            self.bytes += size
            if self.state.progress:
                self.state.progress(tensor.name, self.bytes, self.total)


class _Dropped:
    """A slot that keeps what is known of the pieces and lets go of the bytes."""

    def __init__(self) -> None:
        self.notes: dict[int, Note] = {}

    def expect(self, pieces: int) -> None:
        """It does not matter here."""

    def place(self) -> int:
        """Anywhere."""
        return 0

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Keep the note."""
        self.notes[piece] = note


class _Placed:
    """A tensor's own place in the checkpoint's files."""

    def __init__(self, work: _InPlaceRun, tensor: PlannedTensor) -> None:
        self.work, self.tensor = work, tensor
        disk = work.recipe.disk
        self.file, self.first = disk.file_of[tensor.name], disk.tensors[tensor.name].start

    def expect(self, pieces: int) -> None:
        """The journal counts them."""

    def place(self) -> int:
        """Where it begins in its file."""
        return self.first

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Hand a piece to the surgery."""
        record = [listed(note.survival), note.kept]
        self.work.surgery.put(f"{piece} {self.tensor.name}", self.file, self.first + start, data, record)
        self.work.written(self.tensor, len(data))


def _record(note: Note) -> dict[str, Any]:
    return {"survived": listed(note.survival), "kept": note.kept}


def _stage(record: UndoRecord, surgery: Surgery) -> None:
    planned, about, places = planned_record(record, _RECORD)
    with TensorFile(surgery.staged(_RECORD), planned, lambda _: None, mode=surgery.modes.file) as file:
        write_planned(file, about, places, surgery.folder)
