"""Undo records and journals that a downloaded checkpoint may bring along: they may not reach outside, nor grow."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hostile_files import Files, bytes_of, data_of, header_of, laid_out
from hostile_line import refused, state, within
from hostile_mutate import nested

from lorasurgery.checkpoint.inplace.recover import recover_first, unfinished
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, MismatchError
from lorasurgery.ops.merging.undo.record import read_undo_record
from lorasurgery.ops.merging.undo.recorder import unpack_corrections, unpack_difference

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("good") / "good")


def set_in(table: Any, value: Any, *keys: Any) -> None:
    """Set what lies under some keys."""
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value


def first(about: dict[str, Any]) -> dict[str, Any]:
    """The first tensor of a record."""
    found: dict[str, Any] = next(iter(about["tensors"].values()))
    return found


EVIL = base64.b64encode(b"evil").decode()
RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file outside": lambda a: set_in(a, {"../../evil": EVIL}, "files"),
    "an absolute file": lambda a: set_in(a, {"/tmp/lorasurgery-evil": EVIL}, "files"),
    "a hidden file": lambda a: set_in(a, {".git/hooks/post-checkout": EVIL}, "files"),
    "weights as a file": lambda a: set_in(a, {SHARD: EVIL}, "files"),
    "a file of numbers": lambda a: set_in(a, {"config.json": 5}, "files"),
    "stretches that overlap": lambda a: first(a)["stretches"].append(first(a)["stretches"][0]),
    "no stretches": lambda a: first(a)["stretches"].clear(),
    "a stretch of exabytes": lambda a: set_in(first(a), 2**60, "stretches", 0, 1),
    "data behind the end": lambda a: set_in(first(a), 2**40, "stretches", 0, 2),
    "a negative place": lambda a: set_in(first(a), -1, "stretches", 0, 2),
    "a shape of exabytes": lambda a: set_in(first(a), [2**31, 2**31], "shape"),
    "a shape in words": lambda a: set_in(first(a), "88", "shape"),
    "an unknown dtype": lambda a: set_in(first(a), "F7", "dtype"),
    "an unknown kind": lambda a: set_in(first(a), "stolen", "kind"),
    "an unknown way": lambda a: set_in(first(a), "magic", "stretches", 0, 6),
    "a weight of NaN": lambda a: set_in(a, float("nan"), "adapters", 0, "weight"),
    "a name of numbers": lambda a: set_in(a, 5, "adapters", 0, "name"),
    "no adapters": lambda a: set_in(a, [], "adapters"),
    "strengths of nothing": lambda a: set_in(a, ["nonsense"], "block_weights"),
    "nested for ever": lambda a: set_in(a, nested(200), "version"),
    "no tensors": lambda a: a.pop("tensors"),
    "another format": lambda a: set_in(a, 7, "format"),
}


def forge(path: Path, about: bytes) -> None:
    """Write another `about` into a record."""
    header, data = header_of(path), data_of(path)
    kept = data[slice(*header["data"]["data_offsets"])]
    new, _ = laid_out({"about": ("U8", [len(about)]), "data": ("U8", [len(kept)])})
    path.write_bytes(bytes_of(new, about + kept))


def about_of(path: Path) -> dict[str, Any]:
    """What a record says."""
    found: dict[str, Any] = json.loads(data_of(path)[slice(*header_of(path)["about"]["data_offsets"])])
    return found


@pytest.mark.parametrize("case", RECORDS)
def test_forged_records_are_refused(case: str, files: Files, tmp_path: Path) -> None:
    """A record that names files elsewhere, or more than there is, is refused by name; nothing is changed."""
    merged = Path(shutil.copytree(files.merged, tmp_path / "merged"))
    path = merged / "lorasurgery-undo" / "0001.safetensors"
    about = about_of(path)
    RECORDS[case](about)
    forge(path, json.dumps(about).encode())
    for words in (
        ["unmerge", merged, files.adapter, "--in-place"],
        ["unmerge", merged, files.adapter, "-o", tmp_path / "out"],
    ):
        assert "0001.safetensors" in refused(words, tmp_path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"[" * 200_000, b'{"format": 1}'])
def test_records_that_are_none(raw: bytes, files: Files, tmp_path: Path) -> None:
    """`about` that is not JSON object is a damaged record."""
    path = Path(shutil.copy(files.merged / "lorasurgery-undo" / "0001.safetensors", tmp_path))
    forge(path, raw)
    with within(), pytest.raises(FormatError, match=r"0001\.safetensors: is a damaged"):
        read_undo_record(path)
    with pytest.raises(FormatError, match="is not an undo record"):
        read_undo_record(files.base / SHARD)


def test_packed_bombs_are_not_unpacked() -> None:
    """A hundred bytes that unpack to gigabytes are refused before, whether they say so or not."""
    said = zstandard.ZstdCompressor().compress(bytes(10**9))
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**8))
    for bomb in (said, unsaid):
        with within(), pytest.raises(FormatError, match="damaged"):
            unpack_difference(bomb, None, 2, 100)
        with within(), pytest.raises(FormatError, match="damaged"):
            unpack_corrections(bomb, 2, 100)


ABOUT = {"about": {"call": "merge base adapter --in-place"}}
READY = {"ready": [[SHARD, 900, 0, 4, 3057449933]], "done": {"0 x": [None, []]}}
JOURNALS: dict[str, list[Any]] = {
    "bytes elsewhere": [ABOUT, {"ready": [["../evil", 0, 0, 4, 3057449933]], "done": {}}],
    "bytes anywhere": [ABOUT, {"ready": [["/tmp/lorasurgery-evil", 0, 0, 4, 3057449933]], "done": {}}],
    "bytes into a config": [ABOUT, {"ready": [["config.json", 0, 0, 4, 3057449933]], "done": {}}],
    "bytes behind the end": [ABOUT, {"ready": [[SHARD, 10**12, 0, 4, 3057449933]], "done": {}}],
    "bytes through a link": [ABOUT, {"ready": [["link.safetensors", 0, 0, 4, 3057449933]], "done": {}}],
    "bytes that are others": [ABOUT, {"ready": [[SHARD, 900, 0, 4, 1]], "done": {}}],
    "exabytes": [ABOUT, {"ready": [[SHARD, 0, 0, 2**60, 1]], "done": {}}],
    "a file moved out": [ABOUT, {"ending": {"0": "../evil"}, "removed": []}],
    "a file moved in": [ABOUT, {"ending": {"/../../../secret": "config.json"}, "removed": []}],
    "a file removed elsewhere": [ABOUT, {"ending": {}, "removed": ["../secret"]}],
    "a folder removed": [ABOUT, {"ending": {}, "removed": ["sub"]}],
    "a name too long": [ABOUT, {"ending": {"0": "n" * 5000}, "removed": []}],
    "half a character": [ABOUT, {"ending": {"0": "\ud800"}, "removed": []}],
    "numbers for names": [ABOUT, {"ending": {"0": 5}, "removed": [None]}],
    "no lists": [ABOUT, {"ready": 5, "done": 6}],
    "no operation": [{"about": []}],
    "another beginning": [READY],
    "two beginnings": [ABOUT, ABOUT],
    "nested for ever": [{"about": {"call": "merge", "x": nested(200)}}],
}


def journal(base: Path, raw: bytes) -> Path:
    """A checkpoint in the middle of an operation, by its journal."""
    folder = base / ".lorasurgery-surgery"
    folder.mkdir()
    (folder / "redo").write_bytes(b"\1\2\3\4")
    (folder / "new-0").write_bytes(b"{}")
    (folder / "journal").write_bytes(raw)
    (base / "sub").mkdir()
    (base.parent / "secret").write_bytes(b"secret")
    (base / "link.safetensors").symlink_to(base.parent / "secret")
    return base


@pytest.mark.parametrize("case", JOURNALS)
def test_forged_journals_are_refused(case: str, files: Files, tmp_path: Path) -> None:
    """A journal that speaks of other files, or is none, is named in one line by every command; nothing is changed."""
    base = journal(Path(shutil.copytree(files.base, tmp_path / "base")), b"")
    (base / ".lorasurgery-surgery/journal").write_bytes(
        b"".join(json.dumps(x).encode() + b"\n" for x in JOURNALS[case])
    )
    in_place = ["merge", base, files.adapter, "--in-place"]
    for words in (in_place, [*in_place, "--resume"], ["merge", base, files.adapter, "-o", tmp_path / "out"]):
        line = refused(words, tmp_path)
        assert "base" in line
        assert case == "bytes that are others" or "journal: " in line


@pytest.mark.parametrize("raw", [b"garbage\n", b"\0" * 100 + b"\n", b"[]\n", b"\n", b"[" * 200_000 + b"\n"])
def test_what_is_no_journal(raw: bytes, files: Files, tmp_path: Path) -> None:
    """A first line that was written to its end but says nothing is damage; one cut short is not a beginning at all."""
    base = journal(Path(shutil.copytree(files.base, tmp_path / "base")), raw)
    with within(), pytest.raises(FormatError, match="journal: is damaged"):
        Checkpoint.open(base)
    (base / ".lorasurgery-surgery/journal").write_bytes(raw[:-1])
    assert unfinished(base) is None


def test_true_journals_are_followed(files: Files, tmp_path: Path) -> None:
    """What a kill leaves is understood as before: readers are kept away, and what was ready gets its place."""
    lines = b"".join(json.dumps(x).encode() + b"\n" for x in (ABOUT, {"checked": True, "noted": []}, READY))
    base = journal(Path(shutil.copytree(files.base, tmp_path / "base")), lines + b'{"app')
    with pytest.raises(MismatchError, match="in the middle of"):
        Checkpoint.open(base)
    before = state(base)[str(base / SHARD)]
    assert recover_first(base, resume=True) is False
    after = (base / SHARD).read_bytes()
    assert isinstance(before, bytes)
    assert after[900:904] == b"\1\2\3\4"
    assert after[:900] + after[904:] == before[:900] + before[904:]


def test_a_journal_behind_a_link_is_refused(files: Files, tmp_path: Path) -> None:
    """A journal's folder that is a link would have other folders cleared away."""
    base = journal(Path(shutil.copytree(files.base, tmp_path / "base")), json.dumps(ABOUT).encode() + b"\n")
    folder = base / ".lorasurgery-surgery"
    (folder / "heap").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="beside a link"):
        Checkpoint.open(base)
    (folder / "heap").unlink()
    folder.rename(tmp_path / "precious")
    folder.symlink_to(tmp_path / "precious")
    with pytest.raises(FormatError, match="beside a link"):
        Checkpoint.open(base)


def test_a_lock_that_is_a_link_is_refused(files: Files, tmp_path: Path) -> None:
    """To lock a file may empty it, so a lock that leads to another file is none."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    (tmp_path / "secret").write_bytes(b"secret")
    (base / ".lorasurgery-lock").symlink_to(tmp_path / "secret")
    assert "lorasurgery-lock" in refused(["merge", base, files.adapter, "--in-place"], tmp_path)
