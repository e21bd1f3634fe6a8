"""What headers, index and config say of each other, without reading a tensor."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import TensorInfo, show
from lorasurgery.checkpoint.inplace.recover import in_the_middle, unfinished
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.buffers import Buffers, spans
from lorasurgery.engine.pipeline import Flow
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.engine.threads import team
from lorasurgery.errors import SurgeryError, UnsupportedError, UsageError, some
from lorasurgery.linalg.undo import BITS, ordered
from lorasurgery.module_location import place_of
from lorasurgery.ops.extraction.difference import count_nonfinite
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.merging.tensor_jobs import Note, jobs_of
from lorasurgery.ops.merging.undo.record import UndoRecord, read_undo_record, stack
from lorasurgery.ops.merging.undo.recorder import is_kept_as_steps
from lorasurgery.ops.merging.undo.select import match
from lorasurgery.ops.placement.block_weight import check_weights, weighed_plan
from lorasurgery.ops.placement.edits import EditPlan
from lorasurgery.ops.placement.plan import plan_edits
from lorasurgery.ops.provenance.references import on_references
from lorasurgery.report import Checked, Progress, Report


def findings_in_checkpoint(model: Checkpoint) -> list[str]:
    """What does not agree: index and files, config and shapes."""
    return [*_in_index(model), *_in_config(model), *_unreadable(model)]


def _in_index(model: Checkpoint) -> Iterator[str]:
    for name in [model.index_name] if model.index_name else model.indexes.values():
        index = load_object(model.folder / name)
        listed = set(index.get("weight_map", {}))
        prefix = next((p for p, n in model.indexes.items() if n == name), "")
        here = {n.removeprefix(prefix): i for n, i in model.tensors.items() if n.startswith(prefix)}
        missing = sorted(set(here) - listed)
        if missing:
            yield f"{name}: does not list {some(missing)}, which the files hold; loaders pass over them"
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(i.nbytes for i in here.values())
        if total is not None and total != found:
            yield f"{name}: says {total} bytes of tensors but the files hold {found}"
    if model.index_name:
        stray = sorted(
            f.name
            for f in model.folder.glob("*.safetensors")
            if f.name not in model.files and not f.name.startswith(".")
        )
        if stray:
            yield f"{some(stray)}: lies beside the shards, but the index does not name it"


def _in_config(model: Checkpoint) -> Iterator[str]:
    config = model.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    settings: dict[str, Any] = {**config, **(text or {})}
    names = BaseNames(model.tensors, config, str(model.path))
    embedding = names.input_embedding
    vocabulary = settings.get("vocab_size")
    if embedding and not model.parts and isinstance(vocabulary, int):
        rows = model.tensors[embedding].shape[0]
        if rows < vocabulary:  # more are common: tables are padded
            yield f"config.json: vocab_size is {vocabulary} but {show(embedding)} has {rows} rows"
    yield from _in_layers(model, settings.get("num_hidden_layers"))


def _in_layers(model: Checkpoint, said: Any) -> Iterator[str]:
    """Whether there are as many layers as the config says, and none is missing in between."""
    if not isinstance(said, int):
        return
    stacks: dict[str, set[int]] = {}
    for name in model.tensors:
        place = place_of(name.removesuffix(".weight"))
        if place.layer is not None:
            stacks.setdefault(place.stack, set()).add(place.layer)
    most = max((max(found) + 1 for found in stacks.values()), default=0)
    if 0 < most < said:
        yield f"config.json: num_hidden_layers is {said} but the files hold {most}"
    for prefix, found in stacks.items():
        gaps = most - len(found)
        if gaps and max(found) + 1 == most <= said:  # the first few are looked for, not all up to a far number
            first = [str(n) for n in islice((n for n in range(most) if n not in found), 3)]
            more = f" and {gaps - 3} more" if gaps > 3 else ""
            yield f"{prefix}: layers {', '.join(first)}{more} are missing"


def _unreadable(model: Checkpoint) -> Iterator[str]:
    strange = set()
    for info in model.tensors.values():
        try:
            torch_dtype(info.dtype)
        except UnsupportedError:
            strange.add(info.dtype)
    if strange:
        yield f"dtypes {', '.join(sorted(strange))}: can be copied, but nothing here can compute with them"


def findings_in_adapter(adapter: Adapter) -> list[str]:
    """What of an adapter's file has no meaning, and scales that no training gives."""
    used = {name for d in adapter.deltas.values() for name in (*d.names, d.bias, d.magnitude) if name}
    used |= {*adapter.replaced.values(), *adapter.diffs.values(), *(key for key, _ in adapter.tokens.values())}
    left = sorted(n for n in set(adapter.weights.tensors) - used if not n.endswith((".alpha", ".dora_scale")))
    found = [f"{some(left)}: belong to no update"] if left and adapter.format == "peft" and not adapter.members else []
    zero = [path for path, d in adapter.deltas.items() if d.scale == 0]
    return found + ([f"{some(zero)}: the scale is 0, so nothing would change"] if zero else [])


@on_references("path", "against", "adapters")
def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    block_weights: Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Read everything once and say whether it holds: headers, index, config, every value finite, undo records.

    Example:
        verify("merged", against="llama", adapters=["style"]).totals["holds"]

    Args:
        path: Checkpoint or adapter. against: The checkpoint that it was made from: an adapter must match it tensor by
            tensor, a checkpoint must equal it, plus `adapters` with `weights` and `block_weights` as they were merged.

    Returns:
        `totals`: `holds`; `findings`, a sentence each; `equal`, of a comparison: `rounding` (every value is within
        one step of rounding, or float32's error in the sum, of base + adapters), `bits` (that, and by the hashes of the
        merge's record these are the bytes it met and wrote; without adapters: the same bytes) or `no`.

    Raises:
        SurgeryError: it can't be read at all, in one line. UsageError: adapters without `against`.
    """
    clock = Clock()
    check_device_name(device)
    if adapters and against is None:
        raise UsageError("--adapter: needs --against BASE, which it was merged into")
    strengths = check_weights(weights, len(adapters)) if adapters else []
    report = Report("verify", [str(path), *map(str, adapters), *([str(against)] if against is not None else [])], "")
    report.totals = {"what": "checkpoint", "holds": True, "findings": []}
    if Path(path).exists() and is_adapter(Path(path)):
        _verify_adapter(open_adapter(path), against, report, progress)
    else:
        _verify_checkpoint(path, against, [open_adapter(a) for a in adapters], strengths, block_weights, report,
                           device, progress)  # fmt: skip
    found = report.totals["findings"]
    report.totals["holds"] = not found and report.totals.get("equal") != "no"
    report.summary = _summary(str(path), report)
    return clock.stamp(report)


def _verify_adapter(adapter: Adapter, against: str | Path | None, report: Report, progress: Progress | None) -> None:

    report.totals |= {"what": "adapter", "tensors": len(adapter.weights.tensors)}
    found = findings_in_adapter(adapter)
    if against is not None:
        report.totals["matched"] = plan_edits(Checkpoint.open(against), [adapter], [1.0]).matched
    found += find_nonfinite(adapter.weights, report, progress)
    report.totals["findings"] = found
    report.bytes_read = adapter.weights.bytes_read


def _verify_checkpoint(
    path: str | Path, against: str | Path | None, adapters: list[Adapter], strengths: list[float],
    block_weights: Sequence[str], report: Report, device: str, progress: Progress | None,
) -> None:  # fmt: skip

    model = Checkpoint.open(path, unfinished=True)
    report.totals["tensors"] = len(model.tensors)
    about = unfinished(Path(path))
    found = [in_the_middle(Path(path), about)] if about is not None else findings_in_checkpoint(model)
    found += find_nonfinite(model, report, progress)
    if about is None:
        found += check_records(model)
    report.totals["findings"] = found
    if against is not None:
        base = Checkpoint.open(against)
        chosen = resolve_device(device)
        report.device = str(chosen)
        plan = weighed_plan(base, adapters, strengths, block_weights)
        equal = compare(model, base, adapters, plan, report, chosen)
        # a record alone shows nothing, for whoever changed the weights could have changed it too
        if equal == "rounding" and has_true_record(model, base, adapters, strengths, block_weights, report):
            equal = "bits"
        report.totals["equal"] = equal
        report.bytes_read += base.bytes_read
    report.bytes_read += model.bytes_read


_EQUAL = {"bits": "equal to the bit", "rounding": "equal to rounding", "no": "not equal"}


def _summary(path: str, report: Report) -> str:
    totals = report.totals
    count = f"{totals['tensors']} tensors"
    what = f"{path}: {totals['what']} of {count}"
    equal = f"; {_EQUAL[totals['equal']]} to what it is compared with" if "equal" in totals else ""
    if not totals["findings"]:
        return f"{what}, whole and finite{equal}"
    return "\n".join([f"{what}{equal}:", *(f"  {sentence}" for sentence in totals["findings"])])


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


def compare(
    model: Checkpoint, base: Checkpoint, adapters: list[Adapter], plan: EditPlan, report: Report, device: torch.device
) -> str:
    """Compute what the merge would be and hold it against what is there, tensor by tensor."""
    recipe = Recipe(base, adapters, plan, Path("unused"))
    lines = {
        name: _line(name, model, base, plan) for name in dict.fromkeys([*model.tensors, *base.tensors, *plan.edits])
    }
    slots: dict[str, _Compared] = {}
    buffers = Buffers(device)
    with team():
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
            jobs.append((recipe, planned, slots[name], device, buffers))
        Flow(_ROOM).run(job for given in jobs for _, job in jobs_of(*given))
    report.warnings += recipe.fallback.warnings
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
    if one is None or two is None or (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    pairs = zip(model.chunks(name), base.chunks(name), strict=True)
    return all(a == b for a, b in pairs)


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
