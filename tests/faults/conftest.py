"""What all tests of faults share: a small world, and what each operation makes of it when nothing goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from operations import OPERATIONS, make_world, run, state


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, merged, style and topic; nothing may change them."""
    return make_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The hashes of what each operation ends with."""
    found = {}
    for name, operation in OPERATIONS.items():
        out = operation.prepare(small, tmp_path_factory.mktemp("whole") / "out")
        run(*operation.words(small, out))
        found[name] = state(out)
    return found
