"""A Hub of our own on loopback, and somebody who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client
from local_hub import LocalHub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with nothing in it, on which "me" and "you" have an account; me/gated is for its owner only."""
    tokens = {"hf_local": "me", "hf_other": "you"}
    with LocalHub(tmp_path / "hub", tokens=tokens, gated=("me/gated",)) as hub:
        yield hub


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    """Someone who has fetched nothing yet."""
    return Client(hub, tmp_path / "home")
