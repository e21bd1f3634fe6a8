"""merge, unmerge and switch inside a checkpoint's own files: only the tensors that change are read and written.

Everything is computed twice: once without writing, so that nothing but a kill or the disk can stop it half-way, and
once for good (checkpoint/inplace/transaction.py has how that survives a kill).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch

from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.checkpoint.journal import Records
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.engine.pipeline import Job, Pipeline
from lorasurgery.engine.threads import thread_pool
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.merging.finish import check_survival, describe, files_before, kept_of_each
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
        check_survival(recipe, work.notes)
        describe(recipe.files, recipe.edits, work.notes, report)
        work.end(files)
        report.bytes_written, report.resumed = surgery.bytes_written, surgery.resumed
    report.bytes_read = recipe.disk.bytes_read + sum(a.weights.bytes_read for a in recipe.adapters)


class _InPlaceRun:
    """All pieces of one operation, first for trying and then for good."""

    def __init__(self, recipe: Recipe, state: RunState, surgery: Surgery) -> None:
        self.recipe, self.state, self.surgery = recipe, state, surgery
        self.touched = [t for f in recipe.files for t in f.tensors if is_touched(recipe, t.name)]
        self.total, self.bytes = sum(t.nbytes for t in self.touched), 0
        self.notes = _Notes(surgery.done, [t.name for t in self.touched])
        self._lock = threading.Lock()

    def rehearse(self) -> Records:
        """Compute everything and write nothing; what is known of each tensor afterwards."""
        found = Records()
        jobs = (job for t in self.touched for job in self._jobs(t, _Dropped(t.name, found), None))
        Pipeline(room(self.recipe)).run(jobs)
        return found

    def perform(self) -> None:
        """Compute and write what is not there yet."""
        recorder = None
        if self.recipe.undo is not None:
            recorder = Recorder(self.surgery.scratch, self.recipe.base, self.state.device, self.state.fallback)
        Pipeline(room(self.recipe), (1, 2, 1)).run(
            job for t in self.touched for job in self._jobs(t, _Placed(self, t), recorder)
        )
        self.surgery.flush()

    def end(self, changed: Callable[[], dict[str, bytes]]) -> None:
        """Put the records in order, and end.

        Args:
            changed: Small files that change too; they are made after the record of this merge is written.
        """
        recipe, surgery = self.recipe, self.surgery
        path = recipe.disk.path
        below = stack(path)
        old = recipe.restored.path if recipe.restored and recipe.restored.path in below else None
        # a merge that keeps no record leaves none, for those that are there speak of bytes that are gone
        stale = below if recipe.undo is None and recipe.restored is None else [old] if old else []
        removed = [f"{undo_folder(path).name}/{record.name}" for record in stale]
        staged = {}
        if recipe.undo is not None:
            self._stage(recipe.undo)
            name = old.name if old else next_name(len(below))
            staged, removed = {f"{undo_folder(path).name}/{name}": _RECORD}, []
        files = changed()
        gone = [n for n, data in files_before(recipe).items() if data is None and n not in files]
        back = {n: data for n, data in files_before(recipe).items() if data is not None} | files
        surgery.finish(back, staged=staged, removed=[*removed, *gone])

    def _stage(self, record: UndoRecord) -> None:
        """Write the record of this merge, which gets its name at the end."""
        recipe, surgery = self.recipe, self.surgery
        planned, about = planned_record(record, kept_of_each(recipe, self.notes), _RECORD)
        with TensorFile(surgery.staged(_RECORD), planned, lambda _: None, mode=surgery.modes.file) as file:
            write_planned(file, about, kept_of_each(recipe, self.notes), surgery.folder)

    def _jobs(self, tensor: PlannedTensor, slot: Destination, recorder: Recorder | None) -> Iterator[Job]:
        done = self.surgery.done
        return (j for _, j in jobs_of(self.recipe, tensor, slot, self.state, recorder, skip=done))

    def written(self, tensor: PlannedTensor, size: int) -> None:
        """Tell how far it is."""
        with self._lock:
            self.bytes += size
            if self.state.progress:
                self.state.progress(tensor.name, self.bytes, self.total)


class _Notes(Mapping[str, Any]):
    """What is known of each tensor, put together from the journal's records of its pieces whenever it is asked for."""

    def __init__(self, done: Mapping[str, Any], names: Sequence[str]) -> None:
        self._done, self._names = done, names

    def __getitem__(self, name: str) -> dict[str, Any]:
        keys = takewhile(self._done.__contains__, (f"{number} {name}" for number in count()))
        records = (self._done[key] for key in keys)
        pieces = [Note(Survival(*survived) if survived else None, kept) for survived, kept in records]
        return _record(joined(dict(enumerate(pieces))))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Dropped:
    """A destination that keeps what is known of the pieces and drops the bytes."""

    def __init__(self, name: str, found: Records) -> None:
        self.name, self.found = name, found
        self._notes: dict[int, Note] = {}
        self._pieces, self._lock = 0, threading.Lock()

    def expect(self, pieces: int) -> None:
        """How many there will be."""
        self._pieces = pieces

    def place(self) -> int:
        """Anywhere."""
        return 0

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Keep the note; the tensor's record is made from those of all pieces."""
        with self._lock:
            self._notes[piece] = note
            if len(self._notes) == self._pieces:
                self.found.add(self.name, _record(joined(self._notes)))


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
