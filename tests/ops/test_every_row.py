"""Every family of adapter on every kind of layer merges as its oracle does; docs/formats.md prints this table."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rows import Row, run
from table import ROWS

ROOT = Path(__file__).parents[2]


def test_the_names_are_different() -> None:
    """No two rows are one case, and there are at least sixty."""
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, tmp_path: Path) -> None:
    """In float32 the update differs from the oracle's float64 one by less than 1e-6; narrow bases are that, rounded once.

    Every tensor of the checkpoint is compared: those that the oracle leaves alone keep their bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracles' own
        result = run(row, tmp_path)
    assert result.strays == ()
    if row.base == "float32":
        assert result.difference < 1e-6
    else:
        assert result.unequal <= 1e-4


def test_the_table_is_current() -> None:
    """docs/formats.md lists these rows, with the oracles and versions that are installed; figures may differ by machine."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate_formats.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
