"""A small file is written whole or not at all, and readable by those alone who may read it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lorasurgery.engine import atomic_file
from lorasurgery.engine.atomic_file import write_atomic

CALLS = ("open", "write", "fsync", "replace", "unlink")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The system's calls, each with the name it is about, in order."""
    seen: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def seeing(name: str) -> None:
        call = getattr(os, name)

        def noted(first: Any, *rest: Any, **named: Any) -> Any:
            seen.append((name, names[first] if isinstance(first, int) else Path(first).name))
            found = call(first, *rest, **named)
            if name == "open":
                names[found] = Path(first).name
            return found

        monkeypatch.setattr(os, name, noted)

    for name in CALLS:
        seeing(name)
    return seen


def test_the_disk_has_the_bytes_before_the_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """Written, synced, renamed, and the folder synced last, whose name a power cut could take back otherwise."""
    write_atomic(tmp_path / "a.json", [b"one", b"two"], mode=0o600, partial=tmp_path / "half")
    assert calls == [
        ("unlink", "half"), ("open", "half"), ("write", "half"), ("fsync", "half"), ("replace", "half"),
        ("open", tmp_path.name), ("fsync", tmp_path.name),
    ]  # fmt: skip
    assert (tmp_path / "a.json").read_bytes() == b"onetwo"
    calls.clear()
    write_atomic(tmp_path / "a.json", b"three", mode=0o600, durable=False)
    assert [name for name, _ in calls] == ["open", "write", "fsync", "replace"]


@pytest.mark.parametrize("failing", ["open", "write", "fsync", "replace"])
def test_a_failure_leaves_what_was_there(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system refuses, the old file is whole, and nothing lies beside it."""
    file = tmp_path / "a.json"
    file.write_bytes(b"old")

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, failing, refused)
        write_atomic(file, b"new", mode=0o600)
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_takes_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte comes, in pieces of any size."""
    write, pieces = os.write, [bytes([i]) * i for i in range(40)]
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    monkeypatch.setattr(atomic_file, "_ENOUGH", 100)
    write_atomic(tmp_path / "a", iter(pieces), mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("mode", "umask", "found"), [
    (0o600, 0o000, 0o600), (0o666, 0o022, 0o644), (0o666, 0o077, 0o600), (0o640, 0o002, 0o640),
])  # fmt: skip
def test_who_may_read_it(mode: int, umask: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As asked and as far as the umask allows, from the first byte on, and not as the file before it."""
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o777)
    fsync, meanwhile = os.fsync, []

    def looked(descriptor: int) -> None:
        meanwhile.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", looked)
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a", b"new", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == found == meanwhile[0]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Where the file lies meanwhile, a link is removed, not followed; so is what a kill left there."""
    (tmp_path / "other").write_bytes(b"mine")
    (tmp_path / "half").symlink_to(tmp_path / "other")
    write_atomic(tmp_path / "a", b"new", mode=0o600, partial=tmp_path / "half")
    (tmp_path / "half").write_bytes(b"longer than what comes")
    write_atomic(tmp_path / "a", b"newer", mode=0o600, partial=tmp_path / "half")
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"newer"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "other"]
