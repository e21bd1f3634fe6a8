"""Ctrl-C, SIGTERM and kill -9 in the middle of writing: one line where there can be one, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from children import Child
from long_runs import hashes
from operations import INSIDE, OPERATIONS, OUTSIDE, run, state

# a write after which some tensors are changed: what undoes small ones is written before the first of them
LATE = {"merge --in-place": 12, "unmerge --in-place": 2, "switch": 12}
GOES_ON = "some tensors are changed already, and --resume goes on from here"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_new_output_that_is_interrupted(number: int, name: str, small: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM clear away what was staged, and say so."""
    inputs, out = hashes(small), tmp_path / "out"
    child = Child(OPERATIONS[name].words(small, out), tmp_path / "log", 3)
    assert child.wait()
    assert child.send(number) == 1
    assert child.line == "lorasurgery: interrupted; nothing was left behind"
    assert not out.exists()
    assert hashes(small) == inputs


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_in_place_interrupted(
    number: int, name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM end it with a line that says whether --resume is needed; what it finishes is whole."""
    operation = OPERATIONS[name]
    for write, batch, expected in ((0, 1 << 20, "nothing was changed"), (LATE[name], 1, GOES_ON)):
        out = operation.prepare(small, tmp_path / str(write) / "out")
        before = state(out)
        child = Child(operation.words(small, out), tmp_path / "log", write, batch=batch)
        assert child.wait()
        assert child.send(number) == 1
        assert child.line == f"lorasurgery: interrupted; {expected}"
        if expected == GOES_ON:
            run(*operation.words(small, out), "--resume")
            assert state(out) == whole[name]
        else:
            assert state(out) == before


@pytest.mark.parametrize("name", OPERATIONS)
def test_kill_9(name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """After kill -9 the remains are named, nobody takes them for whole, and --resume ends with the same bytes."""
    operation, inputs, out = OPERATIONS[name], hashes(small), tmp_path / "out"
    operation.prepare(small, out)
    child = Child(operation.words(small, out), tmp_path / "log", LATE.get(name, 4))
    assert child.wait()
    assert child.send(signal.SIGKILL) == -signal.SIGKILL
    again = run(*operation.words(small, out), fails=True)
    assert again.status == 1
    if operation.start:
        assert again.line.endswith("the same command with --resume finishes it")
    else:
        assert again.line == (
            f"lorasurgery: {out}: holds only the remains of an interrupted run; --resume goes on with it, --overwrite "
            "clears them"
        )
    run(*operation.words(small, out), "--resume")
    assert state(out) == whole[name]
    assert hashes(small) == inputs
