"""The power cut itself: it takes whatever was not synced, in any combination, and nothing that was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from power import Disk

Work = Callable[[Disk, Path], None]


def write(disk: Disk, path: Path, data: bytes, *, synced: bool) -> None:
    """A file written at once, as a program would, with the disk told of it."""
    there = path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    if there:
        disk.opened(str(path))
    else:
        disk.named(str(path), 0)
    disk.wrote(descriptor, 0, data)
    os.pwrite(descriptor, data, 0)
    if synced:
        disk.synced(descriptor, str(path))
    os.close(descriptor)


def sync_folder(disk: Disk, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    disk.synced(descriptor, str(folder))
    os.close(descriptor)


def left(work: Work, tmp_path: Path) -> set[tuple[tuple[str, bytes], ...]]:
    """What there may be after forty power cuts: (name, bytes) of each file."""
    found = set()
    for seed in range(40):
        disk, folder = Disk(), tmp_path / str(seed)
        folder.mkdir()
        (folder / "old").write_bytes(b"old")
        work(disk, folder)
        disk.cut(seed)
        found.add(tuple((f.name, f.read_bytes()) for f in sorted(folder.iterdir())))
    return found


def test_what_is_synced_stays(tmp_path: Path) -> None:
    """Bytes synced, then the name synced: nothing can take them."""

    def work(disk: Disk, folder: Path) -> None:
        write(disk, folder / "new", b"new", synced=True)
        sync_folder(disk, folder)

    assert left(work, tmp_path) == {(("new", b"new"), ("old", b"old"))}


def test_a_name_that_is_not_synced(tmp_path: Path) -> None:
    """A file whose bytes were synced has its name or not; one that was renamed has the old name or the new one."""

    def work(disk: Disk, folder: Path) -> None:
        write(disk, folder / "new", b"new", synced=True)
        disk.renamed(str(folder / "new"), str(folder / "old"))
        (folder / "new").replace(folder / "old")

    assert left(work, tmp_path) == {(("old", b"old"),), (("new", b"new"), ("old", b"old")), (("old", b"new"),)}


def test_bytes_that_are_not_synced(tmp_path: Path) -> None:
    """Of two writes either may be missing, also the first alone, and each may have stopped in the middle."""

    def work(disk: Disk, folder: Path) -> None:
        write(disk, folder / "old", b"OLD!", synced=False)
        write(disk, folder / "old", b"a", synced=False)

    found = {files[0][1] for files in left(work, tmp_path)}
    assert {b"old", b"aLD!", b"OLD!", b"ald"} <= found
    assert found & {b"Old", b"OLd", b"OLD", b"aLd", b"aLD"}


def test_what_was_removed_comes_back(tmp_path: Path) -> None:
    """A file that was removed may be there again, whole."""

    def work(disk: Disk, folder: Path) -> None:
        disk.named(str(folder / "old"), None)
        (folder / "old").unlink()

    assert left(work, tmp_path) == {(), (("old", b"old"),)}
