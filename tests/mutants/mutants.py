"""Put small mistakes into the code, one at a time, and say which of them no test notices: `make mutants`.

The tests run once on a copy that notes which of them come by each mistake's place; then each mistake meets those, the
quickest first, until one fails. mutmut and cosmic-ray have no choice of a few by a fixed seed, follow no subprocesses, and
count time-outs by the clock.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
# ruff: noqa: E402
from mutant_choice import EQUIVALENT, choose, reason, reasons
from mutant_copies import Copy, Reach
from mutant_kinds import Mutant

ROOT = HERE.parent.parent
ENOUGH = 0.95  # of those that make a difference


def main() -> int:
    """Choose, run, print; status 1 when too many were not caught."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="lorasurgery-mutants-") as folder:
        root = ROOT if options.show else Copy(ROOT, Path(folder) / "0").folder  # where nobody goes on writing
        known = reasons(root / EQUIVALENT.relative_to(ROOT))
        chosen = choose(root, options.count, options.seed, options.within)
        tried = [m for m in chosen if not reason(m, known)]
        for mutant in chosen:
            if mutant not in tried:
                print(f"makes no difference: {_where(mutant)}: {reason(mutant, known)}")
        survivors = tried if options.show else _try_all(tried, options.tests, options.jobs, root)
        for mutant in survivors:
            print(f"\n{'' if options.show else 'not caught: '}{difference(mutant, root)}")
    if options.show:
        return 0
    caught = len(tried) - len(survivors)
    share = caught / len(tried) if tried else 1.0
    print(
        f"\nmutants: {len(chosen)} (seed {options.seed}), {len(chosen) - len(tried)} make no difference; "
        f"of the other {len(tried)}, {caught} were caught: {share:.1%}"
    )
    return 0 if share >= ENOUGH else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    parser.add_argument("--in", dest="within", default="", metavar="PATH", help="only files whose path begins so")
    parser.add_argument("--show", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("tests", nargs="*", help="only these files or folders of tests")
    return parser.parse_args()


def _try_all(mutants: Sequence[Mutant], tests: Sequence[str], jobs: int, root: Path) -> list[Mutant]:
    """Run each mutant's tests, several mutants at a time; returns those that no test noticed."""
    copies: SimpleQueue[Copy] = SimpleQueue()
    for i in range(jobs):
        copies.put(Copy(root, root.with_name(f"{i + 1}")))
    first = copies.get()
    print("== the tests once, to see which come by", flush=True)
    reach = first.reach(mutants, tests, jobs)
    copies.put(first)
    for test in sorted(reach.failed):
        print(f"fails by itself, and is left out: {test}")

    def try_one(number: int) -> bool:
        copy = copies.get()
        try:
            room = Path(mutants[number].file).parts[1]
            return _meet(copy, mutants[number], reach.of(number, room), reach)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(jobs) as pool:
        caught = list(pool.map(try_one, range(len(mutants))))
    return [m for m, was_caught in zip(mutants, caught, strict=True) if not was_caught]


def _meet(copy: Copy, mutant: Mutant, tests: list[str], reach: Reach) -> bool:
    caught = copy.meets(mutant, tests, reach)
    print(f"{_where(mutant)}: {mutant.kind}: caught by {caught or f'none of {len(tests)} tests'}", flush=True)
    return caught is not None


def _where(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line}"


def difference(mutant: Mutant, root: Path) -> str:
    """Where a mutant is, and what it changes."""
    source = (root / mutant.file).read_bytes()
    old, new = source.decode().splitlines(), mutant.applied(source).decode().splitlines()
    lines = difflib.unified_diff(old, new, lineterm="", n=2)
    return "\n".join([f"{_where(mutant)}: {mutant.kind} in {mutant.function}", *list(lines)[2:]])


if __name__ == "__main__":
    sys.exit(main())
