"""A journal's proof: one sector of the new bytes, wherever in the stretch it lies, and nothing less."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from lorasurgery.checkpoint.files import ReadFile
from lorasurgery.checkpoint.inplace import recover as kin

START = 700  # of the stretch in the file of new bytes, where it need not lie on sectors


@pytest.mark.parametrize("size", [100, 512, 5000, 20_480])
@pytest.mark.parametrize("place", [0, 512, 1000])
def test_one_sector_is_enough(place: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sector of the file alone, the first and last cut off by the stretch's ends, tells; half of one does not."""
    monkeypatch.setattr(kin, "_CHUNK", 4096)
    old, new = b"\0" * (place + size + 2000), bytes(1 + i % 255 for i in range(size))
    (tmp_path / "redo").write_bytes(b"\0" * START + new + b"\0" * 2000)
    edges = [0, *range(512 - place % 512, size, 512), size]

    def begun(first: int, last: int) -> bool:
        (tmp_path / "file").write_bytes(old[: place + first] + new[first:last] + old[place + last :])
        with ReadFile(tmp_path / "file") as file:
            return kin._has_some(file, place, tmp_path / "redo", START, size)

    assert not begun(0, 0)
    for first, last in pairwise(edges):
        assert begun(first, last), (first, last)
        assert not begun(first, (first + last) // 2), (first, last)
