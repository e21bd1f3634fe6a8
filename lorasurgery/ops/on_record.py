"""What the records beside a checkpoint say was merged into it: undo records, and lorasurgery.json."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.record import describe, read_record
from lorasurgery.ops.undo_record import digest, stack
from lorasurgery.ops.undo_record import read_record as read_undo

_MERGING = ("merge", "switch")


def merged_weights(checkpoint: Path, adapters: Sequence[Adapter], warnings: list[str]) -> list[float | None]:
    """For each adapter the strength that a record says it was merged with; None where no record speaks of it.

    Args:
        warnings: Gets what of the records can't be read.
    """
    undo: dict[str, float] = {}
    for path in stack(checkpoint):
        with suppress(SurgeryError):  # who asks goes on without it
            undo |= {merged.sha256: merged.weight for merged in read_undo(path).adapters}
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
