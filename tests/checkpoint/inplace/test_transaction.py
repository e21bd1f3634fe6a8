"""What an operation in place writes into its journal."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasurgery.checkpoint.inplace import transaction
from lorasurgery.checkpoint.inplace.transaction import Surgery

PIECES = {0: b"abcd", 4: b"efgh", 8: b"ijkl", 20: b"mnop", 16: b"qrst"}
"""Place, counted from the first byte of the data -> new bytes: three are side by side, and two are in the wrong order."""


def _changed(folder: Path) -> list[dict[str, object]]:
    """Put the pieces into a checkpoint of 32 bytes; the journal's lines as they were at the end."""
    save_file({"w": torch.zeros(8)}, folder / "model.safetensors")
    first = (folder / "model.safetensors").stat().st_size - 32
    with Surgery(folder, {"call": "merge"}, resume=False) as surgery:
        for place, data in PIECES.items():
            surgery.put(str(place), "model.safetensors", first + place, memoryview(data), [place])
        surgery.flush()
        journal = (surgery.folder / "journal").read_text()
        assert dict(surgery.done) == {str(place): [place] for place in PIECES}
        surgery.finish({}, staged={}, removed=[])
    data = (folder / "model.safetensors").read_bytes()[first:]
    assert data == b"abcdefghijkl" + bytes(4) + b"qrstmnop" + bytes(8)
    return [line for text in journal.splitlines() if "ready" in (line := json.loads(text))]


def test_pieces_side_by_side_are_one_entry(tmp_path: Path) -> None:
    """Entries that continue each other are joined, with the CRC of all their bytes; each piece keeps its record."""
    [line] = _changed(tmp_path)
    first = (tmp_path / "model.safetensors").stat().st_size - 32
    assert line["ready"] == [
        ["model.safetensors", first, 0, 12, zlib.crc32(b"abcdefghijkl")],
        ["model.safetensors", first + 20, 12, 4, zlib.crc32(b"mnop")],
        ["model.safetensors", first + 16, 16, 4, zlib.crc32(b"qrst")],
    ]
    assert line["done"] == {str(place): [place] for place in PIECES}


def test_a_batch_has_only_so_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of pieces is not held until 128 MB of them are there."""
    monkeypatch.setattr(transaction, "_PIECES", 2)
    lines = _changed(tmp_path)
    assert [len(line["done"]) for line in lines] == [2, 2, 1]  # type: ignore[arg-type]
    assert [len(line["ready"]) for line in lines] == [1, 2, 1]  # type: ignore[arg-type]
