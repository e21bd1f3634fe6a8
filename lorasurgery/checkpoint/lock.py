"""One writer at a time: the lock of a place that is written to, be it a new output or a checkpoint changed in place.

The lock is the system's, so it goes with the process however that ends. It hangs on a file in the folder, or beside a
single file, which says who holds it, for the message alone. Its holder removes it at the end: whoever had opened it by
then finds that what he locked is no longer what has the name, and tries again.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import is_link
from lorasurgery.checkpoint.modes import mode_within
from lorasurgery.errors import OutputError

LOCK = ".lorasurgery-lock"
_TRIES, _PAUSE = 5, 0.02  # others look for an instant whether somebody is at work; that is no reason to give up
_LOCKLESS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_WORDS = 400  # bytes about the holder


def is_one_file(place: Path) -> bool:
    """Whether a place is, or is to be, a single file."""
    return place.is_file() or (place.suffix == ".safetensors" and not place.is_dir())


def lock_of(place: Path) -> Path:
    """The file that the lock of a place hangs on.

    >>> lock_of(Path("m/model.safetensors")).as_posix()
    'm/.model.safetensors.lorasurgery-lock'
    """
    return place.with_name(f".{place.name}{LOCK}") if is_one_file(place) else place / LOCK


class Lock:
    """The lock of one place, from the making of this object until release().

    Folders that are missing are made for it, and removed again if nothing came into them.

    Examples:
        ```python
        lock = Lock(Path("merged"), "lorasurgery merge …")
        ```

    Args:
        place: The folder or the file.
        call: What its holder does, for those who come second.
        mine: Places whose locks the same operation holds already.

    Raises:
        OutputError: another command holds it, or that of a folder around it or a part within.
        OSError: the system's.
    """

    def __init__(self, place: Path, call: str = "", mine: frozenset[str] = frozenset()) -> None:
        self.place, self.file = place, lock_of(place)
        self.made: list[Path] = []
        self._process = os.getpid()
        try:
            self._descriptor = self._taken()
            try:
                self._refuse_kin(mine)
                self._introduce(call)
            except BaseException:
                self._remove()
                raise
        except BaseException:
            self._unmake()
            raise

    def release(self) -> None:
        """Let others in, and remove the file."""
        if os.getpid() == self._process:  # a fork has the descriptor too, and not the right
            self._remove()
            self._unmake()

    def _taken(self) -> int:
        """A descriptor that is locked and whose file has the name."""
        locked: bool | None = False
        missing: FileNotFoundError | None = None
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE)
            try:
                self._make(self.file.parent)
                descriptor, created = _opened(self.file)
            except FileNotFoundError as problem:  # its last holder has just removed it, or the folder
                missing = problem
                continue
            missing = None
            try:
                locked = _locked(descriptor)
                if (created if locked is None else locked) and _is_named(descriptor, self.file):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        if missing is not None:  # a folder that can't be made, such as a link to nothing
            raise missing
        hint = f", or if it no longer exists remove {show(str(self.file))}" if locked is None else ""
        raise OutputError(_held(self.place, self.place, self.file) + hint)

    def _refuse_kin(self, mine: frozenset[str]) -> None:
        for other, file in _kin(self.place):
            if os.path.realpath(file) not in mine and _is_held(file):
                raise OutputError(_held(self.place, other, file))

    def _introduce(self, call: str) -> None:
        """Say in the file who holds it; where that can't be written, nobody needs it."""
        words = f"process {os.getpid()} on {platform.node()}" + (f": {call}" if call else "")
        with suppress(OSError):
            if os.fstat(self._descriptor).st_size:  # of one who was killed
                os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, words.encode(errors="replace")[:_WORDS])

    def _make(self, folder: Path) -> None:
        for path in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            with suppress(FileExistsError):
                path.mkdir()
                self.made.append(path)

    def _remove(self) -> None:
        if os.name == "posix":  # elsewhere an open file can't be removed
            if _is_named(self._descriptor, self.file):
                with suppress(OSError):
                    self.file.unlink()
            os.close(self._descriptor)
        else:
            os.close(self._descriptor)
            with suppress(OSError):  # somebody else has it open, and will remove it
                self.file.unlink()

    def _unmake(self) -> None:
        for folder in reversed(self.made):
            with suppress(OSError):
                folder.rmdir()


def _opened(file: Path) -> tuple[int, bool]:
    """(descriptor, whether the file was made for it)."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(file, flags | os.O_CREAT | os.O_EXCL, mode_within(file.parent)), True
    except FileExistsError:
        pass
    if is_link(file) or not file.is_file():
        if not os.path.lexists(file):
            raise FileNotFoundError(file)
        raise OutputError(f"{show(str(file))}: is {'a link' if is_link(file) else 'no file'}, which no lock is; "
                          "remove it")  # fmt: skip
    try:
        return os.open(file, flags), False
    except PermissionError:  # another user's, left by a kill: it can be locked all the same
        return os.open(file, flags & ~os.O_RDWR), False


def _locked(descriptor: int) -> bool | None:
    """Lock an open file, if nobody else has; None where the file system has no locks.

    There the file itself is the lock: whoever made it holds it, and after a kill it must be removed by hand.
    """
    try:
        _lock(descriptor)
    except OSError as problem:
        if problem.errno in _LOCKLESS:
            return None
        if problem.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK):
            return False
        raise
    return True


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows; the byte is one that nobody reads
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_named(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one that has the name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _is_held(file: Path) -> bool:
    """Whether somebody holds a lock, without taking it for longer than an instant."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:  # there is none, or no file that a lock hangs on
            return False
        try:
            if _locked(descriptor):
                return False
        except OSError:  # a file system that wants to be asked by those who may write
            return False
        finally:
            os.close(descriptor)
    return True


def _kin(place: Path) -> Iterator[tuple[Path, Path]]:
    """Places that share files with this one, with their locks: folders around it, and a folder's parts and files."""
    home = place.absolute()
    for folder in home.parents[:2]:
        yield folder, folder / LOCK
    if not is_one_file(place):
        for file in home.glob(f".?*{LOCK}"):
            yield home / file.name[1:].removesuffix(LOCK), file
        for file in home.glob(f"*/{LOCK}"):
            yield file.parent, file


def _held(place: Path, held: Path, file: Path) -> str:
    """One line about a lock that somebody else holds."""
    who = ""
    with suppress(OSError), file.open("rb") as opened:
        who = show(opened.read(_WORDS).decode(errors="replace").strip())  # anybody may have written it
    what = "it" if held == place else show(str(held))
    return (
        f"{show(str(place))}: another command is changing {what} at this moment{f' ({who})' if who else ''}; "
        "wait until it is done"
    )
