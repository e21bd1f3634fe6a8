"""Writing past the system's cache: only what lies right goes that way, and every byte is where it belongs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorasurgery.checkpoint.files import PAGE, WriteFile

SIZE = 3 << 20


@pytest.mark.parametrize("askew", [0, 8])
@pytest.mark.parametrize("place", [0, 100, PAGE])
def test_what_lies_right_is_written_past_the_cache(
    place: int, askew: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that meets the file's pages is written directly, whole pages of it; the rest, and all else, buffered."""
    asked = []

    def past_cache(self: WriteFile, place: int, view: memoryview) -> int:
        asked.append((place, len(view)))
        return os.pwrite(self.fileno(), view[: len(view) // PAGE * PAGE], place)

    monkeypatch.setattr(WriteFile, "_past_cache", past_cache)
    buffer = torch.randint(0, 256, (SIZE + 2 * PAGE,), dtype=torch.uint8)
    first = (
        place - buffer.data_ptr()
    ) % PAGE + askew  # from here on, memory and file lie on pages alike when askew is 0
    view = memoryview(buffer.numpy())[first : first + SIZE]
    with WriteFile(tmp_path / "file") as file:
        file._direct = os.dup(file.fileno())  # whatever the file system says to O_DIRECT
        file.write_at(place, view)
    before = -place % PAGE
    assert asked == ([] if askew else [(place + before, SIZE - before)])
    assert (tmp_path / "file").read_bytes()[place:] == bytes(view)
