"""Disks that are really full: a limit on the size of files, a small file system, /dev/full."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from long_runs import hashes
from operations import INSIDE, OPERATIONS, OUTSIDE, run, state
from people import mounted

from lorasurgery.checkpoint.inplace import transaction as surgery
from lorasurgery.checkpoint.inplace.recover import unfinished
from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.errors import OutputError

FULL = r"lorasurgery: /.*: cannot be written \((File too large|No space left on device)\); "


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes; Python does not die of the signal but hears of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("size", [0, 100, 2000, 4000])
def test_files_of_a_limited_size(size: int, name: str, small: Path, tmp_path: Path) -> None:
    """A file that may not grow as large as it must: one line, and no output."""
    inputs, out = hashes(small), tmp_path / "out"
    with files_at_most(size):
        done = run(*OPERATIONS[name].words(small, out), fails=True)
    assert done.status == 1
    assert re.fullmatch(FULL + "nothing was left behind", done.line)
    assert not out.exists()
    assert hashes(small) == inputs


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("size, outcome", [(0, "old"), (300, "old"), (9000, "mixed")])
def test_in_place_with_such_files(
    size: int, outcome: str, name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same in place: nothing is changed, or some tensors are, and --resume finishes it when there is room."""
    monkeypatch.setattr(surgery, "BATCH", 1)
    out = OPERATIONS[name].prepare(small, tmp_path / "out")
    before = state(out)
    with files_at_most(size):
        done = run(*OPERATIONS[name].words(small, out), fails=True)
    assert done.status == 1
    if outcome == "old":
        assert re.fullmatch(FULL + "nothing was changed", done.line)
        assert state(out) == before
        return
    assert re.fullmatch(FULL + "--resume goes on once that is fixed", done.line)
    assert state(out) not in (before, whole[name])
    with files_at_most(size):  # still no room: nothing gets worse
        again = run(*OPERATIONS[name].words(small, out), "--resume", fails=True)
    assert re.fullmatch(FULL + "--resume goes on once that is fixed", again.line)
    run(*OPERATIONS[name].words(small, out), "--resume")
    assert state(out) == whole[name]


def test_half_a_line_of_the_journal(tmp_path: Path) -> None:
    """A disk that takes a part of a line and says so: the line does not count, and nothing is copied on its word."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100))
    with files_at_most(5000), pytest.raises(OutputError, match="nothing was changed"):
        with Surgery(file, {"call": "test"}, resume=False) as operation:
            operation.put("key", file.name, 0, memoryview(b"\1" * 50), "x" * 9000)
            operation.flush()
    assert file.read_bytes() == bytes(100)
    assert unfinished(file) is None


@pytest.mark.parametrize("name", ["merge --in-place", "switch", "merge --undo", "extract"])
def test_a_small_file_system(
    name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever room is left on it: done, or as it was, or gone on with by --resume once something else is deleted."""
    operation, seen = OPERATIONS[name], set()
    monkeypatch.setattr(surgery, "BATCH", 4096)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=260k") as disk:
        for pages in (0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 40):
            out = operation.prepare(small, disk / "out")
            before = state(out)
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 4096 * pages)))
            done = run(*operation.words(small, out), fails=True)
            ballast.unlink()
            if not done.status:
                outcome = "whole"
            else:
                assert re.match(FULL, done.line), done.line
                outcome = done.line.rpartition("; ")[2]
            seen.add(outcome)
            if "--resume" in outcome:
                run(*operation.words(small, out), "--resume")
            absent = outcome in ("nothing was changed", "nothing was left behind")
            assert state(out) == (before if absent else whole[name]) or outcome.startswith("the rest of ")
            shutil.rmtree(out, ignore_errors=True)
    assert len(seen) > 1
    assert "whole" in seen


def test_nowhere_to_print(small: Path, tmp_path: Path) -> None:
    """A report that can't be printed fails the command, in one line; the result is whole all the same."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    words = [
        sys.executable,
        "-m",
        "lorasurgery",
        "merge",
        str(small / "base"),
        str(small / "style"),
        "-o",
        str(tmp_path / "out"),
    ]
    with Path("/dev/full").open("w") as nowhere:
        done = subprocess.run([*words, "--json"], stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, "lorasurgery: system: No space left on device\n")
    run("merge", tmp_path / "out", small / "topic", "-o", tmp_path / "again")
