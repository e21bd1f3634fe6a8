"""What runs inside a copy of the checkout: which tests come by a mutant's place, and in what order tests are run.

A pytest plugin, and the function that the copy calls where a mutant is to be; the environment says what is wanted.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

SEEN, RESULTS, TESTS = "MUTANTS_SEEN", "MUTANTS_RESULTS", "MUTANTS_TESTS"
_WRITE = os.write  # some tests put their own in its place
_known: set[tuple[int, str]] = set()


def _open(name: str) -> int | None:
    path = os.environ.get(name)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if path else None


_seen = _open(SEEN)


def seen(number: int) -> None:
    """Note that the test which runs now, in this process or in the one that started it, came by."""
    test = os.environ.get("PYTEST_CURRENT_TEST")
    if _seen is not None and test is not None and (number, test) not in _known:
        _known.add((number, test))
        with suppress(OSError):  # a test may have forbidden that files grow
            _WRITE(_seen, (json.dumps([number, test]) + "\n").encode())


def pytest_runtest_logreport(report: Any) -> None:
    """Note each phase's outcome and time, once, where several workers run."""
    path = os.environ.get(RESULTS)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:  # noqa: PTH123
            file.write(json.dumps([report.nodeid, report.when, report.outcome, report.duration]) + "\n")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave the tests that are asked for, in their files' order."""
    path = os.environ.get(TESTS)
    if path:
        wanted = set(json.loads(Path(path).read_text()))
        items[:] = [i for i in items if i.nodeid in wanted]
