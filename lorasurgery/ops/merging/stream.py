"""The engine of merge and unmerge: every tensor of a checkpoint goes through once, on as many ranks as there are."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch

from lorasurgery.checkpoint.files import ScratchFile
from lorasurgery.checkpoint.journal import UNDO, Run
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.engine.pipeline import Job, Pipeline
from lorasurgery.engine.threads import thread_pool
from lorasurgery.errors import UsageError
from lorasurgery.linalg.rounding import Survival
from lorasurgery.ops.merging.finish import check_survival, describe, finish
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.tensor_jobs import CopyJob, Note, is_by_rows, jobs_of, whole_bytes
from lorasurgery.ops.merging.undo.recorder import Recorder
from lorasurgery.report import Report

ROOM = 96 << 20  # bytes of weights on their way
TEAM = 16  # more threads than that only wait for memory, and each needs some of its own
_RUN = 256 << 20  # bytes that are copied in one go


def run(recipe: Recipe, state: RunState, journal: Run, report: Report) -> None:
    """Stream the checkpoint through the recipe into the output, which appears whole or not at all."""
    _check_limit(recipe)
    journal.ranks.wait()  # until all have seen the output as it was
    with Output(recipe.out, overwrite=recipe.overwrite, run=journal, inputs=report.inputs) as output:
        work = _StreamRun(recipe, state, journal, output)
        try:
            with thread_pool(min(TEAM, torch.get_num_threads())):
                Pipeline(room(recipe)).run(work.jobs())
            work.wait_for_disk()
        finally:
            work.close()
        done = journal.gather()
        if journal.ranks.first:
            for planned in recipe.files:
                output.expect(planned.name)
                if not planned.tensors:
                    with output.tensor_file(planned):
                        pass
            check_survival(recipe, done)
            describe(recipe.files, recipe.edits, done, report)
            finish(recipe, output, done, state.carried)
        report.bytes_written = output.bytes_written
    journal.ranks.wait()
    report.warnings += state.fallback.warnings
    report.bytes_read = recipe.disk.bytes_read + sum(a.weights.bytes_read for a in recipe.adapters)


class _StreamRun:
    """This rank's share of the tensors, the files they go to, and what is finished of them."""

    def __init__(self, recipe: Recipe, state: RunState, journal: Run, output: Output) -> None:
        self.recipe, self.state, self.journal, self.output = recipe, state, journal, output
        self._made: dict[str, TensorFile] = {}
        self._files: dict[str, TensorFile] = {}  # those of them that are open
        self._lock = threading.Lock()
        output.check_kept(f.name for f in recipe.files if any(t.name in journal.done for t in f.tensors))
        self._share = _share(recipe, journal)
        self._left = {name: len(tensors) for name, tensors in self._share.items()}
        self._total, self._bytes = sum(t.nbytes for tensors in self._share.values() for t in tensors), 0
        self._scratch: ScratchFile | None = None
        self.recorder: Recorder | None = None
        if recipe.undo is not None:
            self._scratch = ScratchFile(journal.new_path(UNDO), new=True)
            self.recorder = Recorder(self._scratch, recipe.base, state.device, state.fallback)

    def jobs(self) -> Iterator[Job]:
        """What is to be done, in the order of the files."""
        for planned in self.recipe.files:
            tensors = self._share.get(planned.name, [])
            if tensors and len(tensors) == len(planned.tensors) and _is_untouched(self.recipe, planned):
                yield _FileJob(self, planned)
            else:
                yield from self._of_file(planned, tensors)

    def _of_file(self, planned: PlannedFile, tensors: Iterable[PlannedTensor]) -> Iterator[Job]:
        recipe, edits = self.recipe, self.recipe.edits.edits

        def file() -> TensorFile:
            return self.file(planned)

        done = partial(self.done, planned.name)
        copied: list[PlannedTensor] = []
        place = 0  # behind the last of the copied
        for here, tensor in _with_places(planned, tensors):
            edit = edits.get(tensor.name)
            back = recipe.restored.tensors.get(tensor.name) if recipe.restored and edit is None else None
            cast = recipe.base.tensors[tensor.name].dtype != tensor.dtype if edit is None else True
            as_is = edit is None and back is None and not (cast and tensor.nbytes)  # a cast of nothing is a copy
            if copied and not (as_is and here == place and _follows(recipe, copied, tensor)):
                yield CopyJob(recipe.disk, copied, file, done)
                copied = []
            if as_is:
                copied.append(tensor)
                place = here + 1
            else:
                slot = _Slot(self, planned, tensor)
                found = jobs_of(recipe, tensor, slot, self.state, self.recorder)
                yield from (job for _, job in found)
        if copied:
            yield CopyJob(recipe.disk, copied, file, done)

    def place(self, planned: PlannedFile, name: str) -> int:
        """Where a tensor begins in an output file, which need not be open yet: many may be before their first write."""
        with self._lock:
            return self._file(planned).place(name)

    def file(self, planned: PlannedFile) -> TensorFile:
        """The output file, opened when the first of its tensors is written."""
        with self._lock:
            file = self._file(planned)
            if planned.name not in self._files:
                file.open()
                self._files[planned.name] = file
            return file

    def _file(self, planned: PlannedFile) -> TensorFile:
        if planned.name not in self._made:
            self._made[planned.name] = self.output.tensor_file(planned)
        return self._made[planned.name]

    def done(self, home: str, tensor: PlannedTensor, note: Note) -> None:
        """Note that a tensor is in its file; a file whose tensors are all there is synced and closed."""
        size = tensor.nbytes
        self.journal.add(tensor.name, {"survived": listed(note.survival), "kept": note.kept}, size)
        with self._lock:
            self._bytes += size
            if self.state.progress:
                self.state.progress(tensor.name, self._bytes, self._total)
            self._left[home] -= 1
            complete = not self._left[home]
            file = self._files.get(home)
        if complete and file is not None:
            file.close()
            with self._lock:
                del self._files[home], self._made[home]
        if self.journal.is_due:
            self.journal.synced(self._sync)

    def wait_for_disk(self) -> None:
        """Wait until the disk has all of this rank's share."""
        self.journal.synced(self._sync)

    def close(self) -> None:
        """Close what is still open, after a failure."""
        for file in self._files.values():
            file.abandon()
        if self._scratch is not None:
            self._scratch.close()

    def _sync(self) -> None:
        if self._scratch is not None:
            self._scratch.sync()
        with self._lock:
            files = list(self._files.values())
        for file in files:
            file.sync()


class _Slot:
    """One tensor's place in an output file; when all of its pieces are there, it is done."""

    def __init__(self, work: _StreamRun, planned: PlannedFile, tensor: PlannedTensor) -> None:
        self.work, self.planned, self.tensor = work, planned, tensor
        self._notes: dict[int, Note] = {}
        self._pieces, self._lock = 0, threading.Lock()

    def expect(self, pieces: int) -> None:
        """How many there will be."""
        self._pieces = pieces

    def place(self) -> int:
        """Where the tensor begins."""
        return self.work.place(self.planned, self.tensor.name)

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Write a piece."""
        self.work.file(self.planned).put(self.tensor.name, start, data)
        with self._lock:
            self._notes[piece] = note
            if len(self._notes) < self._pieces:
                return
        self.work.done(self.planned.name, self.tensor, joined(self._notes))


class _FileJob:
    """A whole file in which nothing changes."""

    cost = 1

    def __init__(self, work: _StreamRun, planned: PlannedFile) -> None:
        self.work, self.planned = work, planned

    def read(self) -> None:
        """Nothing: the system copies."""

    def compute(self) -> None:
        """Nothing."""

    def write(self) -> None:
        """Copy it, header included."""
        disk = self.work.recipe.disk
        disk.readable(self.planned.tensors[0].name)  # it must be there in full, and as long as it was
        disk.count(self.work.output.copy_file(self.planned.name, disk.folder / self.planned.name))
        for tensor in self.planned.tensors:
            self.work.done(self.planned.name, tensor, Note())


def joined(notes: Mapping[int, Note]) -> Note:
    """What is known of a tensor from its pieces, in their order."""
    ordered = [notes[i] for i in sorted(notes)]
    survived = [n.survival for n in ordered if n.survival is not None]
    whole = sum(survived, Survival(0.0, 0.0, 0.0)) if survived else None
    return Note(whole, [stretch for n in ordered for stretch in n.kept])


def listed(survival: Survival | None) -> list[float] | None:
    """A survival as JSON."""
    return [survival.dot, survival.update, survival.residue] if survival else None


def room(recipe: Recipe) -> int:
    """Bytes of weights that may be on their way."""
    return min(ROOM, recipe.memory_limit // 2) if recipe.memory_limit else ROOM


def _check_limit(recipe: Recipe) -> None:
    """Refuse a limit that a tensor can't be merged within, before anything is written."""
    edits, limit = recipe.edits.edits, recipe.memory_limit
    for tensor in (t for f in recipe.files for t in f.tensors if t.name in edits and limit):
        needed = whole_bytes(tensor)
        if limit and needed > limit and not is_by_rows(edits[tensor.name], recorded=recipe.undo is not None):
            raise UsageError(
                f"--memory-limit: {tensor.name} has rows that are replaced or norms of columns, so it is merged as a "
                f"whole and takes {needed:,} bytes; give at least that"
            )


def _share(recipe: Recipe, journal: Run) -> dict[str, list[PlannedTensor]]:
    """What this rank still has to do, by file: whole files where there are enough for all ranks."""
    ranks, files = journal.ranks, recipe.files
    left = {f.name: [t for t in f.tensors if t.name not in journal.done] for f in files}
    if len(files) >= ranks.size:
        mine = ranks.mine(files, [sum(t.nbytes for t in left[f.name]) for f in files])
        return {f.name: left[f.name] for f in mine}
    flat = [(f.name, t) for f in files for t in left[f.name]]
    found: dict[str, list[PlannedTensor]] = {}
    for name, tensor in ranks.mine(flat, [t.nbytes for _, t in flat]):
        found.setdefault(name, []).append(tensor)
    return found


def _with_places(planned: PlannedFile, tensors: Iterable[PlannedTensor]) -> Iterator[tuple[int, PlannedTensor]]:
    """Some of a file's tensors, in its order, and the place of each in it."""
    every = enumerate(planned.tensors)
    for tensor in tensors:
        yield next(i for i, t in every if t is tensor), tensor


def _is_untouched(recipe: Recipe, planned: PlannedFile) -> bool:
    """Whether the output file is the base's, to the byte."""
    header = recipe.disk.files.get(planned.name)
    if header is None or header.metadata != planned.metadata:
        return False
    names = [planned.prefix + name for name in header.tensors]
    edits, tensors = recipe.edits.edits, recipe.disk.tensors
    back = recipe.restored.tensors if recipe.restored else {}
    return {t.name for t in planned.tensors} == set(names) and all(
        t.name not in edits and t.name not in back
        and recipe.disk.file_of[t.name] == planned.name and tensors[t.name].dtype == t.dtype
        for t in planned.tensors
    )  # fmt: skip


def _follows(recipe: Recipe, before: list[PlannedTensor], tensor: PlannedTensor) -> bool:
    """Whether a tensor lies right behind others in the base's file too, so that one copy does for all."""
    tensors, files = recipe.disk.tensors, recipe.disk.file_of
    last = before[-1].name
    together = files[last] == files[tensor.name] and tensors[last].end == tensors[tensor.name].start
    return together and sum(t.nbytes for t in before) + tensor.nbytes <= _RUN
