"""Output that appears whole or not at all: every file under a temporary name, renamed when all are done.

Each file is written beside its final place as `.NAME.TOKEN.lorasurgery-partial` (the token is the run's own), synced,
and renamed at commit; the file that makes a reader take the folder for complete (the index, or adapter_config.json)
comes last. The place is locked meanwhile, and before the first rename every input must still be what it was.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from lorasurgery.checkpoint.files import ReadFile, WriteFile, clone
from lorasurgery.checkpoint.header import MAX_HEADER, show
from lorasurgery.checkpoint.inside import refuse_folder_links, refuse_link
from lorasurgery.checkpoint.journal import JOURNAL, UNDO_FOLDER, Run, journals, partials
from lorasurgery.checkpoint.locate import INDEX_SUFFIX, PIPELINE
from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.checkpoint.operation import current, holding
from lorasurgery.checkpoint.plan import PlannedFile
from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.engine.atomic_file import PARTIAL, new_token, partial_of, sync_folder
from lorasurgery.errors import OutputError
from lorasurgery.report import RECORD_NAME

_NOTHING = "nothing was left behind"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool, *, resume: bool = False) -> None:
    """Refuse an output that would touch an input, or that exists and may not be replaced.

    Before it is looked at, it is locked for the operation under way.

    Args:
        resume: A run that was interrupted may go on, whatever it left.

    Raises:
        OutputError: with the next move; another command is writing there.
    """
    where, real = show(str(out)), out.resolve()
    for path in inputs:
        source = path.resolve()
        if real == source or real.is_relative_to(source):
            raise OutputError(f"{where}: is the input {show(str(path))}, or lies inside it; choose another output")
        if source.is_relative_to(real):
            raise OutputError(
                f"{where}: holds the input {show(str(path))}, which could be replaced; choose another output"
            )
    if out.is_symlink() and not out.exists():
        raise OutputError(f"{where}: is a link to nothing; remove it or choose another output")
    if out.suffix == ".safetensors" and out.is_dir():
        raise OutputError(f"{where}: is a folder but names a file; choose another output")
    if out.exists() and out.suffix != ".safetensors" and not out.is_dir():
        raise OutputError(f"{where}: exists and is not a folder; choose another output")
    operation = current()
    if operation is not None:
        try:
            operation.hold(out)
        except OSError as problem:
            raise _cannot_write(out, problem, _NOTHING) from None
    if not (overwrite or (resume and journals(out))) and out.exists():
        _check_empty(out, where)


def _check_empty(out: Path, where: str) -> None:
    if out.is_file():
        raise OutputError(f"{where}: exists; --overwrite replaces it")
    names = [f.name for f in out.iterdir() if not f.name.endswith(LOCK)]
    if names and all(n.endswith(PARTIAL) for n in names):
        how = "--resume goes on with it, " if any(n.startswith(JOURNAL) for n in names) else ""
        raise OutputError(f"{where}: holds only the remains of an interrupted run; {how}--overwrite clears them")
    if names:
        raise OutputError(f"{where}: exists and is not empty; --overwrite replaces what it holds")


class Output:
    """A folder (or one .safetensors file) being written; nothing is visible before commit().

    Examples:
        ```python
        with Output(Path("merged"), overwrite=False) as out:
            with out.tensor_file(planned) as file:
                file.write("w", tensor)
            out.write_bytes("config.json", b"{}")
            out.commit(last="model.safetensors")
        ```

    Args:
        run: What an interrupted run of the same kind left is resumed, and kept when this one is interrupted too;
            None for what is done at once.
        inputs: What goes into it; who may not read that may not read what is written.
    """

    def __init__(
        self, out: Path, *, overwrite: bool, run: Run | None = None, inputs: Iterable[str | Path] = ()
    ) -> None:
        self.single = out.suffix == ".safetensors"
        self.folder = out.parent if self.single else out
        self.out, self.name, self.overwrite, self.run = out, out.name, overwrite, run
        self.modes = Modes.of(inputs, self.folder)
        self._records = f"{self.name}.{UNDO_FOLDER}" if self.single else UNDO_FOLDER
        self._token = new_token()
        self.bytes_written = 0
        self._made: list[Path] = []
        self._staged: dict[str, Path] = {}
        self._named: list[Path] = []
        self._committed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Output:
        with ExitStack() as ending:
            try:
                operation = ending.enter_context(holding(self.out))
                self._inputs = operation.inputs
                for folder in operation.made:  # for the lock, before anybody knew what would go into it
                    folder.chmod(stat.S_IMODE(folder.stat().st_mode) & self.modes.folder)
                self._make(self.folder)
                refuse_link(self.folder / self._records)
                if self.run is not None:
                    self.run.begin(self._clear)
                    self._token = self.run.token
                elif self.overwrite:
                    self._clear()
            except OSError as problem:
                kept = self._undone()
                raise self._failed(problem, kept=kept) from None
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._ending:
            kept = self._undone()
        if isinstance(problem, KeyboardInterrupt):
            problem.args = (self._left(kept),)
        if isinstance(problem, OSError):
            raise self._failed(problem, kept=kept) from None

    def _undone(self) -> bool:
        """Remove what is neither finished nor worth going on with; returns whether something is kept for that."""
        kept = self.run.end(committed=self._committed) if self.run is not None else False
        if not self._committed and not kept:
            for file in [*self._named, *self._staged.values()]:
                with suppress(OSError):
                    file.unlink()
            for folder in reversed(self._made):
                with suppress(OSError):
                    folder.rmdir()
        return kept

    def tensor_file(self, planned: PlannedFile) -> TensorFile:
        """A safetensors file to be filled tensor by tensor."""
        return TensorFile(self._stage(planned.name), planned, self._count, mode=self.modes.file, new=self._is_new)

    def expect(self, name: str) -> None:
        """Count on a file that another rank, or the run before this one, wrote."""
        self._stage(name)

    def check_kept(self, names: Iterable[str]) -> None:
        """See that files are there of which an interrupted run finished some: new ones would hold zeros in its place.

        Raises:
            OutputError: one was removed.
        """
        for partial in (partial_of(self.folder / name, self._token) for name in names):
            if not partial.is_file():
                raise OutputError(f"{show(str(partial))}: was removed, so --resume can't; --overwrite starts over")

    def write_bytes(self, name: str, data: bytes) -> None:
        """Stage a small file."""
        with WriteFile(self._stage(name), mode=self.modes.file, new=self._is_new) as file:
            file.truncate(0)
            file.write_at(0, memoryview(data))
            file.sync()
        self._count(len(data))

    def copy_file(self, name: str, source: Path) -> int:
        """Stage a byte-for-byte copy of a file, sharing its blocks where the file system can; returns its size.

        Raises:
            FormatError: the file was seen before, and changed since.
        """
        with ReadFile(source) as old, WriteFile(self._stage(name), mode=self.modes.file, new=self._is_new) as new:
            found = os.fstat(old.fileno())
            self._inputs.compare(source, found)
            size = found.st_size
            if not clone(old, new):
                new.copy_at(0, old, 0, size)
                new.truncate(size)
            new.sync()
        self._count(size)
        return size

    def _clear(self) -> None:
        """Remove what an interrupted run left; of a single file only what has its name."""
        for file in partials(self.folder / self.name if self.single else self.folder):
            file.unlink()

    def commit(self, *, last: str) -> None:
        """Give every file its name, `last` at the end; a kill in between leaves a folder no reader takes for whole.

        Raises:
            FormatError: an input is no longer what it was when it was read.
            OSError: the system refuses a rename; at the end of the `with` it becomes an OutputError.
        """
        self._inputs.check()
        if self.run is not None:
            self._sync_names()
            self.run.committing(list(self._staged))
        # a resumed run may have begun with --overwrite; without it the folder was empty then
        if self.overwrite or (self.run is not None and self.run.resume):
            self._retire(last)
        for names in ([n for n in self._staged if n != last], [last]):
            self._sync_names()  # after a power cut too, no name is there before those that come first
            self._rename(names)
        self._committed = True
        self._inputs.settle()
        self._sync_names()

    def _rename(self, names: Sequence[str]) -> None:
        for name in names:
            self._staged[name].replace(self.folder / name)
            self._named.append(self.folder / name)

    def _sync_names(self) -> None:
        folders = {self.folder, *(path.parent for path in self._staged.values())}
        made = self._made if self.single else [self.folder, *self._made]
        for folder in sorted({*folders, *(path.parent for path in made)}, reverse=True):
            with nullcontext() if folder in folders else suppress(PermissionError):  # others may be closed to us
                sync_folder(folder)

    def _retire(self, last: str) -> None:
        """Remove what the old output's readers go by, its weights and its undo records; nothing else of the user's.

        Indexes go after the shards that only they tell of, so that whoever resumes still knows those; new names come
        when neither is there any more, so that nobody reads a mixture.
        """
        for paths in ([], []) if self.single else self._stale(last):
            for path in paths:
                path.unlink(missing_ok=True)
            self._sync_names()
        records = self.folder / self._records
        for file in records.glob("[0-9]*.safetensors") if records.is_dir() else ():
            if f"{records.name}/{file.name}" not in self._staged:
                file.unlink()
        with suppress(OSError):  # where there are none to come
            records.rmdir()

    def _stale(self, last: str) -> tuple[list[Path], list[Path]]:
        """Weights that no new ones replace, and what a reader looks for first."""
        weights, guides = [], [self.folder / name for name in (PIPELINE, last, RECORD_NAME)]
        for folder in {(self.folder / name).parent for name in self._staged}:
            names = {f.name for f in folder.iterdir()}
            indexes = {n for n in names if n.endswith(INDEX_SUFFIX)}
            staged = {Path(n).name for n in self._staged if (self.folder / n).parent == folder}
            old = {n for i in indexes for n in _indexed(folder / i)} | set(_WEIGHTS)
            weights += [folder / n for n in sorted((old & names) - staged)]
            guides += [folder / n for n in sorted({*indexes, "adapter_config.json"} & names)]
        return weights, guides

    def _stage(self, name: str) -> Path:
        final = self.folder / name
        refuse_folder_links(self.folder, name)
        self._make(final.parent)
        partial = partial_of(final, self._token)
        self._staged[name] = partial
        return partial

    @property
    def _is_new(self) -> bool:
        """Whether no file of this run can be there before it is made here: of several ranks, each may make it."""
        return self.run is None or (self.run.is_new and self.run.ranks.size == 1)

    def _make(self, folder: Path) -> None:
        missing = [p for p in [folder, *folder.parents] if not p.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):  # another rank was faster
                path.mkdir(self.modes.folder)
                self._made.append(path)

    def _count(self, written: int) -> None:
        with self._lock:
            self.bytes_written += written

    def _failed(self, problem: OSError, *, kept: bool = False) -> OutputError:
        return _cannot_write(self.folder, problem, self._left(kept))

    def _left(self, kept: bool) -> str:
        if self._committed:
            return "all of it is there, but the disk did not say that it has it"
        return "what is finished is kept for --resume" if kept else _NOTHING


def _cannot_write(place: Path, problem: OSError, left: str) -> OutputError:
    where = show(str(problem.filename or place))
    return OutputError(f"{where}: cannot be written ({problem.strerror or problem}); {left}")


def _indexed(index: Path) -> Iterable[str]:
    try:
        if not index.is_file() or index.stat().st_size > MAX_HEADER:  # no index of ours, and what it names stays
            return []
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return [str(v) for v in weight_map.values()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []
