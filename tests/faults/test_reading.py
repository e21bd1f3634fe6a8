"""A disk that can't be read: one line that names file and tensor; new outputs are absent, in place --resume finishes."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from long_runs import hashes
from operations import OPERATIONS, run, state
from system import Faults

from lorasurgery.checkpoint.inplace import transaction as surgery

READING = r"lorasurgery: (/.*: )?/.*\.safetensors: .*: cannot be read \(Input/output error\)"
GOES_ON = "; some tensors are changed already, and --resume goes on from here"


@pytest.mark.parametrize("name", OPERATIONS)
def test_at_every_read(
    name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever read fails, the line names it and what is left is as good as before, or finished by --resume."""
    operation, inputs = OPERATIONS[name], hashes(small)
    monkeypatch.setattr(surgery, "BATCH", 5000)
    faults = Faults(monkeypatch, ["preadv"], errno.EIO, once=True)
    for first in range(0, 100, 3):
        out = operation.prepare(small, tmp_path / str(first) / "out")
        before = state(out)
        faults.begin(first)
        done = run(*operation.words(small, out), fails=True)
        if not faults.end():
            break
        assert done.status == 1
        changed = done.line.endswith(GOES_ON) or done.line.endswith("--resume goes on once that is fixed")
        if not changed:
            assert re.fullmatch(READING, done.line) or "nothing was" in done.line, done.line
            assert state(out) == before
        else:
            assert operation.start
            run(*operation.words(small, out), "--resume")
            assert state(out) == whole[name]
    assert first > 2
    assert state(out) == whole[name]
    assert hashes(small) == inputs
