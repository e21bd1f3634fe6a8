"""Operations that are stopped at one call of the system after the other, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import CASES, World
from instrument import KILLED, Watch

from lorasurgery.checkpoint import journal
from lorasurgery.checkpoint.inplace import transaction as surgery
from lorasurgery.errors import SurgeryError

_BATCH = 80_000  # bytes: two of the world's tensors and some more
_PRELOAD = ["lorasurgery.ops.merging.stream", "lorasurgery.ops.extraction.decompose", "lorasurgery.ops.merging.in_place", "long_runs", "cases",
            "instrument"]  # fmt: skip


@dataclass(frozen=True)
class Stop:
    """Where an operation is stopped: before the call of that number, or in the middle of it, or (0) when all is done.

    Args:
        seed: Of a power cut.
    """

    call: int
    half: bool = False
    seed: int | None = None

    @property
    def kind(self) -> str:
        """In a few words."""
        return "power cut" if self.seed is not None else "kill in a write" if self.half else "kill"


def stops(calls: list[str], cuts: int) -> Iterator[Stop]:
    """Every stop that there is: before each call, in the middle of each write, and power cuts before each and at the end.

    Args:
        cuts: Power cuts before each call, each leaving something else.
    """
    for number, call in enumerate(calls, 1):
        yield Stop(number)
        if call.startswith(("write", "copy")):
            yield Stop(number, half=True)
        for seed in range(cuts):
            yield Stop(number, seed=1000 * number + seed)
    yield from (Stop(0, seed=seed) for seed in range(cuts))


def spread(found: list[Stop], count: int) -> list[Stop]:
    """About so many of them, evenly."""
    return [found[i * len(found) // count] for i in range(count)]


def calls_of(name: str, world: World, first: Stop | None = None) -> list[str]:
    """What an undisturbed run calls, paths from where it works; with a stop, what going on after it calls."""
    place = world.place(CASES[name])
    if first is not None:
        run(name, world.root, place, first)
    _, calls = run(name, world.root, place, None, **({} if first is None else {"resume": True}))
    home = f"{place.parent.name}{os.sep}"
    assert all(call.partition(" ")[2].startswith(home[:-1]) for call in calls), "it wrote elsewhere"
    return [call.replace(home, "", 1) for call in calls]


def tally(name: str, found: list[tuple[Stop, bool]]) -> None:
    """Say how many stops of which kind there were, and see that nearly all came to pass."""
    count = Counter(stop.kind for stop, stopped in found if stopped)
    print(f"\n{name}: {count.total()} stops ({', '.join(f'{n} x {kind}' for kind, n in count.items())})")
    assert count.total() > 0.9 * len(found), "some operations ended before the call that they were to be stopped at"


def run(name: str, root: Path, place: Path, stop: Stop | None, **more: Any) -> tuple[bool, list[str]]:
    """Do an operation in another process.

    Args:
        root: Where calls are counted; the inputs lie in `inputs` there.

    Returns:
        Whether it was stopped, and the calls that it made if it was not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(name, root, place, stop, theirs, more))
    process.start()
    theirs.close()
    try:
        calls, escaped, problem = mine.recv()
    except EOFError:
        calls, escaped, problem = [], [], ""
    process.join()
    mine.close()
    assert not problem, problem
    assert not escaped, escaped
    assert process.exitcode in (0, KILLED)
    return process.exitcode == KILLED, calls


def _watched(name: str, root: Path, place: Path, stop: Stop | None, told: Any, more: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    watch = Watch(root, stop=stop and stop.call, half=bool(stop and stop.half), seed=stop and stop.seed)
    problem = ""
    with patch.multiple(journal, KEPT=1, _SECONDS=0.0), patch.object(surgery, "BATCH", _BATCH):
        watch.install()
        try:
            CASES[name].work(root / "inputs", place, **more)
            watch.ended()
        except SurgeryError:
            problem = "" if more else traceback.format_exc()  # nothing to resume: the next in turn will see
        except BaseException:
            problem = traceback.format_exc()
    told.send((watch.calls, watch.escaped, problem))
    told.close()
    os._exit(0)
