"""Which merge is to be undone, and by which adapters: the last one, with the very content that was merged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import is_inside, leads_out, to_read
from lorasurgery.checkpoint.locate import load_bytes
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.hub.reference import SCHEME, parse_reference
from lorasurgery.ops.factors.sidecars import CONFIG, carried_files, patched_config, tokenizer_files
from lorasurgery.ops.merging.undo.record import Merged, UndoRecord, digest, merged_adapter, read_undo_record, stack
from lorasurgery.ops.placement.edits import EditPlan
from lorasurgery.ops.provenance.record import describe, read_record
from lorasurgery.report import RECORD_NAME

NO_UNDO = "--no-undo subtracts and rounds instead"


def begin_record(
    adapters: Sequence[Adapter], given: Sequence[str], weights: Sequence[float], blocks: Sequence[str],
    files: dict[str, bytes | None],
) -> UndoRecord:  # fmt: skip
    """The record of a merge as far as it is known in advance.

    Args:
        adapters: All that were named, with the paths they were given by.
        given: All that were named, with the paths they were given by.
        weights: All that were named, with the paths they were given by.
        files: Other files that the merge changes: name -> their bytes before.
    """
    merged = [merged_adapter(a, g, w) for a, g, w in zip(adapters, given, weights, strict=True) if w]
    return UndoRecord(merged, list(blocks), files=files)


def files_changed(base: Checkpoint, adapters: Sequence[Adapter], edits: EditPlan, out: Path) -> dict[str, bytes | None]:
    """Config and tokenizer files that a merge into a new folder changes: name -> their bytes before."""
    if base.is_file or out.suffix == ".safetensors":
        return {}
    before = carried_files(base.folder, parts=base.parts)
    after = carried_files(base.folder, adapters, parts=base.parts)
    found = {n: _bytes(before.get(n)) for n in {**before, **after} if before.get(n) != after.get(n)}
    about = base.folder / RECORD_NAME
    found[RECORD_NAME] = None if leads_out(about, base.folder) else _bytes(about)
    if patched_config(base.config, untied=edits.untied, vocab_size=edits.vocab_size) != base.config:
        found[CONFIG] = _bytes(before.get(CONFIG))
    return found


def files_in_place(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, bytes]:
    """Tokenizer files that a merge in place brings, where they differ from what is there: name -> new bytes."""
    if base.is_file:
        return {}
    new = {name: load_bytes(source) for name, source in tokenizer_files(adapters).items()}
    return {name: data for name, data in new.items() if _bytes(to_read(base.folder, name)) != data}


def before_in_place(base: Checkpoint, names: Sequence[str]) -> dict[str, bytes | None]:
    """What files of a checkpoint hold now, to be put back by the undoing.

    Raises:
        FormatError: one is a link that leads out of the folder: what it leads to would become part of the record.
    """
    return {} if base.is_file else {name: _bytes(to_read(base.folder, name)) for name in (*names, RECORD_NAME)}


def _bytes(path: Path | None) -> bytes | None:
    return load_bytes(path) if path is not None and path.is_file() else None


def record_to_undo(
    checkpoint: Path, adapters: Sequence[Adapter], undo_file: str | Path | None, weights: Sequence[float],
    blocks: Sequence[str],
) -> tuple[UndoRecord, list[Adapter]] | None:  # fmt: skip
    """The record of the last merge and its adapters in their order, None where there is no record.

    Args:
        weights: As given to unmerge; empty where they were not.
        blocks: As given to unmerge; empty where they were not.

    Raises:
        SurgeryError: another merge came later, an adapter is not the one that was merged, or strengths differ.
    """
    found = stack(checkpoint)
    if undo_file is None and not found:
        return None
    path = Path(undo_file) if undo_file is not None else found[-1]
    path = next((f for f in found if f.resolve() == path.resolve()), path)
    record = read_undo_record(path)
    if path in found[:-1]:
        raise SurgeryError(_out_of_order(checkpoint, record, read_undo_record(found[-1])))
    ordered = match(record, adapters, found if undo_file is None else [path])
    _check_strengths(record, adapters, ordered, weights, blocks)
    return record, ordered


def match(record: UndoRecord, adapters: Sequence[Adapter], records: Sequence[Path]) -> list[Adapter]:
    """The adapters in the record's order.

    Raises:
        MismatchError: they are not those that were merged last.
    """
    left = [(a, digest(a)) for a in adapters]
    ordered = []
    for merged in record.adapters:
        fit = next((pair for pair in left if pair[1] == merged.sha256), None)
        if fit is None:
            raise MismatchError(_no_fit(record, merged.name, [a for a, _ in left], records))
        left.remove(fit)
        ordered.append(fit[0])
    if left:
        raise MismatchError(f"{left[0][0].path}: was not part of the last merge ({record.names}); omit it")
    return ordered


def _no_fit(record: UndoRecord, wanted: str, left: Sequence[Adapter], records: Sequence[Path]) -> str:
    hashes = {digest(a): a for a in left}
    for path in reversed(records[:-1]):
        older = read_undo_record(path)
        if any(m.sha256 in hashes for m in older.adapters):
            return f"{older.names} was merged before {record.names}; undo {record.names} first ({show(str(path))})"
    if not left:
        return f"{show(str(record.path))}: the last merge was of {record.names}; {wanted} is not among those given"
    given = next((a for a in left if Path(a.path).name == wanted), left[0])
    if Path(given.path).name == wanted:
        return (
            f"{given.path}: is not the adapter that was merged: its weights or config changed since, so the merge "
            f"can't be undone to the bit; find the old one, or {NO_UNDO}"
        )
    return f"{given.path}: is not what was merged last; that was {record.names}; {NO_UNDO}"


def _out_of_order(checkpoint: Path, record: UndoRecord, last: UndoRecord) -> str:
    return (
        f"{show(str(checkpoint))}: {last.names} was merged after {record.names}; undo {last.names} first, for merges "
        "are undone in reverse order"
    )


def _check_strengths(
    record: UndoRecord, given: Sequence[Adapter], ordered: Sequence[Adapter], weights: Sequence[float],
    blocks: Sequence[str],
) -> None:  # fmt: skip
    for i, weight in enumerate(weights):
        place = next(n for n, a in enumerate(ordered) if a is given[i])
        merged = record.adapters[place]
        if weight != merged.weight:
            raise UsageError(
                f"-w {weight:g}: {merged.name} was merged with weight {merged.weight:g}, as the undo record knows; "
                "omit -w"
            )
    if blocks and list(blocks) != record.block_weights:
        raise UsageError("--block-weight: differs from what was merged, which the undo record knows; omit it")


def adapters_of(record: UndoRecord, elsewhere: Sequence[str | Path], places: Sequence[Path]) -> list[str | Path]:
    """Where the adapters of a record are: where they are said to be, in the Hub's cache, or by name in some folders.

    A record says nothing of where they lay, and what is found must have the content that was merged.

    Raises:
        SurgeryError: they are not there.
    """
    return list(elsewhere) or [_lies_at(merged, places) for merged in record.adapters]


def _lies_at(merged: Merged, places: Sequence[Path]) -> Path:
    named = is_inside(merged.name) and "/" not in merged.name
    found = [place / merged.name for place in places if named and (place / merged.name).exists()]
    found = [*_cached(merged), *found]
    for path in found:
        with suppress(SurgeryError, OSError):
            if digest(open_adapter(path)) == merged.sha256:
                return path
    if found:  # what is wrong with it is said where it is compared
        return found[0]
    where = " or ".join(dict.fromkeys(show(str(place)) for place in places))
    raise SurgeryError(f"{show(merged.name)}: was merged, and is not in {where}; --from says where it is")


def _cached(merged: Merged) -> list[Path]:
    if not merged.hub:
        return []
    from lorasurgery.hub.pull import from_cache

    with suppress(SurgeryError):
        reference = parse_reference(SCHEME + merged.hub.removeprefix(SCHEME))
        path = from_cache(reference) if reference else None
        return [path] if path else []
    return []


def about(call: str, given: Sequence[Adapter], device: str, **options: object) -> dict[str, object]:
    """What decides the result of an operation in place, so that only the same goes on after a kill."""
    return {"call": call, "adapters": [digest(a) for a in given], "device": device, **options}


_MERGING = ("merge", "switch")


def merged_weights(checkpoint: Path, adapters: Sequence[Adapter], warnings: list[str]) -> list[float | None]:
    """For each adapter the strength that a record says it was merged with; None where no record speaks of it.

    Args:
        warnings: Gets what of the records can't be read.
    """
    undo: dict[str, float] = {}
    for path in stack(checkpoint):
        with suppress(SurgeryError):  # who asks goes on without it
            undo |= {merged.sha256: merged.weight for merged in read_undo_record(path).adapters}
    said = _said(checkpoint, warnings)
    found: list[float | None] = []
    for adapter in adapters:
        hashes = _hashes([source.to_dict() for source in describe(adapter.path, [])])
        weight = undo.get(digest(adapter)) if undo else None
        found.append(said.get(hashes) if weight is None else weight)
    return found


def merged_names(checkpoint: Path) -> list[str]:
    """The adapters that lorasurgery.json says the last operation merged."""
    record = read_record(checkpoint, []) if checkpoint.is_dir() else {}
    merged = record.get("command") in _MERGING
    return [s["name"] for s in record["sources"] if s["kind"] == "adapter"] if merged else []


def _said(checkpoint: Path, warnings: list[str]) -> dict[frozenset[str], float]:
    """Strengths by the hashes of the adapters' files, as lorasurgery.json has them."""
    record = read_record(checkpoint, warnings) if checkpoint.is_dir() else {}
    if record.get("command") not in _MERGING:
        return {}
    adapters = [s for s in record["sources"] if s["kind"] == "adapter"]
    weights = record["totals"].get("weights", [])
    return {_hashes([s]): float(w) for s, w in zip(adapters, weights, strict=False) if w}


def _hashes(sources: Sequence[dict[str, Any]]) -> frozenset[str]:
    return frozenset(f.get("sha256") or f.get("header_sha256") or "" for s in sources for f in s["files"])
