"""Others' remains: a journal above a checkpoint, or beside a file of it, counts only when it proves to be about it."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trust_world import NAMES, SHARD, adapter, checkpoint, pipeline

from lorasurgery.checkpoint.inplace.recover import FOLDER, about_files_of
from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.verify import verify

ABOUT = {"about": {"call": "merge llama style --in-place"}}


def lines(*items: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def ready(name: str, size: int = 64, crc: int = 1, place: int = 0) -> dict[str, Any]:
    return {"ready": [[name, place, 0, size, crc]], "done": {}}


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"garbage\n",
    "zeros": b"\0" * 1000 + b"\n",
    "a list": b"[]\n",
    "brackets": b"[" * 200_000 + b"\n",
    "cut": lines(ABOUT)[:-5],
    "an operation that did nothing": lines(ABOUT),
    "no operation": lines({"about": 5}, ready(f"ck/{SHARD}")),
    "numbers": lines(ABOUT, {"ready": 5}),
    "other numbers": lines(ABOUT, {"ready": [5, [], [1, 2], [f"ck/{SHARD}", "a", -1, 2.5, None]], "done": {}}),
    "another place": lines(ABOUT, ready(f"other/{SHARD}")),
    "bytes that it did not write": lines(ABOUT, ready(f"ck/{SHARD}"), {"applied": True}),
    "no bytes": lines(ABOUT, ready(f"ck/{SHARD}", 0, 0), {"applied": True}),
    "more bytes than there are": lines(ABOUT, ready(f"ck/{SHARD}", 2**60)),
    "out of it": lines(ABOUT, ready(f"../{SHARD}"), ready(f"/{SHARD}")),
}


@pytest.mark.parametrize("above", ["..", "../.."])
@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_above_stops_nobody(case: str, above: str, tmp_path: Path) -> None:
    """A journal in one of two folders above that proves nothing is passed over: inspect, verify and merge do their work."""
    ck, style = checkpoint(tmp_path / "models/ck"), adapter(tmp_path / "style")
    folder = ck / above / FOLDER
    folder.mkdir()
    raw = GARBAGE[case].replace(b'"ck/', b'"models/ck/') if above == "../.." else GARBAGE[case]
    (folder / "journal").write_bytes(raw)
    (folder / "redo").write_bytes(bytes(range(64)))
    assert inspect(ck).totals["tensors"] == 2
    assert verify(ck).totals["holds"]
    merge(ck, [style], tmp_path / "OUT", allow_loss=True)
    assert (folder / "journal").read_bytes() == raw


@pytest.mark.parametrize("kind", ["journal", "folder", "fifo"])
def test_what_is_no_file_above_stops_nobody(kind: str, tmp_path: Path) -> None:
    """Nor does a link, a folder or a pipe under a journal's name."""
    ck = checkpoint(tmp_path / "ck")
    folder = tmp_path / FOLDER
    if kind == "folder":
        folder.symlink_to(ck)
    else:
        folder.mkdir()
        (folder / "journal").symlink_to("/dev/zero") if kind == "journal" else os.mkfifo(folder / "journal")
    assert inspect(ck).totals["tensors"] == 2


def test_a_forged_journal_with_true_sums_needs_a_checkpoint_around_it(tmp_path: Path) -> None:
    """Whoever knows the weights knows their sums too; but a folder that is not a checkpoint is in the middle of nothing."""
    ck = checkpoint(tmp_path / "ck")
    (tmp_path / FOLDER).mkdir()
    crc = zlib.crc32((ck / SHARD).read_bytes()[:64])
    (tmp_path / FOLDER / "journal").write_bytes(lines(ABOUT, ready(f"ck/{SHARD}", 64, crc), {"applied": True}))
    assert inspect(ck).totals["tensors"] == 2


def test_a_forged_journal_in_a_forged_pipeline(tmp_path: Path) -> None:
    """With an index of a pipeline beside it the journal still has to have written something."""
    ck = checkpoint(tmp_path / "ck")
    (tmp_path / "model_index.json").write_text("{}")
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "redo").write_bytes(b"\x5a" * 4096)
    crc = zlib.crc32(b"\x5a" * 1024)
    (folder / "journal").write_bytes(lines(ABOUT, ready(f"ck/{SHARD}", 1024, crc)))
    assert inspect(ck).totals["tensors"] == 2
    assert about_files_of(folder, tmp_path, ck) is None


def test_a_file_behind_a_link_is_passed_over(tmp_path: Path) -> None:
    """Nothing is read through a link for the proof; what the same line says of the other files still counts."""
    ck, folder = checkpoint(tmp_path / "ck"), tmp_path / "remains"
    (ck / SHARD).rename(ck / "elsewhere.bin")
    (ck / SHARD).symlink_to("elsewhere.bin")
    folder.mkdir()
    other = SHARD.replace("00001-of", "00002-of")
    true = [[name, 0, 0, 64, zlib.crc32((ck / name).read_bytes()[:64])] for name in (SHARD, other)]
    for listed, about in ((true[:1], None), (true, ABOUT["about"])):
        (folder / "journal").write_bytes(lines(ABOUT, {"ready": listed, "done": {}}, {"applied": True}))
        assert about_files_of(folder, ck, ck) == about


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_true_one_counts(named: str, applied: bool, tmp_path: Path) -> None:
    """A part, or a file of it, of a pipeline that is half-changed is refused: from the first sector that is new."""
    pipe = pipeline(tmp_path / "pipe")
    file = pipe / "text_encoder/model.safetensors"
    part = file.parent if named == "folder" else file
    place = len(file.read_bytes()) - 1024
    with pytest.raises(KeyboardInterrupt), Surgery(pipe, {"call": "merge pipe x --in-place"}, resume=False) as surgery:
        surgery.put("0 w", "text_encoder/model.safetensors", place, memoryview(b"\x11" * 1024), [None, []])
        surgery.flush()
        raise KeyboardInterrupt
    journal = pipe / FOLDER / "journal"
    if not applied:  # killed in the middle of copying: one sector is there
        written = file.read_bytes()
        file.write_bytes(written[: place + 512] + bytes(512))
        journal.write_bytes(journal.read_bytes().replace(b'{"applied": true}\n', b""))
    with pytest.raises(MismatchError, match=r"pipe: is in the middle of `merge pipe x --in-place`"):
        Checkpoint.open(part)
    if not applied:  # and before the first: all is old, and may be read
        file.write_bytes(file.read_bytes()[:place] + b"\x22" * 1024)
        assert len(Checkpoint.open(part).tensors) == 1


def test_a_true_one_beside_a_file_of_a_folder(tmp_path: Path) -> None:
    """A shard that was changed on its own and not to the end makes its folder a mixture; garbage beside it does not."""
    ck = checkpoint(tmp_path / "ck")
    shard = ck / SHARD
    place = len(shard.read_bytes()) - 64
    beside = ck / f".{SHARD}{FOLDER}"
    beside.mkdir()
    (beside / "journal").write_bytes(b"garbage\n")
    assert inspect(ck).totals["tensors"] == 2
    (beside / "journal").unlink()
    beside.rmdir()
    with pytest.raises(KeyboardInterrupt), Surgery(shard, {"call": "merge shard\nx"}, resume=False) as surgery:
        surgery.put("0 w", SHARD, place, memoryview(bytes(64)), [None, []])
        surgery.flush()
        raise KeyboardInterrupt
    with pytest.raises(MismatchError, match=r"in the middle of `'merge shard\\nx'`") as caught:
        inspect(ck)
    assert "\n" not in str(caught.value)
    assert f"{NAMES[0]}.weight" in load_file(shard)
