"""In-place operations stopped at every call of the system: readers are kept away, and --resume ends where it would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cases import CASES, INSIDE, World, remains, state
from long_runs import hashes
from stopping import Stop, calls_of, run, spread, stops, tally

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError
from lorasurgery.ops.unmerge import unmerge


def check(world: World, name: str, first: Stop, *more: Stop) -> bool:
    """Stop there, and there again in what goes on with it; look, go on and look. Returns whether it was stopped."""
    place = world.place(CASES[name])
    old, new = state(place), world.whole(name)
    stopped, _ = run(name, world.root, place, first)
    for stop in more:
        run(name, world.root, place, stop, resume=True)
    found = state(place)
    if found not in (old, new):
        with pytest.raises(MismatchError, match="in the middle of"):
            Checkpoint.open(place)
    if not first.call:
        assert found == new, "what was reported as done was not on the disk"
    finish(world, name, place, untouched=found == old)
    assert state(place) == new
    assert not remains(place)
    if CASES[name].adapter:
        unmerge(place, [world.folder / CASES[name].adapter], in_place=True)
        assert state(place) == world.before_merging(name)
    shutil.rmtree(place.parent)
    return stopped


def finish(world: World, name: str, place: Path, *, untouched: bool) -> None:
    """The same command with --resume; where nothing is unfinished and nothing was done, without it."""
    try:
        CASES[name].work(world.folder, place, resume=True)
    except MismatchError as problem:
        assert "nothing is unfinished here" in str(problem)
        if untouched:
            CASES[name].work(world.folder, place)


@pytest.mark.parametrize("name", INSIDE)
def test_some_stops(name: str, world: World) -> None:
    """Killed or cut off at calls spread over the operation, it is resumed to the same bytes, and then undone."""
    found = spread(list(stops(calls_of(name, world), cuts=1)), 6)
    assert sum(check(world, name, stop) for stop in found) >= 5, "too few of them came to pass"


@pytest.mark.parametrize("name", INSIDE)
def test_stopped_again_while_it_goes_on(name: str, world: World) -> None:
    """The second stop comes while the first is made good: before what was ready is copied again, or behind it."""
    count = len(calls_of(name, world))
    assert check(world, name, Stop(count // 2), Stop(9), Stop(7, seed=3))


def test_a_part_of_a_mixture_is_refused_too(world: World) -> None:
    """A shard of which some tensors are new is refused by its own name; one that is not touched is read."""
    place = world.place(CASES["switch"])
    late = next(i for i, c in enumerate(calls_of("switch", world), 1) if c.startswith("truncate"))  # of the new record
    assert run("switch", world.root, place, Stop(late))[0]
    shards = sorted(place.glob("*.safetensors"))
    for shard in (shards[0], shards[2]):
        with pytest.raises(MismatchError, match="in the middle of `switch out topic`"):
            Checkpoint.open(shard)
    Checkpoint.open(shards[1])


def test_a_dry_run_settles_nothing(world: World) -> None:
    """Where an operation was interrupted, --dry-run says so and copies nothing to its place, with --resume or without."""
    place = world.place(CASES["switch"])
    late = next(i for i, c in enumerate(calls_of("switch", world), 1) if c.startswith("copy"))
    assert run("switch", world.root, place, Stop(late))[0]
    before = hashes(place)
    for resume in (False, True):
        with pytest.raises(MismatchError, match="in the middle of"):
            CASES["switch"].work(world.folder, place, dry_run=True, resume=resume)
    assert hashes(place) == before


def test_the_folder_of_a_mixture_is_refused_too(world: World) -> None:
    """A folder is refused when the operation is on a file in it."""
    place = world.place(CASES["merge --in-place, one file"])
    assert run("merge --in-place, one file", world.root, place, Stop(60))[0]
    with pytest.raises(MismatchError, match="in the middle of"):
        Checkpoint.open(place.parent)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_every_stop(name: str, world: World) -> None:
    """Each call of the system: a kill before it, a kill in the middle of a write, a power cut before it."""
    tally(name, [(stop, check(world, name, stop)) for stop in stops(calls_of(name, world), cuts=1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
def test_many_second_stops(name: str, world: World) -> None:
    """Stopped half-way, and again at forty calls of going on."""
    first = Stop(len(calls_of(name, world)) // 2)
    again = spread(list(stops(calls_of(name, world, first), cuts=1))[:-1], 40)
    tally(f"{name}, resumed", [(stop, check(world, name, first, stop)) for stop in again])
