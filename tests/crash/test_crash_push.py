"""An upload stopped at every call: nothing changes here, all or nothing is there, and repeating it publishes all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cases import CASES, PUSHES, World, state
from stopping import Stop, calls_of, run, spread, stops, tally


def published(place: Path) -> dict[str, str]:
    """What the Hub shows: name -> SHA-256; nothing before the first commit."""
    manifest = place.parent / "hub" / "manifest.json"
    return json.loads(manifest.read_text()) if manifest.exists() else {}


def local(place: Path) -> dict[str, str]:
    """SHA-256 of what lies here."""
    return {n: h for n, h in state(place).items() if not n.startswith("hub/")}


def check(world: World, name: str, stop: Stop) -> bool:
    """Stop there, look, repeat the upload and look again; returns whether it was stopped."""
    place = world.place(CASES[name])
    before = local(place)
    stopped, _ = run(name, world.root, place, stop)
    assert local(place) == before
    assert published(place) in ({}, world.published(name))
    CASES[name].work(world.folder, place)
    assert published(place) == world.published(name)
    assert local(place) == before
    shutil.rmtree(place.parent)
    return stopped


@pytest.mark.parametrize("name", PUSHES)
def test_nothing_is_written_here(name: str, world: World) -> None:
    """push changes no file on this machine, in the folder or beside it: every call that writes is the Hub's."""
    assert all(call.split(" ", 1)[1].startswith("hub") for call in calls_of(name, world))


def test_some_stops(world: World) -> None:
    """Cut off anywhere, an upload has published nothing or all of it, and is repeated as it was."""
    found = spread(list(stops(calls_of("push", world), cuts=0)), 6)
    assert sum(check(world, "push", stop) for stop in found) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", PUSHES)
def test_every_stop(name: str, world: World) -> None:
    """Each call that changes something on the Hub: cut off before it, and in the middle of what is sent."""
    tally(name, [(stop, check(world, name, stop)) for stop in stops(calls_of(name, world), cuts=0)])
