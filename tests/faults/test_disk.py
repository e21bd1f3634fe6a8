"""A disk that is full or fails, at every call that writes: inputs as they were, nothing half-way, and one line."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import pytest
from long_runs import hashes
from operations import INSIDE, OPERATIONS, OUTSIDE, Done, Operation, run, state
from system import GROWING, Faults

from lorasurgery.checkpoint.inplace import transaction as surgery
from lorasurgery.report import RECORD_NAME

LINE = r"lorasurgery: /.*: cannot be written \((No space left on device|Input/output error)\); "
OUTCOMES = {"absent": "nothing was left behind", "resumed": "what is finished is kept for --resume",
            "whole": r"the rest of .* is whole|all of it is there, but the disk did not say that it has it"}  # fmt: skip
MIDDLE = (
    r"lorasurgery: /.*: is in the middle of `(merge|unmerge|switch) out .*`, which was interrupted or still runs: some "
    "tensors are new and some are old; the same command with --resume finishes it"
)
KINDS = {"full": (GROWING, errno.ENOSPC, False), "broken": ((*GROWING, "replace"), errno.EIO, True)}


def failing(faults: Faults, operation: Operation, small: Path, out: Path, first: int) -> tuple[Done, bool]:
    """One run in which calls fail from number `first` on; and whether there were that many."""
    faults.begin(first)
    try:
        done = run(*operation.words(small, out), fails=True)
    finally:
        failed = faults.end()
    return done, failed


EVERY = pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow, id="every"), pytest.param(4, id="some")]
)


@EVERY
@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_output_at_every_call(
    kind: str,
    name: str,
    step: int,
    small: Path,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the disk refuses, the output is absent, whole, or finished by --resume, just as the line says."""
    operation, inputs, seen = OPERATIONS[name], hashes(small), set()
    calls, number, once = KINDS[kind]
    faults = Faults(monkeypatch, calls, number, once=once)
    for first in range(0, 200, step):
        out = tmp_path / str(first)
        done, failed = failing(faults, operation, small, out, first)
        if not failed:
            break
        if done.status == 0:  # the disk refused no more than to sync that the journal is gone
            assert state(out) == whole[name]
            continue
        assert done.status == 1
        (outcome,) = [key for key, text in OUTCOMES.items() if re.fullmatch(f"{LINE}({text})", done.line)]
        seen.add(outcome)
        if outcome == "resumed":
            run(*operation.words(small, out), "--resume")
        without = {} if outcome == "absent" else dict(whole[name])
        if outcome == "whole":
            without.pop(RECORD_NAME)
        assert state(out) == without, (first, done.line)
        assert out.exists() == bool(without)
    assert state(out) == whole[name]
    assert hashes(small) == inputs
    assert seen == set(OUTCOMES) if step == 1 else "absent" in seen


@EVERY
@pytest.mark.parametrize("name, old", [("merge", "tuned"), ("extract", "topic")])
def test_an_old_output_at_every_call(
    name: str, old: str, step: int, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With --overwrite the old output stays until the new one is complete; from then on --resume finishes it."""
    operation = OPERATIONS[name]
    faults = Faults(monkeypatch, *KINDS["broken"][:2], once=True)
    for first in range(0, 200, step):
        out = tmp_path / str(first)
        shutil.copytree(small / old, out)
        faults.begin(first)
        done = run(*operation.words(small, out), "--overwrite", fails=True)
        if not faults.end():
            break
        if done.status == 0:  # the disk refused no more than to remove the lock
            assert state(out) == whole[name]
            continue
        assert done.status == 1
        if done.line.endswith(OUTCOMES["absent"]):
            assert state(out) == state(small / old)
            continue
        if done.line.endswith("--resume"):
            run(*operation.words(small, out), "--resume")
        found, wanted = state(out), whole[name]
        assert all(found[n] == digest for n, digest in wanted.items() if n != RECORD_NAME)
        assert set(found) <= set(wanted)
    assert state(out) == whole[name]


@EVERY
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_at_every_call(
    kind: str,
    name: str,
    step: int,
    small: Path,
    whole: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the disk refuses, nothing is changed, or --resume finishes it; until then nobody reads a mixture."""
    operation, inputs = OPERATIONS[name], hashes(small)
    monkeypatch.setattr(surgery, "BATCH", 5000)  # so that some tensors are in their place when the disk fills up
    calls, number, once = KINDS[kind]
    faults = Faults(monkeypatch, calls, number, once=once)
    mixed = 0
    for first in range(0, 300, 2 * step - 1):
        out = operation.prepare(small, tmp_path / str(first) / "out")
        before = state(out)
        done, failed = failing(faults, operation, small, out, first)
        if not failed:
            break
        if not done.status:  # what failed had been done already, or did not matter
            assert state(out) == whole[name]
            continue
        assert re.fullmatch(f"{LINE}(nothing was changed|--resume goes on once that is fixed)", done.line), done.line
        changed = not done.line.endswith("nothing was changed")
        if not changed:
            assert state(out) == before, (first, done.line)
        look = run("merge", out, small / "topic", "-o", tmp_path / "new", "--dry-run", fails=True)
        assert look.status == changed
        assert not changed or re.fullmatch(MIDDLE, look.line)
        mixed += state(out) not in (before, whole[name])
        run(*operation.words(small, out), *["--resume"] * changed)
        assert state(out) == whole[name], (first, done.line)
    assert mixed > 1
    assert hashes(small) == inputs
