"""What can go wrong, as exceptions. No click here: the command line turns kinds into exit codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class SurgeryError(Exception):
    """A failure with one clear line: file, tensor, expected, found, next move.

    >>> str(SurgeryError("a.safetensors: the file is empty"))
    'a.safetensors: the file is empty'
    """


class FormatError(SurgeryError):
    """A file is not what its name or its header claims."""


class MismatchError(SurgeryError):
    """Two inputs do not belong together: names or shapes differ."""


class UnsupportedError(SurgeryError):
    """A known thing that is refused by name, because ignoring it would give wrong weights."""


class OutputError(SurgeryError):
    """The output cannot be written where it was asked for."""


class UsageError(SurgeryError):
    """Options that contradict each other or have no meaning; exit status 2."""


def some(names: Sequence[str]) -> str:
    """The first few names, for a message.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Say which known names come nearest to `name`, as the tail of an error line.

    >>> nearest("q_porj", ["q_proj", "k_proj", "norm"])
    '; nearest: q_proj, k_proj'
    >>> nearest("zzz", ["q_proj"])
    ''
    """
    close = get_close_matches(name, list(known), n=n, cutoff=0.5)
    return "; nearest: " + ", ".join(close) if close else ""
