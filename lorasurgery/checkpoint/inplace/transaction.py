"""Changing tensors inside a checkpoint's own files, so that a kill or a power cut at any byte loses nothing.

New bytes first go to a file beside the checkpoint and to the disk; then a line of the journal says where they belong;
then they are copied there, and another line says so. Whoever comes after a kill copies again what the last line speaks
of: that can be done any number of times. At the end records and other files get their names in the same way.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from lorasurgery.checkpoint.files import ScratchFile, WriteFile
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inplace.journal import check_line, file_of
from lorasurgery.checkpoint.inplace.recover import (
    FIXED,
    FOLDER,
    apply,
    as_line,
    cannot_write,
    discard,
    end,
    in_the_middle,
    lines_of,
    recover,
    surgery_folder,
)
from lorasurgery.checkpoint.journal import Records
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.checkpoint.operation import holding
from lorasurgery.engine.atomic_file import sync_folder
from lorasurgery.errors import MismatchError, OutputError, SurgeryError

_GO_ON = "some tensors are changed already, and --resume goes on from here"
BATCH = 128 << 20  # bytes that are written twice before they count
_PIECES = 8192  # of a batch: what is known of each is in memory until they count


class Surgery:
    """One operation on a checkpoint in place; others are kept away by a lock until it ends.

    Examples:
        ```python
        with Surgery(Path("llama"), {"call": "merge …"}, resume=False) as surgery:
            surgery.put("w 0", "model.safetensors", 128, new_bytes, record)
            surgery.flush()
            surgery.finish({"lorasurgery.json": b"{}"}, removed=[])
        ```

    Args:
        checkpoint: Folder or file.
        about: What the operation is; only the same may go on with it. JSON.
        resume: Go on with what is there.
        inputs: What else new files are made from; who may not read it may not read them.

    Attributes:
        done: What is in the files already: key -> record.
        checked: Whether check_passed() was called, now or before.
        noted: What was given to it then.
        scratch: Takes what must survive a kill beside the new bytes.
    """

    def __init__(
        self, checkpoint: Path, about: dict[str, Any], *, resume: bool, inputs: Sequence[str | Path] = ()
    ) -> None:
        self.checkpoint, self.resume = checkpoint, resume
        self.about: dict[str, Any] = json.loads(json.dumps(about))  # as it comes back: tuples are lists
        self.home = checkpoint if checkpoint.is_dir() else checkpoint.parent
        self.folder = surgery_folder(checkpoint)
        self.modes = Modes.of([checkpoint, *inputs], self.home)
        self.done = Records()
        self.checked, self.resumed, self.bytes_written = False, 0, 0
        self.noted: Any = None
        self._batch: list[list[Any]] = []
        self._keys: dict[str, Any] = {}
        self._end, self._turn, self._putting = 0, threading.Lock(), threading.Lock()

    def __enter__(self) -> Surgery:
        begun, self._held = False, ExitStack()
        try:
            self._inputs = self._held.enter_context(holding(self.checkpoint)).inputs
        except OSError as problem:
            raise self._failed(problem, changed=False) from None
        try:
            about = recover(self.checkpoint)
            begun = about is None
            if about is None:
                self._begin()
            elif not self.resume:
                raise MismatchError(in_the_middle(self.checkpoint, about))
            else:
                self._go_on(about)
            with ExitStack() as files:
                self._journal = files.enter_context((self.folder / "journal").open("ab", buffering=0))
                self._redo = files.enter_context(WriteFile(self.folder / "redo"))
                self.scratch = ScratchFile(self.folder / "heap")  # the name that journals speak of
                files.callback(self.scratch.close)
                sync_folder(self.folder)  # what a line speaks of must have its name by then
                self._files = files.pop_all()
        except BaseException as problem:
            if begun:
                discard(self.folder)
            self._held.close()
            if isinstance(problem, OSError):
                raise self._failed(problem, changed=not begun) from None
            if isinstance(problem, KeyboardInterrupt) and begun:
                problem.args = ("nothing was changed",)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._turn:  # a thread that an interruption did not reach may be copying
            self._files.close()
            if kind is not None and not self.done and not self.resumed:  # nothing was changed yet
                discard(self.folder)
        self._held.close()
        changed = bool(self.done or self.resumed)
        if isinstance(problem, OSError):
            raise self._failed(problem, changed=changed) from None
        if isinstance(problem, (KeyboardInterrupt, MemoryError)):
            problem.args = (_GO_ON if changed else "nothing was changed",)
        elif isinstance(problem, (SurgeryError, RuntimeError)) and changed:
            problem.args = (f"{problem}; {_GO_ON}",)

    def check_passed(self, noted: Any = None) -> None:
        """Note that everything can be done, so that nothing but a kill or the disk can stop it from now on.

        Args:
            noted: What is known of the checkpoint as it was, JSON.

        Raises:
            FormatError: a file was changed while it was read, so what was tried is not what would be done.
        """
        self._inputs.check()
        self.checked, self.noted = True, noted
        self._line({"checked": True, "noted": noted})

    def put(self, key: str, file: str, place: int, data: memoryview, record: Any) -> None:
        """Change some bytes of a file, now or with the next flush(); one thread at a time.

        Args:
            key: Of this piece of work.
            record: What is to be known of it later, JSON.
        """
        if not self._putting.acquire(blocking=False):
            raise RuntimeError("two threads change one checkpoint")  # a mistake of ours: their bytes would be mixed
        try:
            self._redo.write_at(self._end, data)
            self._add_to_batch(file, place, data)
            self._keys[key] = record
            self._end += len(data)
            if self._end >= BATCH or len(self._keys) >= _PIECES:
                self.flush()
        finally:
            self._putting.release()

    def _add_to_batch(self, file: str, place: int, data: memoryview) -> None:
        """Note where the new bytes belong: what continues the last stretch makes it longer."""
        last = self._batch[-1] if self._batch else None
        if last is not None and last[0] == file and last[1] + last[3] == place:
            last[3:] = last[3] + len(data), zlib.crc32(data, last[4])
        else:
            self._batch.append([file, place, self._end, len(data), zlib.crc32(data)])

    def flush(self) -> None:
        """Wait until all that was put is where it belongs, on the disk.

        Raises:
            FormatError: a file that it was made from was changed meanwhile; then none of it goes there.
        """
        if not self._keys:
            return
        with self._turn:
            self._inputs.check()
            self._redo.sync()
            self.scratch.sync()
            self._line({"ready": self._batch, "done": self._keys})
            self.done.update(self._keys)
            with self._inputs.changing({self.home / item[0] for item in self._batch}):
                apply(self.home, self.folder, self._batch)
            self._line({"applied": True})
        self.bytes_written += self._end
        self._batch, self._keys, self._end = [], {}, 0

    def staged(self, name: str) -> Path:
        """Where a file is written that finish() gives its name."""
        return self.folder / f"new-{name}"

    def finish(self, files: Mapping[str, bytes], *, staged: Mapping[str, str], removed: Sequence[str]) -> None:
        """Give other files their names, and end.

        Args:
            files: Paths below the checkpoint's folder -> new content.
            staged: The same -> name of a staged file.
            removed: What goes.
        """
        self.flush()
        moves = {name: path for path, name in staged.items()}
        for number, (path, data) in enumerate(files.items()):
            moves[str(number)] = path
            self._stage(str(number), data)
        for name, path in moves.items():
            with self.staged(name).open("rb") as file:
                self._take_mode(file.fileno(), self.home / path)
                os.fsync(file.fileno())
        sync_folder(self.folder)
        self._line({"ending": moves, "removed": list(removed)})
        with self._inputs.changing(self.home / path for path in [*moves.values(), *removed]):
            end(self.home, self.folder, moves, removed)

    def _stage(self, name: str, data: bytes) -> None:
        with WriteFile(self.staged(name), mode=self.modes.file) as file:
            file.truncate(0)
            file.write_at(0, memoryview(data))
        self.bytes_written += len(data)

    def _take_mode(self, descriptor: int, final: Path) -> None:
        """What takes a file's place may be read by the same."""
        if hasattr(os, "fchmod") and final.is_file():
            os.fchmod(descriptor, stat.S_IMODE(final.stat().st_mode))

    def _begin(self) -> None:
        self.folder.mkdir(0o700)
        with WriteFile(self.folder / "journal") as journal:
            journal.write_at(0, memoryview(as_line({"about": self.about})))
            journal.sync()
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def _go_on(self, about: dict[str, Any]) -> None:
        for key in sorted({*about, *self.about}):
            if about.get(key) != self.about.get(key):
                raise MismatchError(
                    f"{show(str(self.checkpoint))}: is in the middle of `{about.get('call')}`; its {key} was another "
                    "one, and --resume goes on only with the same"
                )
        for line in lines_of(self.folder / "journal"):
            self.done.update(line.get("done", {}))
            self.checked = self.checked or "checked" in line
            self.noted = line.get("noted", self.noted)
        self.resumed = len(self.done)

    def _line(self, line: dict[str, Any]) -> None:
        check_line(line, self.home, file_of(self.folder, FOLDER))
        left = memoryview(as_line(line))
        while left:  # a disk that is nearly full takes a part and says so
            left = left[self._journal.write(left) or 0 :]
        os.fsync(self._journal.fileno())

    def _failed(self, problem: OSError, *, changed: bool) -> OutputError:
        return cannot_write(self.checkpoint, problem, FIXED if changed else "nothing was changed")
