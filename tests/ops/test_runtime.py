"""What an operation measures about itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = "from lorasurgery.ops.runtime import peak_memory; print(peak_memory())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone passes a parent's size on")
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    """A child of a process that holds 300 MB says what it took itself."""
    held = bytearray(b"1") * (300 << 20)
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(said.stdout) < len(held)
