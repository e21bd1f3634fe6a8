"""The journal of an operation in place, read back: each line is held against what this program writes.

A journal says which bytes go where and which files go away, and a checkpoint that was downloaded may bring one along.
So it may speak of files in its checkpoint alone, and what no kill leaves behind is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import is_link, to_replace, to_write
from lorasurgery.checkpoint.json_text import MOST, is_shallow
from lorasurgery.errors import FormatError, SurgeryError

_NAME = 20  # characters of a staged file's name, which is a number or a word


def read_lines(journal: Path, folder_name: str) -> list[dict[str, Any]]:
    """The lines of a journal, without a last one that was not written to its end; none where there is no journal.

    Args:
        folder_name: Of the folder that journals lie in: in a checkpoint's folder, or behind `.NAME` beside its file.

    Raises:
        FormatError: it is no journal, it is damaged, or it speaks of files elsewhere.
    """
    if not os.path.isfile(journal):  # noqa: PTH113 — a Path would raise where a name is too long for the system
        return []
    found: list[dict[str, Any]] = []
    file_name = file_of(journal.parent, folder_name)
    home = journal.parent.parent
    try:
        if any(is_link(path) for path in (journal.parent, *journal.parent.iterdir())):
            raise _WrongError("lies beside a link, or in a folder that is one")
        lines = raw_lines(journal)
        for number, raw in enumerate(lines):
            line = line_of(raw)
            if line is None and 0 < number == len(lines) - 1:
                break  # a power cut may leave some pages of it
            _check(line, home, file_name, first=not number)
            found.append(line or {})
    except (_WrongError, ValueError, KeyError, TypeError, OSError) as problem:
        what = str(problem) if isinstance(problem, _WrongError) else "is damaged"
        raise FormatError(f"{show(str(journal))}: {what}; leave it, and ask for help with it") from None
    return found


def file_of(folder: Path, folder_name: str) -> str:
    """The name of the file that a journal in this folder is about; empty where it is about all of the folder above.

    >>> file_of(Path(".a.safetensors.lorasurgery-surgery"), ".lorasurgery-surgery")
    'a.safetensors'
    """
    return folder.name.removesuffix(folder_name).removeprefix(".")


def check_line(line: dict[str, Any], home: Path, file_name: str) -> None:
    """Hold a line that is to be written against the rules by which it will be read.

    Raises:
        FormatError: it speaks of files that are not its checkpoint's.
    """
    try:
        _check(line, home, file_name, first=False)
    except (_WrongError, ValueError, KeyError, TypeError) as problem:
        raise FormatError(f"{show(str(home))}: the operation {problem}, so it goes no further") from None


class _WrongError(FormatError):
    """What a journal says and must not."""


def raw_lines(journal: Path) -> list[bytes]:
    """The lines that were written to their end; what follows the last of them is not a line."""
    if journal.stat().st_size > 10 * MOST:
        raise _WrongError(f"has {journal.stat().st_size:,} bytes, more than any journal")
    return [line + b"\n" for line in journal.read_bytes().split(b"\n")[:-1]]


def line_of(raw: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is not a line of a journal."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and is_shallow(line) else None


def _check(line: dict[str, Any] | None, home: Path, file_name: str, *, first: bool) -> None:
    """Hold a line against what the program writes.

    Raises:
        _WrongError: it speaks of what it must not. KeyError, TypeError, ValueError: it is damaged.
    """
    kind = next((kind for kind in _KINDS if kind in (line or {})), None)
    if line is None or kind is None or (kind == "about") != first:
        raise TypeError
    _KINDS[kind](line, home, file_name)


def _about(line: dict[str, Any], home: Path, file_name: str) -> None:
    if not isinstance(line["about"], dict) or not isinstance(line["about"].get("call"), str):
        raise TypeError


def _checked(line: dict[str, Any], home: Path, file_name: str) -> None:
    noted = line.get("noted")
    if noted is not None and not (isinstance(noted, list) and all(isinstance(s, dict) for s in noted)):
        raise TypeError


def _ready(line: dict[str, Any], home: Path, file_name: str) -> None:
    if not isinstance(line["done"], dict) or not isinstance(line["ready"], list):
        raise TypeError
    sizes: dict[str, int] = {}
    for name, place, start, size, crc in line["ready"]:
        if not all(type(n) is int and n >= 0 for n in (place, start, size, crc)):
            raise TypeError
        if name not in sizes:
            sizes[name] = _weights(home, name, file_name).stat().st_size
        if place + size > sizes[name]:
            raise _WrongError(f"would write behind the end of {name}")


def _weights(home: Path, name: Any, file_name: str) -> Path:
    """A file whose tensors may be changed."""
    path = _named(to_write, home, name)
    if not (path.name.endswith(".safetensors") and path.is_file()) or (file_name and name != file_name):
        raise _WrongError(f"would write to {name!r}, which is none of its checkpoint's weights")
    return path


def _ending(line: dict[str, Any], home: Path, file_name: str) -> None:
    moves, removed = line["ending"], line["removed"]
    if not isinstance(moves, dict) or not isinstance(removed, list):
        raise TypeError
    for name in moves:
        if not (name.isascii() and name.isalnum() and len(name) <= _NAME):
            raise _WrongError(f"would move {name!r}, which it did not write")
    for path in (*moves.values(), *removed):
        _own(home, path)
        if file_name and not path.startswith(f"{file_name}."):
            raise _WrongError(f"would change {path!r}, which does not belong to its checkpoint")


def _own(home: Path, name: Any) -> None:
    """The name of a file below the checkpoint's folder, which no link leads away from."""
    path = _named(to_replace, home, name)
    deep = not path.parent.is_dir() and (path.parent.parent != home or os.path.lexists(path.parent))
    if deep or (path.is_dir() and not is_link(path)):
        raise _WrongError(f"speaks of {name!r}, which can't be a file")


def _named(rule: Callable[[Path, Any], Path], home: Path, name: Any) -> Path:
    try:
        return rule(home, name)
    except SurgeryError as problem:
        raise _WrongError(f"speaks of {name!r}, which is not in its checkpoint ({problem})") from None


_KINDS: dict[str, Callable[[dict[str, Any], Path, str], None]] = {
    "about": _about, "checked": _checked, "ready": _ready, "ending": _ending, "applied": lambda *_: None,
}  # fmt: skip
