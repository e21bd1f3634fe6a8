"""Copies of the checkout: one that tells which tests come by, and those in which a mutant meets its tests."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mutant_kinds import Mutant
from mutants_seen import RESULTS, SEEN, TESTS

_LEFT_OUT = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", ".demo", ".bench", "site")
_QUICK = 40  # tests that are tried first
_SLACK, _TIMES = (
    60.0,
    5,
)  # seconds of processor time that a mutant may take: so many times what its tests took, and more
_STILL = 120  # looks in a row, a second apart, that find no processor time taken: it waits for what will not come
_MEMORY = 8 << 30


@dataclass
class Reach:
    """The tests that come by each mutant, by number, and the seconds that each takes.

    Args:
        shared: Seconds for what a file's tests have in common. failed: Tests that fail without any mutant; they prove nothing.
    """

    tests: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    shared: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failed: set[str] = field(default_factory=set)

    def of(self, number: int, room: str) -> list[str]:
        """The tests for a mutant: those of its own room first, the quickest before the others."""

        def turn(test: str) -> tuple[bool, float, str]:
            near = test.startswith((f"tests/{room}/", f"lorasurgery/{room}/"))
            return not near, self.seconds[test] + self.shared[_file(test)], test

        return sorted(self.tests[number] & set(self.seconds) - self.failed, key=turn)

    def cost(self, tests: Sequence[str]) -> float:
        """The seconds that some tests take together."""
        return sum(self.seconds[t] for t in tests) + sum(self.shared[f] for f in {*map(_file, tests)})


class Copy:
    """A checkout that may be broken.

    Args:
        root: The true one. folder: Where the copy is made.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        # compiled files are known by their source's hash, for a mutant can be as long as its source and as old
        self._python("-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "lorasurgery", "tests")

    def reach(self, mutants: Sequence[Mutant], tests: Sequence[str], jobs: int) -> Reach:
        """Run the tests once and note which come by the mutants' places."""
        for file in {m.file for m in mutants}:
            source = (self.root / file).read_bytes()
            places = {m.statement: i for i, m in enumerate(mutants) if m.file == file}
            tree = Marked(places).visit(ast.parse(source))
            (self.folder / file).write_text(ast.unparse(ast.fix_missing_locations(tree)))
        names = {SEEN: "seen.jsonl", RESULTS: "results.jsonl"}
        files = {name: str(self.folder / file) for name, file in names.items()}
        command = self._pytest("-n", str(jobs), *tests)
        ended = subprocess.run(command, cwd=self.folder, env=self._env(files), check=False).returncode
        if ended not in (0, 1):  # some may fail, but all must have run
            raise SystemExit(f"pytest ended with {ended}, so nothing can be told")
        for file in {m.file for m in mutants}:
            shutil.copyfile(self.root / file, self.folder / file)
        return _read(files)

    def meets(self, mutant: Mutant, tests: Sequence[str], reach: Reach) -> str | None:
        """What caught a mutant, among the tests that come by it; None when nothing did."""
        file = self.folder / mutant.file
        source = file.read_bytes()
        file.write_bytes(mutant.applied(source))
        try:
            for some in (tests[:_QUICK], tests[_QUICK:]):
                caught = self._caught(some, _SLACK + _TIMES * reach.cost(some)) if some else None
                if caught:
                    return caught
        finally:
            file.write_bytes(source)
        return None

    def _caught(self, tests: Sequence[str], limit: float) -> str | None:
        asked, results = self.folder / "tests.json", self.folder / "results.jsonl"
        asked.write_text(json.dumps(list(tests)))
        results.unlink(missing_ok=True)
        files = list(dict.fromkeys(map(_file, tests)))
        env = self._env({TESTS: str(asked), RESULTS: str(results)})
        command = self._pytest("-x", "-p", "no:cacheprovider", *files)
        with (self.folder / "output.txt").open("wb") as output:
            ended = watched(command, self.folder, env, output.fileno(), limit)
        if isinstance(ended, str):
            return ended
        if ended == 0:
            return None
        if ended in (_USAGE, _NOTHING):
            raise SystemExit(f"pytest ended with {ended}: {(self.folder / 'output.txt').read_text()[-2000:]}")
        failed = [test for test, _, outcome, _ in _lines(results) if outcome == "failed"]
        return failed[0] if failed else "an error before the first test"

    def _python(self, *words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=self.folder, env=self._env({}), check=True)

    def _pytest(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "mutants_seen", *words]

    def _env(self, more: dict[str, str]) -> dict[str, str]:
        here = self.folder / "tests" / Path(__file__).parent.name  # where mutants_seen lies
        home = {"HOME": str(self.folder), "PYTHONPATH": f"{self.folder}{os.pathsep}{here}", "HF_HUB_OFFLINE": "1"}
        return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | home | more


_USAGE, _NOTHING = 4, 5  # what pytest ends with when it ran no test


class Marked(ast.NodeTransformer):
    """A call before each statement that a mutant is of."""

    def __init__(self, places: dict[tuple[int, int], int]) -> None:
        self.places = places

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        number = self.places.get((node.lineno, node.col_offset)) if isinstance(node, ast.stmt) else None
        if number is None:
            return node
        return [*ast.parse(f"__import__('mutants_seen').seen({number})").body, node]


def _read(files: dict[str, str]) -> Reach:
    found = Reach()
    for test, phase, outcome, seconds in _lines(Path(files[RESULTS])):
        found.seconds[test] += seconds
        if phase == "setup":
            found.shared[_file(test)] = max(found.shared[_file(test)], seconds)
        if outcome == "failed":
            found.failed.add(test)
    for number, place in _lines(Path(files[SEEN])):
        test, _, when = place.rpartition(" ")
        found.tests[number].add(test)
        if when == "(setup)":  # what a file's tests share is made in the first one's setup
            found.tests[number] |= {t for t in found.seconds if _file(t) == _file(test)}
    return found


def _file(test: str) -> str:
    return test.partition("::")[0]


def _lines(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def watched(command: list[str], folder: Path, env: dict[str, str], output: int, limit: float) -> int | str:
    """Run a command; returns its status, or why it was ended: processor time counts, not the clock."""

    def bounded() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))

    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True, preexec_fn=bounded
    )
    before, still = 0.0, 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        now = _processor_time(process.pid)
        still = still + 1 if now == before else 0
        before = now
        if now > limit or still > _STILL:
            _end(process)
            return f"ran for more than {limit:.0f} s" if now > limit else "waited for ever"


def _session(leader: int) -> dict[int, float]:
    """The processes of a session, and the seconds that each and its ended children have taken."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parts = path.read_text().rpartition(")")[2].split()
            if int(parts[3]) == leader:
                found[int(path.parent.name)] = sum(map(int, parts[11:15])) / os.sysconf("SC_CLK_TCK")
    return found


def _processor_time(leader: int) -> float:
    return sum(_session(leader).values())


def _end(process: subprocess.Popen) -> None:
    for number in _session(process.pid):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
