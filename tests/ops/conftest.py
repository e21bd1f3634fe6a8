"""The worlds of the image models, made once a session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from worlds import World


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """Each kind's world, made once."""
    made: dict[str, World] = {}

    def world(kind: str) -> World:
        if kind not in made:
            made[kind] = World(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return world
