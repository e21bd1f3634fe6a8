"""Every value read once: what is not finite is named, and what the records say of the bytes is held against them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo, show
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.threads import each, team
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rounding import is_finite
from lorasurgery.lowrank import widened
from lorasurgery.ops.merging.undo.record import UndoRecord, read_undo_record, stack
from lorasurgery.report import Checked, Progress, Report

_PIECE = 8 << 20


def find_nonfinite(model: Checkpoint, report: Report, progress: Progress | None) -> list[str]:
    """A sentence for each tensor with NaN or infinity; its line in the report's modules says how many."""
    found, done = [], 0
    with team():
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


def count_nonfinite(model: Checkpoint, info: TensorInfo) -> int:
    """How many values of a tensor are NaN or infinite; it is read in pieces, several at a time."""
    dtype, counts = torch_dtype(info.dtype), []

    def look(span: tuple[int, int]) -> None:
        raw = bytearray(span[1])
        model.fill(info.name, memoryview(raw), span[0])
        values = torch.frombuffer(raw, dtype=dtype)
        if not is_finite(values):
            counts.append(int((~torch.isfinite(values.to(widened(dtype)))).sum()))

    each(look, _spans(info.nbytes))
    return sum(counts)


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
    for at, length in _spans(size):
        model.fill(name, buffer[:length], start + at)
        digest.update(buffer[:length])
    return digest.hexdigest()


def _spans(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_PIECE, size - start)) for start in range(0, size, _PIECE))
