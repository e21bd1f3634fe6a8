"""New outputs stopped at every call of the system: no name before its file is whole, and --resume ends where it would."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from cases import CASES, OUTSIDE, World, remains, state
from stopping import Stop, calls_of, run, spread, stops, tally

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint import journal
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import OutputError, SurgeryError
from lorasurgery.report import RECORD_NAME


def check(world: World, name: str, first: Stop, *more: Stop) -> bool:
    """Stop there, and there again in what goes on with it; look, go on and look. Returns whether it was stopped."""
    place = world.place(CASES[name])
    old, new = state(place), world.whole(name)
    stopped, _ = run(name, world.root, place, first)
    for stop in more:
        run(name, world.root, place, stop, resume=True)
    found = state(place)
    for file, digest in found.items():
        assert digest in (old.get(file), new.get(file)), f"{file} is neither old nor new"
    if is_taken_for_whole(place):
        assert without_record(found) in (without_record(old), without_record(new))
    if not first.call:
        assert found == new, "what was reported as done was not on the disk"
    boot = journal._boot() if {first.seed, *(s.seed for s in more)} == {None} else "another start"
    with patch.object(journal, "_boot", lambda: boot):
        finish(world, name, place)
    assert state(place) == new
    assert not remains(place)
    shutil.rmtree(place.parent)
    return stopped


def is_taken_for_whole(place: Path) -> bool:
    """Whether a reader takes what lies there for a checkpoint or an adapter."""
    for opener in (Checkpoint.open, open_adapter):
        try:
            opener(place)
        except SurgeryError:
            continue
        return True
    return False


def without_record(found: dict[str, str]) -> dict[str, str]:
    """The same without lorasurgery.json, which tells of a result that is whole without it."""
    return {name: digest for name, digest in found.items() if not name.endswith(RECORD_NAME)}


def finish(world: World, name: str, place: Path) -> None:
    """The same command with --resume, and where it says so with --overwrite."""
    try:
        CASES[name].work(world.folder, place, resume=True)
    except OutputError as problem:
        assert "overwrite=True" in str(problem)
        if remains(place) or state(place) != world.whole(name):
            CASES[name].work(world.folder, place, overwrite=True)


@pytest.mark.parametrize("name", OUTSIDE)
def test_some_stops(name: str, world: World) -> None:
    """Killed or cut off at calls spread over the operation, it is resumed to the same bytes."""
    found = spread(list(stops(calls_of(name, world), cuts=1)), 6)
    assert sum(check(world, name, stop) for stop in found) >= 5, "too few of them came to pass"


def test_stopped_again_while_it_goes_on(world: World) -> None:
    """Stopped between two names, and again while the names are taken back."""
    names = [i for i, call in enumerate(calls_of("merge", world), 1) if call.startswith("rename out/model-")]
    assert len(names) == 3
    for again in (Stop(3), Stop(6, seed=1)):
        assert check(world, "merge", Stop(names[1]), again)


def test_killed_while_the_old_output_is_taken_away(world: World) -> None:
    """Whoever goes on still knows the old shards, for the index that names them goes after them: none of them stays."""
    calls = calls_of("merge --overwrite", world)
    gone = [i for i, call in enumerate(calls, 1) if re.match(r"unlink out/(model|lorasurgery\.json)", call)]
    shards = [i for i in gone if "-of-" in calls[i - 1]]
    assert len(shards) == 4
    assert len(gone) - len(shards) >= 2, "too few to prove anything"
    assert all(check(world, "merge --overwrite", Stop(number + 1)) for number in gone)


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_every_stop(name: str, world: World) -> None:
    """Each call of the system: a kill before it, a kill in the middle of a write, a power cut before it."""
    tally(name, [(stop, check(world, name, stop)) for stop in stops(calls_of(name, world), cuts=1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_many_second_stops(name: str, world: World) -> None:
    """Stopped when most of it is done, and again at forty calls of going on."""
    first = Stop(2 * len(calls_of(name, world)) // 3)
    again = spread(list(stops(calls_of(name, world, first), cuts=1))[:-1], 40)
    tally(f"{name}, resumed", [(stop, check(world, name, first, stop)) for stop in again])
