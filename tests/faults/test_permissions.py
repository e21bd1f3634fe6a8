"""Files and folders that may not be read or written: one line, and everything as it was."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from long_runs import hashes
from operations import INSIDE, OPERATIONS, OUTSIDE, run, state
from people import give_to_nobody, mounted, nobody, open_folder

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def here(small: Path, whole: dict[str, dict[str, str]]) -> Iterator[Path]:
    """A copy of the small world where nobody may work; `whole` has imported all that the operations need."""
    with open_folder() as folder:
        shutil.copytree(small, folder / "small")
        give_to_nobody(folder)
        yield folder


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_output_that_may_not_be_written(name: str, here: Path) -> None:
    """A folder without leave to write: the line says which, and there is no output."""
    (here / "closed").mkdir()
    (here / "closed").chmod(0o555)
    out = here / "closed/out"
    with nobody():
        done = run(*OPERATIONS[name].words(here / "small", out), fails=True)
    assert (done.status, done.line) == (
        1, f"lorasurgery: {out}: cannot be written (Permission denied); nothing was left behind",
    )  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_input_that_may_not_be_read(name: str, here: Path) -> None:
    """A shard or adapter without leave to read: the line names the file, nothing is written."""
    operation = OPERATIONS[name]
    out = operation.prepare(here / "small", here / "out")
    if operation.start:
        give_to_nobody(out)
    before = state(out)
    kind = {"extract": "tuned", "unmerge": "merged"}.get(name, "style")
    file = here / "small" / kind / ("adapter_model.safetensors" if kind == "style" else SHARD)
    file.chmod(0)
    with nobody():
        done = run(*operation.words(here / "small", out), fails=True)
    assert (done.status, done.line) == (1, f"lorasurgery: {file}: Permission denied")
    assert state(out) == before


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("what", ["shard", "folder"])
def test_a_checkpoint_that_may_not_be_written(what: str, name: str, here: Path) -> None:
    """In place on a file or folder without leave to write: refused before anything is computed."""
    operation = OPERATIONS[name]
    out = operation.prepare(here / "small", here / "out")
    give_to_nobody(out)
    (out / SHARD).chmod(0o444) if what == "shard" else out.chmod(0o555)
    before = hashes(out)
    with nobody():
        done = run(*operation.words(here / "small", out), fails=True)
    assert (done.status, done.line) == (1, f"lorasurgery: {out / SHARD}: may not be written to")
    assert hashes(out) == before


def test_a_file_system_that_is_read_only(small: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """A checkpoint there is read like any other; writing into it or beside it ends with one line."""
    copy = shutil.copytree(small / "base", tmp_path / "copy")
    with mounted(tmp_path / "here", "--bind", source=str(tmp_path / "copy")) as base:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(base)], check=True)
        run("merge", base, small / "style", "-o", tmp_path / "out")
        shards = {n: d for n, d in whole["merge"].items() if n.endswith(".safetensors")}
        assert {n: d for n, d in state(tmp_path / "out").items() if n in shards} == shards
        inside = run("merge", base, small / "style", "--in-place", fails=True)
        assert (inside.status, inside.line) == (1, f"lorasurgery: {base / SHARD}: may not be written to")
        beside = run("merge", small / "base", small / "style", "-o", base / "out", fails=True)
        assert beside.line == (
            f"lorasurgery: {base / 'out'}: cannot be written (Read-only file system); nothing was left behind"
        )
    assert hashes(copy) == hashes(small / "base")
