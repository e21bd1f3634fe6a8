"""The journal of a long run: what is finished, so that the same command can go on after a kill or a power cut.

It lies beside the output, one file a rank, one JSON object a line. A line is written when a piece of work is in its
file; a line `synced: n` when the disk has the first n of them. After a kill every line counts, for the system still
holds what was written; after a restart of the machine only those that were synced.

All files of a run bear a token of its own, so that no two runs write to one file. Whoever goes on with a run takes over
its token, which the names of its journals tell.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from glob import escape
from itertools import chain, count
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.files import make
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import is_inside, is_link, to_replace
from lorasurgery.checkpoint.operation import inputs
from lorasurgery.engine.atomic_file import PARTIAL, new_token, partial_of, sync_folder, write_atomic
from lorasurgery.engine.ranks import Ranks
from lorasurgery.errors import FormatError, MismatchError

UNDO_FOLDER = "lorasurgery-undo"  # of finished records, in a checkpoint's folder or behind the name of a file
JOURNAL, FACTORS, UNDO = ".journal-", ".factors-", ".undo-"
KEPT = 10**9  # bytes worked through: less is done again sooner than anyone could wonder about the remains
_NAME = 200  # bytes of a file's name
_TOKEN = re.compile(r"[0-9a-f]{16}")
_SECONDS = 20.0  # between two syncs


def journals(out: Path, kind: str = JOURNAL) -> list[Path]:
    """The journals (or what else of a run lies beside its output) of runs that were to write `out`."""
    folder = _folder(out)
    return sorted(folder.glob(f"{escape(_stem(out, kind))}*{PARTIAL}")) if folder.is_dir() else []


def partials(out: Path) -> list[Path]:
    """All that a run has written beside its output and in it; of a single file's only what has its name."""
    folder = _folder(out)
    if folder == out:
        return list(folder.rglob(f".*{PARTIAL}"))
    name = escape(out.name)
    beside = (f for f in folder.glob(f"{name}.*/.*{PARTIAL}") if not is_link(f.parent))
    return [*folder.glob(f".{name}*{PARTIAL}"), *beside]


class Records(Mapping[str, Any]):
    """What is known of pieces of work by their keys, as JSON in memory too: lists and numbers take five times as much.

    >>> records = Records({"w": {"kept": []}})
    >>> records.add("v", [1.5])
    '[1.5]'
    >>> records["w"], records["v"], len(records)
    ({'kept': []}, [1.5], 2)
    """

    def __init__(self, found: Mapping[str, Any] | None = None) -> None:
        self._texts: dict[str, str] = {}
        self.update(found or {})

    def add(self, key: str, record: Any) -> str:
        """Add or replace one; returns its JSON."""
        text = self._texts[key] = json.dumps(record)
        return text

    def update(self, found: Mapping[str, Any]) -> None:
        """Add or replace several."""
        for key, record in found.items():
            self.add(key, record)

    def forget(self, key: str) -> None:
        """Keep only the key: its record becomes None."""
        self._texts[key] = "null"

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._texts[key])

    def __contains__(self, key: object) -> bool:
        return key in self._texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


class Run:
    """A resumable run.

    Args:
        out: Its output.
        about: All that its result depends on: inputs as found, options, versions. JSON.
        resume: Go on with what is there.

    Attributes:
        token: In the names of all its files.
        is_new: Whether it began with nothing, so that no file of it can be there.
    """

    def __init__(self, out: Path, about: dict[str, Any], *, resume: bool, ranks: Ranks) -> None:
        self.out, self.about, self.resume, self.ranks = out, about, resume, ranks
        self.token, self.is_new = new_token(), True
        self.done = Records()
        self.resumed = 0
        self._lock = threading.Lock()
        self._size, self._synced, self._naming = 0, time.monotonic(), False

    def path(self, name: str, kind: str = JOURNAL) -> Path:
        """A file of this run beside the output."""
        return _folder(self.out) / f"{_stem(self.out, kind)}{self.token}-{name}{PARTIAL}"

    def new_path(self, kind: str) -> Path:
        """A file beside the output that neither this run nor what it goes on with has, or had before it was removed."""
        older = len(journals(self.out, kind))
        return next(p for n in count(older) if not (p := self.path(f"{self.ranks.rank}-{n}", kind)).exists())

    def begin(self, clear: Callable[[], None]) -> None:
        """Read what is finished, or start over; rank 0 first.

        Args:
            clear: Removes the remains of earlier runs.

        Raises:
            MismatchError: what is there was begun otherwise.
        """
        if self.ranks.first:
            found = journals(self.out) if self.resume else []
            if found:
                _refuse_links(partials(self.out))
                self.done, renamed = _read(found, self.about, self.out)
                self.token, self.is_new = _token_of(found, self.out), False
                self.resumed = len(self.done)  # so that a failure from here on leaves them
                _take_back(self.out, renamed, self.token)
            else:
                clear()
            self._rewrite(found)
        self.token = self.ranks.told(self.token)
        if not self.ranks.first and self.resume:
            self.done, _ = _read(journals(self.out), self.about, self.out)
        self.resumed = len(self.done)
        self._lines = self.resumed if self.ranks.first else 0
        make(self.path(str(self.ranks.rank)))
        self._file = self.path(str(self.ranks.rank)).open("a", encoding="utf-8")
        if not self.ranks.first:
            self._line({"about": self.about, "boot": _boot()})
        self.ranks.wait()

    def add(self, key: str, record: Any, size: int, *, needed: bool = True) -> None:
        """Note that a piece of work of so many bytes is in its file.

        Args:
            needed: Whether this run asks for the record again; otherwise only the journal holds it.
        """
        with self._lock:
            text = self.done.add(key, record)
            self._size += size
            self._lines += 1
            self._text(f'{{"done": {json.dumps(key)}, "record": {text}}}')
            if not needed:
                self.done.forget(key)

    @property
    def is_due(self) -> bool:
        """Whether it is time to sync."""
        return time.monotonic() - self._synced > _SECONDS

    def synced(self, wait_for_disk: Callable[[], None]) -> None:
        """Wait for the disk, and note that it has all that was finished before."""
        self._synced = time.monotonic()
        covered = self._lines
        wait_for_disk()
        self._sync_names()
        with self._lock:
            self._line({"synced": covered})
            os.fsync(self._file.fileno())

    def gather(self) -> Mapping[str, Any]:
        """What all ranks have finished, once all of them are here, each with its inputs as they were.

        Raises:
            FormatError: one was changed meanwhile.
        """
        inputs().check()
        self.ranks.wait()
        if self.ranks.size > 1 and self.ranks.first:
            files = [self.path(str(rank)) for rank in range(self.ranks.size)]
            self.done, _ = _read(files, self.about, self.out)
        return self.done

    def committing(self, names: list[str]) -> None:
        """Note, before the first rename, which files are complete."""
        self._naming = True
        with self._lock:
            self._line({"renamed": names})
            os.fsync(self._file.fileno())

    def end(self, *, committed: bool) -> bool:
        """Close; remove the journals when all is done, or when there is too little to go on with.

        Returns:
            Whether there is something to go on with.
        """
        if hasattr(self, "_file"):
            with suppress(OSError):  # half a line may be left that the disk did not take; what failed is known
                self._file.close()
        worth = self.ranks.size > 1 or self.resumed > 0 or self._size >= KEPT or self._naming
        kept = not committed and worth
        if self.ranks.first and not kept:
            _remove(journals(self.out))
            with suppress(OSError):  # a journal that a power cut brings back should find what it speaks of
                sync_folder(_folder(self.out))
            _remove([*journals(self.out, FACTORS), *journals(self.out, UNDO)])
        return kept

    def _rewrite(self, old: list[Path]) -> None:
        """One journal with all that is finished, in place of those that were there."""
        if self.done:  # what others wrote must be on the disk before this journal says so
            for partial in partials(self.out):
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            self._sync_names()
        target, scratch = self.path("0"), self.path("new")  # those that it is made from are there until it is whole
        lines: list[dict[str, Any]] = [{"about": self.about, "boot": _boot()}]
        done = ({"done": key, "record": record} for key, record in self.done.items())
        data = (f"{json.dumps(line)}\n".encode() for line in chain(lines, done, [{"synced": len(self.done)}]))
        write_atomic(target, data, mode=0o600, partial=scratch)
        for journal in old:
            if journal not in (target, scratch):
                journal.unlink()

    def _sync_names(self) -> None:
        """A file may be on the disk without its name."""
        for folder in {partial.parent for partial in partials(self.out)}:
            sync_folder(folder)

    def _line(self, line: dict[str, Any]) -> None:
        self._text(json.dumps(line))

    def _text(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def _refuse_links(files: list[Path]) -> None:
    """What a run leaves are files, and others would be written to through a link."""
    for file in filter(is_link, files):
        raise FormatError(f"{show(str(file))}: is a link, which no run leaves; --overwrite clears it and starts over")


def _remove(files: list[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


def _folder(out: Path) -> Path:
    return out.parent if out.suffix == ".safetensors" else out


def _stem(out: Path, kind: str) -> str:
    return f".{out.name}{kind}" if out.suffix == ".safetensors" else kind


def _boot() -> str:
    """Which start of which machine this is; empty where nothing tells, and then only synced lines count."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _read(files: list[Path], about: dict[str, Any], out: Path) -> tuple[Records, list[str]]:
    """(key -> record of all that is finished, the files that were being renamed)."""
    done = Records()
    renamed: list[str] = []
    for file in files:
        try:
            found, renamed = _read_one(file, about, out, renamed)
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"{show(str(file))}: is damaged, so --resume can't; --overwrite starts over") from None
        done.update(found)
    return done, renamed


def _read_one(file: Path, about: dict[str, Any], out: Path, renamed: list[str]) -> tuple[dict[str, Any], list[str]]:
    records: list[tuple[str, Any]] = []
    trusted, here = 0, False
    for line in _lines(file):
        if "about" in line:
            _compare(line["about"], about, out)
            here = bool(line["boot"]) and line["boot"] == _boot()
        elif "done" in line:
            records.append((line["done"], line["record"]))
        trusted = line.get("synced", trusted)
        renamed = line.get("renamed", renamed)
    if not all(is_inside(name) and len(name.encode()) <= _NAME for name in renamed):  # which get other names
        raise ValueError
    return dict(records if here else records[:trusted]), renamed


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines up to the first that was not written to its end."""
    with file.open(encoding="utf-8", errors="replace") as text:
        for line in text:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not line.endswith("\n") or not isinstance(found, dict):
                return
            yield found


def _compare(then: Any, now: dict[str, Any], out: Path) -> None:
    then = then if isinstance(then, dict) else {}
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            raise MismatchError(
                f"{show(str(out))}: was begun with another {key} "
                f"({_short(then.get(key))}, now {_short(now.get(key))}); "
                "--resume goes on only with the same, --overwrite starts over"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _token_of(files: list[Path], out: Path) -> str:
    """The token of the run whose journals these are."""
    found = {name[len(_stem(out, JOURNAL)) :].partition("-")[0] for name in (file.name for file in files)}
    if len(found) > 1 or not all(map(_TOKEN.fullmatch, found)):
        raise FormatError(
            f"{show(str(out))}: holds the remains of more than one run, or of another version; --overwrite clears them"
        )
    return found.pop()


def _take_back(out: Path, names: list[str], token: str) -> None:
    """Undo the renames of a commit that was cut short: all files were complete, so nothing is lost."""
    for name in names:
        final = to_replace(_folder(out), name)
        partial = partial_of(final, token)
        if final.exists() and not partial.exists():
            final.replace(partial)
