"""What an operation in place leaves behind when it is interrupted, who may touch it then, and how it is settled.

Beside the checkpoint lies a folder with a journal of JSON lines: `about` (what the operation is), `ready` (which bytes
of `redo` belong where), `applied` (they are there), `ending` (which files get their names). Without a journal nothing
is unfinished, whatever else lies there.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.files import ReadFile, WriteFile, sync_folder
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.journal_lines import read_lines
from lorasurgery.checkpoint.operation import holding
from lorasurgery.errors import FormatError, MismatchError, OutputError

_CHUNK = 4 << 20
FOLDER = ".lorasurgery-surgery"
MENDED = "--resume goes on once that is mended"


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
        lines = lines_of(surgery_folder(other) / "journal")
        changed = {Path(item[0]) for line in lines for item in line.get("ready", [])}
        home = (other if other.is_dir() else other.parent).absolute()
        if any((home / file).is_relative_to(checkpoint.absolute()) for file in changed):
            raise MismatchError(in_the_middle(other, lines[0].get("about", {})))


def _kin(checkpoint: Path) -> Iterator[Path]:
    """The folder whose shard a file may be, the pipeline whose part a folder may be, and the files of a folder."""
    yield from checkpoint.absolute().parents[:2]
    if checkpoint.is_dir():
        for folder in checkpoint.glob(f".?*{FOLDER}"):
            yield checkpoint / folder.name[1:].removesuffix(FOLDER)


def in_the_middle(checkpoint: Path, about: Mapping[str, Any]) -> str:
    """One line about an operation that was interrupted."""
    return (
        f"{show(str(checkpoint))}: is in the middle of `{about.get('call', 'an operation')}`, which was interrupted "
        "or still runs: some tensors are new and some are old; the same command with --resume finishes it"
    )


def cannot_write(checkpoint: Path, problem: OSError, left: str) -> OutputError:
    """One line about what the system refused, and what was left."""
    where = show(str(problem.filename or checkpoint))
    return OutputError(f"{where}: cannot be written ({problem.strerror or problem}); {left}")


def settle_first(checkpoint: Path, *, resume: bool) -> bool:
    """Before an operation in place is planned: finish what needs nothing but copying.

    Returns:
        Whether the operation that is to be resumed is complete with that.

    Raises:
        MismatchError: one is unfinished and this is not to go on with it. OutputError: another one is at work.
    """
    if not surgery_folder(checkpoint).exists():
        return False
    before = unfinished(checkpoint)
    with holding(checkpoint):
        about = settle(checkpoint)
    if about is not None and not resume:
        raise MismatchError(in_the_middle(checkpoint, about))
    return before is not None and about is None and resume


def settle(checkpoint: Path) -> dict[str, Any] | None:
    """Bring to its place what an interrupted operation had made ready; under the lock.

    Returns:
        What the operation is when some of it is still missing; None when it is complete, or never began.

    Raises:
        FormatError: what was made ready is damaged. OutputError: the disk refuses.
    """
    try:
        return _settle(checkpoint)
    except OSError as problem:
        raise cannot_write(checkpoint, problem, MENDED) from None


def _settle(checkpoint: Path) -> dict[str, Any] | None:
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
        _check(folder, last["ready"])
        apply(home, folder, last["ready"])
    _cut(folder / "journal", [*lines, {"applied": True}] if "ready" in last else lines)
    return dict(lines[0]["about"])


def _check(folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    with ReadFile(folder / "redo") as redo:
        for _, _, start, size, crc in batch:
            if _sum_of(redo, start, size) != crc:
                raise FormatError(f"{show(str(folder / 'redo'))}: is damaged; leave it, and ask for help with it")


def _sum_of(file: ReadFile, start: int, size: int) -> int | None:
    """CRC-32 of some bytes of a file, None where it ends before them."""
    buffer, found, done = memoryview(bytearray(min(size, _CHUNK))), 0, 0
    while done < size:
        piece = buffer[: size - done]
        if file.read_all(start + done, piece) != len(piece):
            return None
        found, done = zlib.crc32(piece, found), done + len(piece)
    return found


def apply(home: Path, folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    """Copy what is ready to where it belongs."""
    with ReadFile(folder / "redo") as redo:
        for name in dict.fromkeys(item[0] for item in batch):
            with WriteFile(home / name) as target:
                for file, place, start, size, _ in batch:
                    if file == name and target.copy_at(place, redo, start, size) != size:
                        raise OSError(5, "the new bytes end too soon", str(folder / "redo"))
                target.sync()


def end(home: Path, folder: Path, moves: Mapping[str, str], removed: Sequence[str]) -> None:
    for name, path in moves.items():
        staged = folder / f"new-{name}"
        if staged.exists():
            (home / path).parent.mkdir(exist_ok=True)
            staged.replace(home / path)
    for path in removed:
        with suppress(FileNotFoundError):
            (home / path).unlink()
        with suppress(OSError):  # of the records' folder, when the last one goes
            if (home / path).parent != home:
                (home / path).parent.rmdir()
    for place in sorted({home, *((home / path).parent for path in [*moves.values(), *removed])}, reverse=True):
        if place.is_dir():
            sync_folder(place)
    discard(folder)


def discard(folder: Path) -> None:
    """Remove the journal, from when on nothing is unfinished, and then what else there is."""
    if not folder.exists():
        return
    with suppress(FileNotFoundError):
        (folder / "journal").unlink()
    with suppress(OSError):  # a journal that comes back after a power cut asks for what is done already
        sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _cut(journal: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the journal anew, without a last line that was not written to its end."""
    fresh = journal.with_name("journal.new")
    with fresh.open("wb") as file:
        file.writelines(as_line(line) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(journal)
    sync_folder(journal.parent)


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal, without a last one that was not written to its end; none where there is no journal.

    Raises:
        FormatError: it is damaged, or speaks of files that are not its checkpoint's.
    """
    return read_lines(journal, FOLDER)


def as_line(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
