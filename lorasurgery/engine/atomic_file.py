"""One small file, written whole or not at all, and the names that files bear until they are whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".lorasurgery-partial"
_ENOUGH = 1 << 20  # bytes that are worth a call of the system


def new_token() -> str:
    """What tells the files of one run from those of all others."""
    return secrets.token_hex(8)


def partial_of(final: Path, token: str) -> Path:
    """Where a run writes a file before it gets its name."""
    return final.parent / f".{final.name}.{token}{PARTIAL}"


def write_atomic(
    file: Path, data: bytes | Iterable[bytes], *, mode: int, partial: Path | None = None, durable: bool = True
) -> None:
    """Write a file beside its place, sync it and rename it, so that a failure leaves what was there before.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "record.json"
    >>> write_atomic(file, b"{}", mode=0o600)
    >>> file.read_bytes(), [f.name for f in file.parent.iterdir()]
    (b'{}', ['record.json'])

    Args:
        file: Its name; a file of that name is replaced.
        data: All of it, or its pieces one after the other.
        mode: Who may read it, as far as the umask allows.
        partial: The name it bears meanwhile, where that must be known to whoever comes after a kill; one that a kill
            left there is removed.
        durable: Wait until the disk has the new name too. Without it a power cut may bring the old file back, and the
            folder need not be readable.

    Raises:
        OSError: the system's. If only the folder could not be synced, the file has its name already.
    """
    if partial is None:
        partial = partial_of(file, new_token())
    else:
        partial.unlink(missing_ok=True)
    try:
        _write_new(partial, [data] if isinstance(data, bytes) else data, mode)
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync_folder(file.parent)


def _write_new(path: Path, pieces: Iterable[bytes], mode: int) -> None:
    """Write a file that must not be there yet, and wait until the disk has its bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        held = bytearray()
        for piece in pieces:
            held += piece
            if len(held) >= _ENOUGH:
                _write_all(descriptor, held)
                held = bytearray()
        _write_all(descriptor, held)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytearray) -> None:
    left = memoryview(data)
    while left:  # a disk that is nearly full takes a part and says so
        left = left[os.write(descriptor, left) :]


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names."""
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
