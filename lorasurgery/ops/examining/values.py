"""Every value read once: what is finite, what the records say of the bytes, what a base plus adapters would be."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo, show
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.same import same_tensors
from lorasurgery.engine.buffers import spans
from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.engine.threads import thread_pool
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.undo import BITS, ordered
from lorasurgery.ops.extraction.difference import count_nonfinite
from lorasurgery.ops.merging.recipe import TensorRecipe
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.tensor_jobs import Note, jobs_of
from lorasurgery.ops.merging.undo.record import UndoRecord, read_undo_record, stack
from lorasurgery.ops.merging.undo.recorder import is_kept_as_steps
from lorasurgery.ops.merging.undo.select import match
from lorasurgery.ops.placement.edits import EditPlan
from lorasurgery.report import Checked, Progress, Report

_TOLERANCE = 2.0**-20  # of the largest value: what summing in float32 may differ by


_ROOM = 96 << 20


_BLOCK = 1 << 18  # values


def has_true_record(
    model: Checkpoint, base: Checkpoint, adapters: list[Adapter], strengths: list[float], blocks: Sequence[str],
    report: Report,
) -> bool:  # fmt: skip
    """Whether the last merge's record is of these adapters and strengths, and all its hashes hold on both sides."""
    found = stack(Path(model.path))
    if not found or not adapters:
        return False
    record = read_undo_record(found[-1])
    try:
        ordered_adapters = match(record, adapters, found)
    except SurgeryError:
        return False
    weights = [strengths[next(i for i, a in enumerate(adapters) if a is one)] for one in ordered_adapters]
    if weights != [m.weight for m in record.adapters] or list(blocks) != record.block_weights:
        return False
    if not all(as_merged(model, record, n) and as_before(base, record, n) for n in record.tensors):
        return False
    report.totals["undo_file"] = found[-1].name
    return True


def compare(model: Checkpoint, base: Checkpoint, plan: EditPlan, report: Report, device: torch.device) -> str:
    """Compute what the merge would be and hold it against what is there, tensor by tensor."""
    recipe, state = TensorRecipe(base=base, edits=plan), RunState(device)
    lines = {
        name: _line(name, model, base, plan) for name in dict.fromkeys([*model.tensors, *base.tensors, *plan.edits])
    }
    slots: dict[str, _Compared] = {}
    with thread_pool():
        jobs = []
        for name, line in lines.items():
            if line.state != "equal":
                continue
            info, edit = model.tensors[name], plan.edits.get(name)
            planned = PlannedTensor(name, info.dtype, edit.shape if edit else info.shape)
            if edit is None and base.tensors[name].dtype == info.dtype:
                line.state = "equal" if _same_bytes(model, base, name) else "differs"
                continue
            slots[name] = _Compared(model, name)
            jobs.append((recipe, planned, slots[name], state))
        Pipeline(_ROOM).run(job for given in jobs for _, job in jobs_of(*given))
    report.warnings += state.fallback.warnings
    for name, slot in slots.items():
        slot.tell(lines[name])
    report.modules += [line for line in lines.values() if line.state != "equal"]
    report.totals["changed"] = len(slots)
    states = {line.state for line in lines.values()}
    if states <= {"equal"} and not plan.edits:
        return "bits"
    return "rounding" if states <= {"equal", "rounding"} else "no"


def _line(name: str, model: Checkpoint, base: Checkpoint, plan: EditPlan) -> Checked:
    info, edit, old = model.tensors.get(name), plan.edits.get(name), base.tensors.get(name)
    shape = edit.shape if edit else old.shape if old else None
    if info is None or shape is None:
        found = info or old
        return Checked(name, found.shape if found else shape or (), state="missing" if info is None else "extra")
    return Checked(name, info.shape, state="equal" if info.shape == shape else "reshaped")


def _same_bytes(model: Checkpoint, base: Checkpoint, name: str) -> bool:
    one, two = model.tensors.get(name), base.tensors.get(name)
    return one is not None and two is not None and same_tensors(model, one, base, two)


class _Compared:
    """A slot that holds what should be against what is there."""

    def __init__(self, model: Checkpoint, name: str) -> None:
        self.model, self.name = model, name
        self.dtype = torch_dtype(model.tensors[name].dtype)
        self.values, self.differ, self.largest, self.wrong = 0, 0, 0, 0
        self._lock = threading.Lock()

    def expect(self, pieces: int) -> None:
        """It does not matter here."""

    def place(self) -> int:
        """Anywhere."""
        return 0

    def put(self, piece: int, start: int, data: memoryview, note: Note) -> None:
        """Compare a piece."""
        there = bytearray(len(data))
        self.model.fill(self.name, memoryview(there), start)
        if data == there:
            differ = largest = wrong = 0
        else:
            differ, largest, wrong = self._blocks(torch.frombuffer(data, dtype=self.dtype),
                                                 torch.frombuffer(there, dtype=self.dtype))  # fmt: skip
        with self._lock:
            self.values += len(data) // self.dtype.itemsize
            self.differ, self.wrong = self.differ + differ, self.wrong + wrong
            self.largest = max(self.largest, largest)

    def _blocks(self, wanted: torch.Tensor, there: torch.Tensor) -> tuple[int, int, int]:
        """The same over blocks that take little memory."""
        parts = [
            self._apart(*pair) for pair in zip(torch.split(wanted, _BLOCK), torch.split(there, _BLOCK), strict=True)
        ]
        return sum(p[0] for p in parts), max(p[1] for p in parts), sum(p[2] for p in parts)

    def _apart(self, wanted: torch.Tensor, there: torch.Tensor) -> tuple[int, int, int]:
        """(values that differ, the most steps apart, those further apart than rounding explains)."""
        if not is_kept_as_steps(self.dtype):  # float64 has no wider type; of integers every bit counts
            same = wanted == there
            near = torch.isclose(wanted, there, rtol=1e-12, atol=0) if wanted.is_floating_point() else same
            return int((~same).sum()), 0, int((~near).sum())
        kind = BITS[self.dtype.itemsize]
        steps = (ordered(wanted.view(kind)) - ordered(there.view(kind))).abs()
        one, two = wanted.float(), there.float()
        near = (one - two).abs() <= _TOLERANCE * float(one.abs().nan_to_num(0).amax())
        return int((steps > 0).sum()), int(steps.max()), int(((steps > 1) & ~near).sum())

    def tell(self, line: Checked) -> None:
        """Say what was found."""
        if self.differ:
            line.state = "differs" if self.wrong else "rounding"
            line.share, line.steps = self.differ / max(1, self.values), self.largest


_PIECE = 8 << 20


def find_nonfinite(model: Checkpoint, report: Report, progress: Progress | None) -> list[str]:
    """A sentence for each tensor with NaN or infinity; its line in the report's modules says how many."""
    found, done = [], 0
    with thread_pool():
        for name, info in model.tensors.items():
            bad = count_nonfinite(model, info) if info.is_float else _read_through(model, info)
            done += info.nbytes
            if progress:
                progress(name, done, model.nbytes)
            if bad:
                share = bad / max(1, info.nbytes // torch_dtype(info.dtype).itemsize)
                report.modules.append(Checked(name, info.shape, state="not finite", share=share))
                found.append(f"{model.file_of[name]}: {show(name)}: {bad} values are NaN or infinite")
    return found


def _read_through(model: Checkpoint, info: TensorInfo) -> int:
    for _ in model.chunks(info.name):  # it must be there, and readable
        pass
    return 0


def check_records(model: Checkpoint) -> list[str]:
    """What does not fit between the undo records and the bytes they speak of; only the last merge's can be seen."""
    found = []
    paths = stack(Path(model.path))
    for i, path in enumerate(paths):
        try:
            record = read_undo_record(path)
            if i == len(paths) - 1:
                found += [f"{path.name}: {text}" for text in changed_since(model, record)]
        except SurgeryError as problem:
            found.append(str(problem))
    return found


def changed_since(model: Checkpoint, record: UndoRecord) -> list[str]:
    """The tensors whose bytes are not those that a merge wrote."""
    return [
        f"{show(name)} was changed since {record.names} was merged, so the merge can't be undone"
        for name in record.tensors
        if not as_merged(model, record, name)
    ]


def as_merged(model: Checkpoint, record: UndoRecord, name: str) -> bool:
    """Whether a tensor's bytes are those that the merge wrote."""
    kept = record.tensors[name]
    info = model.tensors.get(name)
    if info is None:
        return False
    if kept.kind == "resized":
        return _hash(model, name, 0, info.nbytes) == kept.after
    if kept.kind == "added":
        return True
    if (info.dtype, info.shape) != (kept.dtype, kept.shape):
        return False
    return all(_hash(model, name, s.start, s.size) == s.after for s in kept.stretches)


def as_before(base: Checkpoint, record: UndoRecord, name: str) -> bool:
    """Whether a tensor's bytes are those that the merge met."""
    kept, info = record.tensors[name], base.tensors.get(name)
    if kept.kind == "added":
        return info is None
    if info is None or (info.dtype, info.shape) != (kept.dtype, kept.shape):
        return False
    return all(_hash(base, name, s.start, s.size) == s.before for s in kept.stretches)


def _hash(model: Checkpoint, name: str, start: int, size: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, _PIECE)))
    for at, length in spans(size):
        model.fill(name, buffer[:length], start + at)
        digest.update(buffer[:length])
    return digest.hexdigest()
