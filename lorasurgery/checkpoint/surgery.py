"""Changing tensors inside a checkpoint's own files, so that a kill or a power cut at any byte loses nothing.

New bytes first go to a file beside the checkpoint and to the disk; then a line of the journal says where they belong;
then they are copied there, and another line says so. Whoever comes after a kill copies again what the last line speaks
of: that can be done any number of times. At the end records and other files get their names in the same way.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lorasurgery.checkpoint.files import ReadFile, WriteFile, sync_folder
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.heap import Heap
from lorasurgery.errors import FormatError, MismatchError, OutputError, SurgeryError

if TYPE_CHECKING:
    from filelock import BaseFileLock

FOLDER, LOCK = ".lorasurgery-surgery", ".lorasurgery-lock"
_GO_ON = "some tensors are changed already, and --resume goes on from here"
BATCH = 128 << 20  # bytes that are written twice before they count


def surgery_folder(checkpoint: Path) -> Path:
    """Where the journal of an operation inside a checkpoint lies: in its folder, or beside its file."""
    return checkpoint / FOLDER if checkpoint.is_dir() else checkpoint.with_name(f".{checkpoint.name}{FOLDER}")


def unfinished(checkpoint: Path) -> dict[str, Any] | None:
    """What operation a checkpoint is in the middle of: the first line of its journal; None for a whole one."""
    journal = surgery_folder(checkpoint) / "journal"
    lines = _lines(journal) if journal.is_file() else []
    return lines[0].get("about") if lines else None


def refuse_unfinished(checkpoint: Path) -> None:
    """Refuse to read a checkpoint of which some tensors are new and some are old.

    Raises:
        MismatchError: with the next move.
    """
    about = unfinished(checkpoint)
    if about is not None:
        raise MismatchError(in_the_middle(checkpoint, about))


def in_the_middle(checkpoint: Path, about: Mapping[str, Any]) -> str:
    """One line about an operation that was interrupted."""
    return (
        f"{show(str(checkpoint))}: is in the middle of `{about.get('call', 'an operation')}`, which was interrupted "
        "or still runs: some tensors are new and some are old; the same command with --resume finishes it"
    )


class Surgery:
    """One operation on a checkpoint in place; others are kept away by a lock until it ends.

    Example:
        with Surgery(Path("llama"), {"call": "merge …"}, resume=False) as surgery:
            surgery.put("w 0", "model.safetensors", 128, new_bytes, record)
            surgery.flush()
            surgery.finish({"lorasurgery.json": b"{}"}, removed=[])

    Args:
        checkpoint: Folder or file. about: What the operation is; only the same may go on with it. JSON.
        resume: Go on with what is there.

    Attributes:
        done: What is in the files already: key -> record. checked: Whether check_passed() was called, now or before.
        noted: What was given to it then.
        heap: Takes what must survive a kill beside the new bytes.
    """

    def __init__(self, checkpoint: Path, about: dict[str, Any], *, resume: bool) -> None:
        self.checkpoint, self.resume = checkpoint, resume
        self.about: dict[str, Any] = json.loads(json.dumps(about))  # as it comes back: tuples are lists
        self.home = checkpoint if checkpoint.is_dir() else checkpoint.parent
        self.folder = surgery_folder(checkpoint)
        self.done: dict[str, Any] = {}
        self.checked, self.resumed, self.bytes_written = False, 0, 0
        self.noted: Any = None
        self._batch: list[list[Any]] = []
        self._keys: dict[str, Any] = {}
        self._end, self._turn = 0, threading.Lock()

    def __enter__(self) -> Surgery:
        self._lock = lock(self.checkpoint)
        try:
            about = settle(self.checkpoint)
            if about is None:
                self._begin()
            elif not self.resume:
                raise MismatchError(in_the_middle(self.checkpoint, about))
            else:
                self._go_on(about)
            self._journal = (self.folder / "journal").open("ab", buffering=0)
            self._redo = WriteFile(self.folder / "redo")
            self.heap = Heap(self.folder / "heap")
        except OSError as problem:
            self._lock.release()
            raise self._failed(problem) from None
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._turn:  # a thread that an interruption did not reach may be copying
            for file in (self._journal, self._redo, self.heap):
                file.close()
            if kind is not None and not self.done and not self.resumed:  # nothing was changed yet
                _discard(self.folder)
        self._lock.release()
        if isinstance(problem, OSError):
            raise self._failed(problem) from None
        changed = bool(self.done or self.resumed)
        if isinstance(problem, (KeyboardInterrupt, MemoryError)):
            problem.args = (_GO_ON if changed else "nothing was changed",)
        elif isinstance(problem, (SurgeryError, RuntimeError)) and changed:
            problem.args = (f"{problem}; {_GO_ON}",)

    def check_passed(self, noted: Any = None) -> None:
        """Note that everything can be done, so that nothing but a kill or the disk can stop it from now on.

        Args:
            noted: What is known of the checkpoint as it was, JSON.
        """
        self.checked, self.noted = True, noted
        self._line({"checked": True, "noted": noted})

    def put(self, key: str, file: str, place: int, data: memoryview, record: Any) -> None:
        """Change some bytes of a file, now or with the next flush(); one thread at a time.

        Args:
            key: Of this piece of work. record: What is to be known of it later, JSON.
        """
        self._redo.write_at(self._end, data)
        self._batch.append([file, place, self._end, len(data), zlib.crc32(data)])
        self._keys[key] = record
        self._end += len(data)
        if self._end >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Wait until all that was put is where it belongs, on the disk."""
        if not self._keys:
            return
        with self._turn:
            self._redo.sync()
            self.heap.sync()
            self._line({"ready": self._batch, "done": self._keys})
            self.done |= self._keys
            _apply(self.home, self.folder, self._batch)
            self._line({"applied": True})
        self.bytes_written += self._end
        self._batch, self._keys, self._end = [], {}, 0

    def staged(self, name: str) -> Path:
        """Where a file is written that finish() gives its name."""
        return self.folder / f"new-{name}"

    def finish(self, files: Mapping[str, bytes], *, staged: Mapping[str, str], removed: Sequence[str]) -> None:
        """Give other files their names, and end.

        Args:
            files: Paths below the checkpoint's folder -> new content. staged: The same -> name of a staged file.
            removed: What goes.
        """
        self.flush()
        moves = {name: path for path, name in staged.items()}
        for number, (path, data) in enumerate(files.items()):
            moves[str(number)] = path
            self.staged(str(number)).write_bytes(data)
            self.bytes_written += len(data)
        for name in moves:
            with self.staged(name).open("rb") as file:
                os.fsync(file.fileno())
        self._line({"ending": moves, "removed": list(removed)})
        _end(self.home, self.folder, moves, removed)

    def _begin(self) -> None:
        if self.folder.exists():  # begun, and killed before its first line
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        with (self.folder / "journal").open("wb") as journal:
            journal.write(_text({"about": self.about}))
            journal.flush()
            os.fsync(journal.fileno())
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def _go_on(self, about: dict[str, Any]) -> None:
        for key in sorted({*about, *self.about}):
            if about.get(key) != self.about.get(key):
                raise MismatchError(
                    f"{show(str(self.checkpoint))}: is in the middle of `{about.get('call')}`; its {key} was another "
                    "one, and --resume goes on only with the same"
                )
        for line in _lines(self.folder / "journal"):
            self.done |= line.get("done", {})
            self.checked = self.checked or "checked" in line
            self.noted = line.get("noted", self.noted)
        self.resumed = len(self.done)

    def _line(self, line: dict[str, Any]) -> None:
        left = memoryview(_text(line))
        while left:  # a disk that is nearly full takes a part and says so
            left = left[self._journal.write(left) or 0 :]
        os.fsync(self._journal.fileno())

    def _failed(self, problem: OSError) -> OutputError:
        where = show(str(problem.filename or self.checkpoint))
        left = "--resume goes on once that is mended" if self.done else "nothing was changed"
        return OutputError(f"{where}: cannot be written ({problem.strerror or problem}); {left}")


def lock(checkpoint: Path) -> BaseFileLock:
    """Keep other writers away from a checkpoint until the lock is released, or this process ends.

    Raises:
        OutputError: another one is at work.
    """
    from filelock import FileLock, Timeout

    place = checkpoint / LOCK if checkpoint.is_dir() else checkpoint.with_name(f".{checkpoint.name}{LOCK}")
    found = FileLock(place)
    try:
        found.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{show(str(checkpoint))}: another command is changing it at this moment; wait until it is done"
        ) from None
    except OSError as problem:
        raise OutputError(
            f"{show(str(place))}: cannot be written ({problem.strerror or problem}); nothing was changed"
        ) from None
    return found


def settle_first(checkpoint: Path, *, resume: bool) -> bool:
    """Before an operation in place is planned: finish what needs nothing but copying.

    Returns:
        Whether the operation that is to be resumed is complete with that.

    Raises:
        MismatchError: another one is unfinished. OutputError: another one is at work.
    """
    if unfinished(checkpoint) is None:
        return False
    held = lock(checkpoint)
    try:
        about = settle(checkpoint)
    finally:
        held.release()
    if about is not None and not resume:
        raise MismatchError(in_the_middle(checkpoint, about))
    return about is None and resume


def settle(checkpoint: Path) -> dict[str, Any] | None:
    """Bring to its place what an interrupted operation had made ready; under the lock.

    Returns:
        What the operation is when some of it is still missing; None when it is complete, or never began.

    Raises:
        FormatError: what was made ready is damaged.
    """
    folder, home = surgery_folder(checkpoint), checkpoint if checkpoint.is_dir() else checkpoint.parent
    lines = _lines(folder / "journal") if (folder / "journal").is_file() else []
    if not lines or "about" not in lines[0]:
        return None
    last = lines[-1]
    if "ending" in last:
        _end(home, folder, last["ending"], last["removed"])
        return None
    if "ready" in last:
        _check(folder, last["ready"])
        _apply(home, folder, last["ready"])
    _cut(folder / "journal", [*lines, {"applied": True}] if "ready" in last else lines)
    return dict(lines[0]["about"])


def _check(folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    with ReadFile(folder / "redo") as redo:
        for _, _, start, size, crc in batch:
            data = bytearray(size)
            if redo.read_all(start, memoryview(data)) != size or zlib.crc32(data) != crc:
                raise FormatError(f"{show(str(folder / 'redo'))}: is damaged; leave it, and ask for help with it")


def _apply(home: Path, folder: Path, batch: Sequence[Sequence[Any]]) -> None:
    """Copy what is ready to where it belongs."""
    with ReadFile(folder / "redo") as redo:
        for name in dict.fromkeys(item[0] for item in batch):
            with WriteFile(home / name) as target:
                for file, place, start, size, _ in batch:
                    if file == name and target.copy_at(place, redo, start, size) != size:
                        raise OSError(5, "the new bytes end too soon", str(folder / "redo"))
                target.sync()


def _end(home: Path, folder: Path, moves: Mapping[str, str], removed: Sequence[str]) -> None:
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
    for place in {(home / path).parent for path in [*moves.values(), *removed]}:
        if place.is_dir():
            sync_folder(place)
    _discard(folder)


def _discard(folder: Path) -> None:
    """Remove the journal, from when on nothing is unfinished, and then what else there is."""
    with suppress(FileNotFoundError):
        (folder / "journal").unlink()
    with suppress(OSError):  # a journal that comes back after a power cut asks for what is done already
        sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _cut(journal: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the journal anew, without a last line that was not written to its end."""
    fresh = journal.with_name("journal.new")
    with fresh.open("wb") as file:
        file.writelines(_text(line) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(journal)
    sync_folder(journal.parent)


def _lines(journal: Path) -> list[dict[str, Any]]:
    found = []
    with journal.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                break
            found.append(line)
    return found


def _text(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
