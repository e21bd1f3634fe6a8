"""Fuzzing for as long as one likes: `make fuzz MINUTES=30`. Each target in turn; an input can be made again from its seed.

An input is met well when it is read, or refused by one line that names its file, in bounded time and memory, and when
nothing was written. Anything else is a finding, printed with its seed; `--target NAME --again N` meets that one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
# ruff: noqa: E402
import torch
from hostile_files import Files
from hostile_targets import TARGETS

from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.errors import SurgeryError

SECONDS, BYTES = 20.0, 2 << 30  # of the processor, and of memory, that one input may take
_HANGING = 30  # times as long by the clock: what waits takes nothing of the processor
_LONGEST = 6000  # characters of a message: names are cut


class TooLongError(BaseException):
    """The watchdog; nothing that a program catches."""


@dataclass
class Tally:
    """What became of the inputs of one target."""

    inputs: int = 0
    refused: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0


def meet(files: Files, name: str, seed: int, scratch: Path) -> tuple[str, float, int, bool]:
    """Make one input and meet it.

    Returns:
        What is wrong (empty when nothing is), seconds, bytes of memory, and whether it was refused.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    work = TARGETS[name](files, random.Random(f"{name} {seed}"), scratch)
    before, memory, refused = _state(scratch), _peak_reset(), False
    start, wrong = time.process_time(), ""
    try:
        with timed(SECONDS):
            work()
    except SurgeryError as problem:
        refused, wrong = True, _bad_line(str(problem), scratch)
    except TooLongError:
        wrong = f"took more than {SECONDS:g} s\n{traceback.format_exc(limit=-8)}"
    except Exception:
        wrong = traceback.format_exc(limit=-8)
    took = time.process_time() - start
    if refused and not wrong and _state(scratch) != before:
        wrong = f"wrote: {sorted(set(_state(scratch)) ^ set(before))}"
    return wrong, took, _peak() - memory, refused


def _bad_line(line: str, scratch: Path) -> str:
    """What is wrong with an error's line."""
    if "\n" in line or not line.isprintable():
        return f"not one plain line: {line!r:.500}"
    if len(line) > _LONGEST:
        return f"a line of {len(line)} characters: {line[:300]}"
    return "" if scratch.name in line or "/good/" in line else f"does not name the file: {line}"


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Every file in a folder and beside it, with size and time."""
    found = []
    for path in (*folder.parent.iterdir(), *folder.rglob("*")):
        if path.name != folder.name and not path.name.endswith(LOCK):
            about = path.lstat()
            found.append(
                (str(path), about.st_size if path.is_file() else 0, about.st_mtime_ns if path.is_file() else 0)
            )
    return sorted(found)


def _peak_reset() -> int:
    """Forget the largest memory so far (Linux); the memory now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _peak()


def _peak() -> int:
    try:
        words = Path("/proc/self/status").read_text().split()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(words[words.index("VmHWM:") + 1]) * 1024


def _alarm(*_: object) -> None:
    raise TooLongError


@contextmanager
def watched() -> Iterator[None]:
    """While it is open the watchdog may bark."""
    old = [(number, signal.signal(number, _alarm)) for number in (signal.SIGPROF, signal.SIGALRM)]
    try:
        yield
    finally:
        for number, handler in old:
            signal.signal(number, handler)


@contextmanager
def timed(seconds: float) -> Iterator[None]:
    """Let it bark after so many seconds of the processor, however busy the machine is; much later for what waits."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _HANGING * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory() -> None:
    """No more than so many bytes over what there is now: an error instead of a machine without memory."""
    words = Path("/proc/self/status").read_text().split()
    there = int(words[words.index("VmSize:") + 1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (there + BYTES, resource.RLIM_INFINITY))


def fuzz(targets: list[str], minutes: float, seed: int, folder: Path) -> dict[str, Tally]:
    """Meet inputs of all targets, some of each in turn, until the time is over."""
    files, tallies = Files(folder / "good"), {name: Tally() for name in targets}
    scratch, end, number = folder / "hostile-input", time.monotonic() + 60 * minutes, seed
    while time.monotonic() < end:
        for name in targets:
            turn = time.monotonic() + 1.0  # a second for each target: quick ones meet more
            mine = number
            while time.monotonic() < min(turn, end):
                wrong, took, memory, refused = meet(files, name, mine, scratch)
                tally = tallies[name]
                tally.inputs, tally.refused = tally.inputs + 1, tally.refused + refused
                tally.seconds, tally.memory = max(tally.seconds, took), max(tally.memory, memory)
                if wrong:
                    last = wrong.strip().splitlines()[-1][:200]
                    tally.findings[last] += 1
                    if tally.findings[last] == 1:
                        print(f"\n== {name}, seed {mine}\n{wrong}", flush=True)
                mine += 1
        number += 100_000
    return tallies


def show(tallies: dict[str, Tally]) -> None:
    """The table at the end."""
    print(f"\n{'target':16}{'inputs':>10}{'refused':>10}{'findings':>10}{'longest':>11}{'memory':>12}")
    for name, t in tallies.items():
        print(f"{name:16}{t.inputs:>10,}{t.refused:>10,}{sum(t.findings.values()):>10}"
              f"{t.seconds:>9.2f} s{t.memory / 1e6:>9.1f} MB")  # fmt: skip
        for line, times in t.findings.most_common():
            print(f"    {times} × {line}")
    print(f"{sum(t.inputs for t in tallies.values()):,} inputs")


def main() -> None:
    """Fuzz, or meet one input again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, help="of the first input of each target")
    parser.add_argument("--again", type=int, help="the seed of one input")
    given = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**9) * 10**8
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, watched():
        folder = Path(name).resolve()
        if given.again is not None:
            files = Files(folder / "good")
            limit_memory()
            for target in given.target or TARGETS:
                print(target, *meet(files, target, given.again, folder / "hostile-input"), sep="\n")
            return
        warm = {t: meet(Files(folder / f"warm-{t}"), t, 0, folder / "hostile-input") for t in TARGETS}  # imports
        assert len(warm) == len(TARGETS)
        limit_memory()
        tallies = fuzz(given.target or list(TARGETS), given.minutes, seed, folder)
    show(tallies)
    sys.exit(any(t.findings for t in tallies.values()))


if __name__ == "__main__":
    main()
