"""Whether a journal that lies beside a file, or in a folder above, is about a checkpoint that is to be read.

Others' remains may lie there, and anybody may write what looks like a journal. So one counts only where it lies in a
checkpoint that this one belongs to, and speaks of its files, and bytes that it says it wrote are in them: only then are
they new in part. What can't be read of it proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.files import ReadFile
from lorasurgery.checkpoint.inside import is_link, link_on_the_way
from lorasurgery.checkpoint.journal_lines import line_of, raw_lines
from lorasurgery.checkpoint.locate import locate
from lorasurgery.errors import SurgeryError

_SECTOR = 512  # a power cut leaves no less of what was being written
_COMPARED = 1 << 20
_MOST = 512 << 20  # bytes that are compared: more than one line of a journal speaks of


def about_files_of(folder: Path, other: Path, checkpoint: Path) -> dict[str, Any] | None:
    """What operation a journal is of, when it proves to have changed files of a checkpoint; None otherwise.

    Args:
        folder: That the journal lies in. other: What the journal would be of. checkpoint: What is to be read.
    """
    if is_link(folder) or not (folder / "journal").is_file():
        return None
    home = other if other.is_dir() else other.parent
    try:
        names = {name for name in locate(other).files if (home / name).is_relative_to(checkpoint.absolute())}
        lines = [line for raw in raw_lines(folder / "journal") if (line := line_of(raw)) is not None]
        about = lines[0]["about"] if lines else None
        proven = isinstance(about, dict) and _proves(folder, home, names, lines)
    except (SurgeryError, OSError, ValueError, KeyError, TypeError):
        return None
    return about if proven else None


def _proves(folder: Path, home: Path, names: set[str], lines: list[dict[str, Any]]) -> bool:
    left = _MOST
    for line in lines:
        for name, place, start, size, crc in _stretches(line, names):
            left -= size
            if left < 0:
                return False
            if link_on_the_way(home, name):
                continue
            with ReadFile(home / name) as file:
                begun = line is lines[-1] and _has_some(file, place, folder / "redo", start, size)
                if begun or file.crc(place, size) == crc:
                    return True
    return False


def _stretches(line: Mapping[str, Any], names: set[str]) -> Iterator[tuple[str, int, int, int, int]]:
    for name, *numbers in line.get("ready", ()):
        if name in names and len(numbers) == 4 and all(type(n) is int and n >= 0 for n in numbers) and numbers[2]:
            yield (name, *numbers)


def _has_some(file: ReadFile, place: int, redo: Path, start: int, size: int) -> bool:
    """Whether any sector of a stretch is that of the new bytes already, which may be the old ones too."""
    if is_link(redo) or not redo.is_file():
        return False
    with ReadFile(redo) as source:
        done, first = 0, _SECTOR - place % _SECTOR
        while done < size:
            here, there = bytearray(min(size - done, first + _COMPARED)), bytearray(min(size - done, first + _COMPARED))
            file.read_all(place + done, memoryview(here))
            got = source.read_all(start + done, memoryview(there))
            edges = [0, *range(first, got, _SECTOR), got]
            if any(here[a:b] == there[a:b] for a, b in pairwise(edges) if a < b):
                return True
            if got < len(there):
                return False
            done, first = done + got, _SECTOR
    return False
