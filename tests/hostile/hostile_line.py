"""How the command line must meet a hostile file: status 1, one plain line on stderr that names it, nothing written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner
from fuzz import timed, watched

from lorasurgery.cli.main import main

SECONDS = 10.0


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """Stop what takes more of the processor's time: it would take for ever."""
    with watched(), timed(seconds):
        yield


def refused(words: Sequence[str | Path], folder: Path) -> str:
    """The one line with which a command is refused.

    Args:
        folder: In which nothing may change.
    """
    before = state(folder)
    with within():
        done = CliRunner().invoke(main, [str(w) for w in words])
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 1, (done.exit_code, done.output)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert done.stdout == ""
    assert lines[0].startswith("lorasurgery: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 6000
    assert state(folder) == before
    return lines[0]


def state(folder: Path) -> dict[str, object]:
    """Every name in a folder, and the content of what is a small file."""
    return {str(p): (p.read_bytes() if p.is_file() and p.stat().st_size < 1 << 20 else None) for p in folder.rglob("*")}
