"""Being somebody who may not do everything, and file systems of one's own, where the machine lets tests have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NOBODY = 65534


@contextmanager
def nobody() -> Iterator[None]:
    """Whoever runs the tests, without root's leave to do what file modes forbid."""
    if os.name != "posix" or os.getuid():
        yield
        return
    os.setresuid(_NOBODY, _NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that nobody may work in: pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="faults-"))
    path.chmod(0o777)
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=False)
        shutil.rmtree(path)


def give_to_nobody(path: Path) -> None:
    """Make nobody the owner of everything there, so that modes say what may be done with it."""
    if not os.getuid():
        for item in (path, *path.rglob("*")):
            os.chown(item, _NOBODY, _NOBODY)


@contextmanager
def mounted(place: Path, *options: str, source: str = "tmpfs") -> Iterator[Path]:
    """A file system of one's own at an empty folder; skips where mounting is not allowed."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, source, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
