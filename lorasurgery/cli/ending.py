"""How every command ends: the picture, the upload, and the report, in this order; and its progress before."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.cli import render
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import SurgeryError
from lorasurgery.report import Progress, Report


@dataclass
class Ending:
    """The options that say what becomes of a report; each command has those of them that it offers.

    Args:
        plot: File for a picture.
        push: `org/name` to publish to.
        private: Make that repository private.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    plot: str | None = None
    push: str | None = None
    private: bool = False

    @classmethod
    def take(cls, chosen: dict[str, Any], *, dry_run: bool = False) -> Ending:
        """Take these options out of a command's, and refuse what can't be before any work is done.

        Raises:
            SurgeryError: a picture that can't be drawn, a repository that can't be published to.
        """
        ending = cls(**{name: chosen.pop(name) for name in cls.__dataclass_fields__ if name in chosen})
        if ending.plot:
            from lorasurgery.plots import check_plot_name

            check_plot_name(ending.plot)
        if ending.push:
            from lorasurgery.hub.push import Target, check_account

            target = Target(ending.push, ending.private)
            target.check()
            if not dry_run:
                check_account(target)
        return ending

    def progress(self, command: str, *, slow: bool = True) -> AbstractContextManager[Progress | None]:
        """A progress callback; quick commands (slow=False) need none off a terminal."""
        return render.progress(
            command, quiet=not ranks().first or self.quiet or self.as_json or not (slow or sys.stderr.isatty())
        )

    def finish(self, report: Report, *, verbose: bool = False) -> None:
        """Draw, publish and show. When publishing fails the result stays and is reported, and the status is 1."""
        failed: SurgeryError | None = None
        if not ranks().first:  # the first one has the whole report
            return
        if self.plot and not report.dry_run:
            from lorasurgery.checkpoint.modes import Modes
            from lorasurgery.plots import draw

            draw(report, self.plot, mode=Modes.of(report.inputs, Path(self.plot).parent).file)
        if self.push and not report.dry_run:
            try:
                self._publish(report)
            except SurgeryError as problem:
                failed, report.error = problem, str(problem)
        render.show(report, as_json=self.as_json, quiet=self.quiet, verbose=self.verbose or verbose)
        if self.plot and not report.dry_run and not (self.as_json or self.quiet):
            render.say(f"{self.plot}: drawn")
        if failed:
            raise failed
        render.leave(report)

    def _publish(self, report: Report) -> None:
        from lorasurgery.hub.push import show_bars
        from lorasurgery.ops.push import Target, push

        assert self.push is not None
        show_bars(sys.stderr.isatty() and not (self.quiet or self.as_json))
        done = push(report.output, Target(self.push, self.private))
        report.pushed = done.pushed
        report.warnings += done.warnings
        report.summary += f"\n{done.summary}"
