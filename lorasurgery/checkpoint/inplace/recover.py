"""What an operation in place leaves behind when it is interrupted, who may touch it then, and how it recovers.

Beside the checkpoint lies a folder with a journal of JSON lines: `about` (what the operation is), `ready` (which bytes
of `redo` belong where), `applied` (they are there), `ending` (which files get their names). Without a journal nothing
is unfinished, whatever else lies there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.files import ReadFile, WriteFile
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inplace.journal import line_of, raw_lines, read_lines
from lorasurgery.checkpoint.inside import is_link, link_on_the_way, refuse_link, to_replace, to_write
from lorasurgery.checkpoint.locate import locate
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.checkpoint.operation import holding
from lorasurgery.engine.atomic_file import sync_folder, write_atomic
from lorasurgery.errors import FormatError, MismatchError, OutputError, SurgeryError

_CHUNK = 4 << 20
FOLDER = ".lorasurgery-surgery"
FIXED = "--resume goes on once that is fixed"


def surgery_folder(checkpoint: Path) -> Path:
    """Where the journal of an operation inside a checkpoint lies: in its folder, or beside its file."""
    return checkpoint / FOLDER if checkpoint.is_dir() else checkpoint.with_name(f".{checkpoint.name}{FOLDER}")


def unfinished(checkpoint: Path) -> dict[str, Any] | None:
    """What operation a checkpoint is in the middle of: the first line of its journal; None for a whole one."""
    lines = lines_of(surgery_folder(checkpoint) / "journal")
    return lines[0].get("about") if lines else None


def refuse_unfinished(checkpoint: Path, *, own: bool = True) -> None:
    """Refuse to read a checkpoint of which some tensors are new and some are old.

    Args:
        own: Also where the operation is on the checkpoint as it was named; else only where it is on the folder that it
            is a part of, or on a file of it.

    Raises:
        MismatchError: with the next move.
    """
    about = unfinished(checkpoint) if own else None
    if about is not None:
        raise MismatchError(in_the_middle(checkpoint, about))
    for other in _kin(checkpoint):
        about = about_files_of(surgery_folder(other), other, checkpoint)
        if about is not None:
            raise MismatchError(in_the_middle(other, about))


def _kin(checkpoint: Path) -> Iterator[Path]:
    """The folder whose shard a file may be, the pipeline whose part a folder may be, and the files of a folder."""
    yield from checkpoint.absolute().parents[:2]
    if checkpoint.is_dir():
        for folder in checkpoint.glob(f".?*{FOLDER}"):
            yield checkpoint.absolute() / folder.name[1:].removesuffix(FOLDER)


def in_the_middle(checkpoint: Path, about: Mapping[str, Any]) -> str:
    """One line about an operation that was interrupted."""
    call = show(str(about.get("call", "an operation")))
    return (
        f"{show(str(checkpoint))}: is in the middle of `{call}`, which was interrupted "
        "or still runs: some tensors are new and some are old; the same command with --resume finishes it"
    )


def cannot_write(checkpoint: Path, problem: OSError, left: str) -> OutputError:
    """One line about what the system refused, and what was left."""
    where = show(str(problem.filename or checkpoint))
    return OutputError(f"{where}: cannot be written ({problem.strerror or problem}); {left}")


def recover_first(checkpoint: Path, *, resume: bool) -> bool:
    """Before an operation in place is planned: finish what needs nothing but copying.

    Returns:
        Whether the operation that is to be resumed is complete with that.

    Raises:
        MismatchError: one is unfinished and this is not to go on with it.
        OutputError: another one is at work.
    """
    if not surgery_folder(checkpoint).exists():
        return False
    before = unfinished(checkpoint)
    with holding(checkpoint):
        about = recover(checkpoint)
    if about is not None and not resume:
        raise MismatchError(in_the_middle(checkpoint, about))
    return before is not None and about is None and resume


def recover(checkpoint: Path) -> dict[str, Any] | None:
    """Bring to its place what an interrupted operation had made ready; under the lock.

    Returns:
        What the operation is when some of it is still missing; None when it is complete, or never began.

    Raises:
        FormatError: what was made ready is damaged.
        OutputError: the disk refuses.
    """
    try:
        return _recover(checkpoint)
    except OSError as problem:
        raise cannot_write(checkpoint, problem, FIXED) from None


def _recover(checkpoint: Path) -> dict[str, Any] | None:
    folder, home = surgery_folder(checkpoint), checkpoint if checkpoint.is_dir() else checkpoint.parent
    lines = lines_of(folder / "journal")
    if not lines or "about" not in lines[0]:
        discard(folder)  # begun and killed before the first line, or ended and killed before all was cleared away
        return None
    last = lines[-1]
    if "ending" in last:
        end(home, folder, last["ending"], last["removed"])
        return None
    if "ready" in last:
        check(folder, last["ready"])
        apply(home, folder, last["ready"])
    _cut(folder / "journal", [*lines, {"applied": True}] if "ready" in last else lines)
    return dict(lines[0]["about"])


def check(folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    with ReadFile(folder / "redo") as redo:
        for _, _, start, size, crc in batch:
            if redo.crc(start, size) != crc:
                raise FormatError(f"{show(str(folder / 'redo'))}: is damaged; leave it, and ask for help with it")


def apply(home: Path, folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    """Copy what is ready to where it belongs."""
    with ReadFile(folder / "redo") as redo:
        for name in dict.fromkeys(item[0] for item in batch):
            with WriteFile(to_write(home, name)) as target:
                for file, place, start, size, _ in batch:
                    if file == name and target.copy_at(place, redo, start, size) != size:
                        raise OSError(5, "the new bytes end too soon", str(folder / "redo"))
                target.sync()


def end(home: Path, folder: Path, moves: Mapping[str, str], removed: Sequence[str]) -> None:
    for name, path in moves.items():
        staged, final = folder / f"new-{name}", to_replace(home, path)
        if staged.exists():
            final.parent.mkdir(Modes.of([home], home).folder, exist_ok=True)
            staged.replace(final)
    for path in removed:
        gone = to_replace(home, path)
        with suppress(FileNotFoundError):
            gone.unlink()
        with suppress(OSError):  # of the records' folder, when the last one goes
            if gone.parent != home:
                gone.parent.rmdir()
    for place in sorted({home, *((home / path).parent for path in [*moves.values(), *removed])}, reverse=True):
        if place.is_dir():
            sync_folder(place)
    discard(folder)


def discard(folder: Path) -> None:
    """Remove the journal, from when on nothing is unfinished, and then what else there is."""
    if not os.path.lexists(folder):
        return
    refuse_link(folder)
    with suppress(FileNotFoundError):
        (folder / "journal").unlink()
    with suppress(OSError):  # a journal that comes back after a power cut asks for what is done already
        sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _cut(journal: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite the journal, without a last line that was not written to its end."""
    write_atomic(journal, map(as_line, lines), mode=0o600, partial=journal.with_name("journal.new"))


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal, without a last one that was not written to its end; none where there is no journal.

    Raises:
        FormatError: it is damaged, or speaks of files that are not its checkpoint's.
    """
    return read_lines(journal, FOLDER)


def as_line(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


_SECTOR = 512  # a power cut leaves no less of what was being written
_COMPARED = 1 << 20
_MOST = 512 << 20  # bytes that are compared: more than one line of a journal speaks of


def about_files_of(folder: Path, other: Path, checkpoint: Path) -> dict[str, Any] | None:
    """What operation a journal is of, when it proves to have changed files of a checkpoint; None otherwise.

    Args:
        folder: That the journal lies in.
        other: What the journal would be of.
        checkpoint: What is to be read.
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
