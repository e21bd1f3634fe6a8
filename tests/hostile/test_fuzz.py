"""A few inputs of every target of `make fuzz`, always the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import meet, watched
from hostile_files import Files
from hostile_targets import TARGETS

INPUTS = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("good") / "good")


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs_are_read_or_refused_in_one_line(name: str, files: Files, tmp_path: Path) -> None:
    """Each input is read, or refused by one line that names its file, in bounded time, and nothing is written."""
    scratch = tmp_path / "hostile-input"
    with watched():
        wrong = [found for seed in range(INPUTS) if (found := meet(files, name, seed, scratch)[0])]
    assert not wrong
