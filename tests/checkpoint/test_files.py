"""Writing past the system's cache: only what lies right goes that way, and every byte is where it belongs; scratch files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorasurgery.checkpoint.files import PAGE, ScratchFile, WriteFile, read_all_back, read_back
from lorasurgery.errors import FormatError

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


def test_a_heap_gives_back_what_was_put(tmp_path: Path) -> None:
    """From several threads, into new memory or into some that is there; what was changed, cut or removed is refused."""
    pieces = [bytes([i]) * (1000 + i) for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        heap = ScratchFile(tmp_path / "heap", new=True)
        places = list(pool.map(heap.put, pieces))
    heap.close()
    assert [bytes(read_back(tmp_path, place)) for place in places] == pieces
    assert [bytes(view) for view in read_all_back(tmp_path, places)] == pieces
    memory = memoryview(bytearray(1049))
    assert read_back(tmp_path, places[49], memory) is memory
    assert bytes(memory) == pieces[49]
    again = ScratchFile(tmp_path / "heap")
    assert again.put(b"more")[1] == sum(map(len, pieces))  # what lies there stays
    again.close()
    data = bytearray((tmp_path / "heap").read_bytes())
    data[places[7][1]] ^= 1
    (tmp_path / "heap").write_bytes(data)
    with pytest.raises(FormatError, match="is damaged"):
        read_back(tmp_path, places[7])
    several = read_all_back(tmp_path, places[6:8])
    assert bytes(next(several)) == pieces[6]
    with pytest.raises(FormatError, match="is damaged"):
        next(several)
    os.truncate(tmp_path / "heap", 10)
    with pytest.raises(FormatError, match="is damaged"):
        read_back(tmp_path, places[8])
    (tmp_path / "heap").unlink()
    with pytest.raises(FormatError, match="was removed"):
        read_back(tmp_path, places[8])
