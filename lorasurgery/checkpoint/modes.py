"""Who may read what is written: nobody who could not read everything that went into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_FILE, _FOLDER = 0o666, 0o777


@dataclass(frozen=True)
class Modes:
    """Permissions for new files and folders, of which the system takes the umask's away.

    Args:
        file: As for chmod; the user may always write.
        folder: As for chmod; the user may always write.
    """

    file: int = _FILE
    folder: int = _FOLDER

    @classmethod
    def of(cls, inputs: Iterable[str | Path], place: Path) -> Modes:
        """The narrowest of some inputs: of their files and folders, and of the files as the folders let others through.

        Args:
            inputs: Files and folders.
            place: The folder that new files come to, or the first above it that is there.
        """
        file, folder, group = _FILE, _FOLDER, _new_group(place)
        for given in map(Path, inputs):
            for path in _all(given):
                try:
                    found = path.stat()
                except OSError:
                    continue
                mode = _as_seen(found, group)
                if stat.S_ISDIR(found.st_mode):
                    folder &= mode
                elif stat.S_ISREG(found.st_mode):
                    file &= mode
        return cls(file & _let_through(folder) | 0o600, folder | 0o700)


def _all(path: Path) -> Iterable[Path]:
    """A file, or a folder with all that is not hidden in it."""
    yield path
    for place, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in (*folders, *files) if not name.startswith("."))


def _new_group(place: Path) -> int | None:
    """The group of a file that is made in a place; None where there are none."""
    if not hasattr(os, "getegid"):
        return None
    there = next((p for p in (place, *place.absolute().parents) if p.is_dir()), None)
    found = there.stat() if there is not None else None
    return found.st_gid if found is not None and found.st_mode & stat.S_ISGID else os.getegid()


def _as_seen(found: os.stat_result, group: int | None) -> int:
    """A mode in which the new file's group may do no more than it may do here, where it is one of the others."""
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if group is None or found.st_gid == group:
        return mode
    return mode & (0o707 | (mode & 0o007) << 3)


def mode_within(folder: Path) -> int:
    """The mode of a file that tells no more than its folder: for those whom that lets through."""
    return _FILE & _let_through(folder.stat().st_mode)


def _let_through(folder: int) -> int:
    """What is left of a file's mode for whom its folder lets through at all.

    >>> oct(_let_through(0o755)), oct(_let_through(0o700)), oct(_let_through(0o750))
    ('0o777', '0o700', '0o770')
    """
    return 0o700 | (0o070 if folder & 0o010 else 0) | (0o007 if folder & 0o001 else 0)
