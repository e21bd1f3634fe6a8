"""What can go wrong, as exceptions. No click here: the command line turns kinds into exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from heapq import nsmallest

_LONGEST_WORD, _LONGEST_LINE = 600, 4000
_COMPARED, _COMPARED_LENGTH = 1000, 200  # names, and characters of each: comparing them takes the square of both


class SurgeryError(Exception):
    """A failure with one clear line: file, tensor, expected, found, next move.

    Examples:
        >>> str(SurgeryError("a.safetensors: the file is empty"))
        'a.safetensors: the file is empty'
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


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


def one_line(message: str) -> str:
    """A message as one line of bounded length, whatever names from a file stand in it.

    Names may hold line breaks, a terminal's control characters or half a character: they are shown as escapes.

    >>> one_line("a.safetensors: b\\n\\x1b[2J: unknown")
    'a.safetensors: b\\\\n\\\\x1b[2J: unknown'
    """
    if len(message) > _LONGEST_WORD:
        message = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: _cut(word[0], _LONGEST_WORD), message)
        message = _cut(message, _LONGEST_LINE)
    return plain(message)


def plain(text: str) -> str:
    """A text as any terminal shows it: control characters and half characters as escapes.

    >>> plain("a\\tb")
    'a\\\\tb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _cut(text: str, most: int) -> str:
    """Both ends of a text that is too long."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 6 :]}"


def some(names: Sequence[str]) -> str:
    """The first few names, for a message.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def size_of(shape: Sequence[int]) -> str:
    """A shape as people read it.

    >>> size_of((4096, 11008)), size_of(())
    ('4096×11008', 'a scalar')
    """
    return "×".join(map(str, shape)) or "a scalar"


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Say which known names come nearest to `name`, as the tail of an error line.

    >>> nearest("q_porj", ["q_proj", "k_proj", "norm"])
    '; nearest: q_proj, k_proj'
    >>> nearest("zzz", ["q_proj"])
    ''
    """
    name, names = name[:_COMPARED_LENGTH], [k for k in known if len(k) <= _COMPARED_LENGTH]
    if len(names) > _COMPARED:
        leaf, letters = name.rpartition(".")[2], set(name)
        names = nsmallest(
            _COMPARED, names, lambda k: (not k.endswith(leaf), -len(letters.intersection(k)), abs(len(k) - len(name)))
        )
    close = get_close_matches(name, names, n=n, cutoff=0.5)
    return "; nearest: " + ", ".join(close) if close else ""
