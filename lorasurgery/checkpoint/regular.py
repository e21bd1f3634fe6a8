"""A regular file of bounded size, read whole: whatever is read of a folder besides weights is read here."""

from __future__ import annotations

import stat
from pathlib import Path

from lorasurgery.checkpoint.operation import note
from lorasurgery.errors import FormatError


def read_bytes(file: Path, most: int) -> bytes:
    """All of a regular file that is no larger than `most`; a FIFO or a device would be read for ever.

    Raises:
        FormatError: another kind of file, or a larger one, without the file's name; one that was changed since it was
            read before.
        OSError: the system's.
    """
    note(file)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FormatError("is not a regular file")
    if found.st_size > most:
        raise FormatError(f"has {found.st_size:,} bytes, more than {most:,}; it can't be what its name says")
    with file.open("rb") as opened:
        return opened.read(most)
