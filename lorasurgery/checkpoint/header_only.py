"""Weight files of which only the header is here, so that plans can be made before gigabytes are fetched.

A stub has the real file's header and size, and a hole where the tensors lie. A mark beside it names the few tensors
that were filled in (the alphas of an adapter, say); reading any other is refused, for a hole reads as zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from lorasurgery.checkpoint.json_text import MOST, parse
from lorasurgery.checkpoint.regular import read_bytes
from lorasurgery.errors import FormatError


def write_stub(path: Path, start: bytes, size: int, tensors: Mapping[str, tuple[int, bytes]]) -> None:
    """Write a stub, and the mark beside it.

    Args:
        start: The file's first bytes: length and header.
        size: Of the whole file, in bytes; what is not written takes no room on the disk.
        tensors: name -> (offset, bytes), for those that are filled in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _mark(path).write_text(json.dumps(list(tensors)))
    with path.open("wb") as file:
        file.write(start)
        for offset, data in tensors.values():
            file.seek(offset)
            file.write(data)
        file.truncate(size)


def filled_in(path: Path) -> frozenset[str] | None:
    """The tensors of a stub that can be read; None for a file that is whole.

    Raises:
        FormatError: a mark that this program did not write.
    """
    mark = _mark(path)
    if not os.path.lexists(mark):  # nor where the mark's name would be too long for one
        return None
    try:
        found = parse(read_bytes(mark, MOST), str(mark))
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return frozenset(found)
    except (OSError, FormatError):
        pass
    raise FormatError(f"{mark}: should name tensors of the file beside it; where that is whole, remove this one")


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.header-only")
