"""Commands in processes of their own that stop at a chosen write, to be interrupted or killed there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

_PATIENCE = 600  # seconds, after which something counts as hanging
_PRELOADED = ["lorasurgery.cli.main", "lorasurgery.ops.merging.stream", "lorasurgery.ops.extraction.decompose", "lorasurgery.ops.merging.in_place",
              "lorasurgery.ops.blending.combine", "children"]  # fmt: skip


class Child:
    """A command that tells before its n-th write, and then waits until it may go on.

    Args:
        words: The command line.
        log: Where its stderr goes.
        write: Which write of weights (or of what is to become weights) it waits before; the first is 0.
        batch: Bytes that an operation in place writes twice before they count.
    """

    def __init__(self, words: list[str | Path], log: Path, write: int, *, batch: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        mine, theirs = context.Pipe()
        self.log, self._told = log, mine
        self._process = context.Process(target=_work, args=([str(w) for w in words], log, write, batch, theirs))
        self._process.start()
        theirs.close()

    def wait(self) -> bool:
        """Until it is at that write; False when it ended before."""
        with suppress(EOFError):
            return self._told.recv() == "here"
        return False

    def send(self, number: int) -> int:
        """Send a signal and wait for the end: the exit status, negative for a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        with suppress(EOFError):
            self._told.recv()  # until it was heard, or the process is gone
        return self.end()

    def end(self) -> int:
        """Let it go on, and wait for the end."""
        with suppress(OSError):
            self._told.send("go on")
        self._process.join(_PATIENCE)
        assert self._process.exitcode is not None
        self._told.close()
        return self._process.exitcode

    @property
    def number(self) -> int | None:
        """Its process id."""
        return self._process.pid

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return (self.log.read_text().splitlines() or [""])[-1]


def _work(words: list[str], log: Path, write: int, batch: int, told: Any) -> None:
    from lorasurgery.checkpoint import files
    from lorasurgery.checkpoint.inplace import transaction as surgery
    from lorasurgery.cli.main import main

    plain, numbers = files.WriteFile.write_at, count()

    def write_at(self: Any, place: int, view: memoryview) -> None:
        if next(numbers) == write:
            told.send("here")
            told.poll(_PATIENCE)
        plain(self, place, view)

    handle = signal.signal

    def heard(number: int, handler: Any) -> Any:
        def announced(*given: Any) -> None:
            told.send("heard")
            handler(*given)

        return handle(number, announced if callable(handler) else handler)

    signal.signal = heard  # type: ignore[assignment]

    files.WriteFile.write_at = write_at  # type: ignore[method-assign]
    surgery.BATCH = batch
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
        sys.stderr = stderr
        try:
            main(words)
        finally:
            stderr.flush()
