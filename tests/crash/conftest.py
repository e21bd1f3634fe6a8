"""The world that operations are stopped in, made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from cases import World

if sys.version_info < (3, 11) or sys.platform != "linux":
    collect_ignore_glob = ["test_crash_*"]  # pathlib, or the system, makes calls there that nobody can count


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Inputs, and what undisturbed operations make of them; nothing in it may change."""
    found = World(tmp_path_factory.mktemp("world"))
    yield found
    found.check()
