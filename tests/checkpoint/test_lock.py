"""A lock's file may go while it is opened, with the holder who ends just then: that is no reason to give up."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasurgery.checkpoint import lock
from lorasurgery.checkpoint.lock import Lock, is_one_file


@pytest.mark.parametrize("times", [1, 4])
def test_a_file_that_has_just_gone_is_made_again(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four times; the fifth look is the last."""
    gone, opened = [times], lock._opened

    def opening(file: Path) -> tuple[int, bool]:
        gone[0] -= 1
        if gone[0] >= 0:
            raise FileNotFoundError(file)
        return opened(file)

    monkeypatch.setattr(lock, "_PAUSE", 0.0)
    monkeypatch.setattr(lock, "_opened", opening)
    Lock(tmp_path / "out").release()
    gone[0] = 5
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "made", "one"),
    [("a.safetensors", "file", True), ("a.safetensors", "", True), ("a.safetensors", "folder", False),
     ("a", "file", True), ("a", "", False), ("a", "folder", False)],
)  # fmt: skip
def test_what_is_one_file(name: str, made: str, one: bool, tmp_path: Path) -> None:
    """What there is decides, and the name only where there is nothing yet."""
    if made == "file":
        (tmp_path / name).write_bytes(b"")
    elif made:
        (tmp_path / name).mkdir()
    assert is_one_file(tmp_path / name) == one
