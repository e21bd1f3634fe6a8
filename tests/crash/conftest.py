"""The world that operations are stopped in, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Inputs, and what undisturbed operations make of them; nothing in it may change."""
    found = World(tmp_path_factory.mktemp("world"))
    yield found
    found.check()
