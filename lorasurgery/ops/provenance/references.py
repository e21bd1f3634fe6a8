"""What comes before and after the work of an operation: references become local paths, and the result is recorded."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorasurgery.checkpoint.locate import exists
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import SurgeryError
from lorasurgery.hub.reference import parse_reference
from lorasurgery.ops.provenance.record import describe, record
from lorasurgery.report import COMMAND_LINE, Progress, Report

F = TypeVar("F", bound=Callable[..., Report])


def on_references(*parameters: str, headers_only: Callable[[dict[str, Any]], bool] | None = None) -> Callable[[F], F]:
    """Let parameters of an operation be `org/name[@revision]` on the Hub; an existing path always wins.

    Without such a reference nothing here touches the network, nor imports what could.

    Args:
        parameters: Names of those that are paths or sequences of paths.
        headers_only: Given all arguments, whether headers are all that the operation reads; without it, a dry run is.
    """

    def decorate(operation: F) -> F:
        signature = inspect.signature(operation)
        wanted = headers_only or (lambda given: bool(given.get("dry_run")))

        @functools.wraps(operation)
        def wrapper(*args: Any, **kwargs: Any) -> Report:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            call = COMMAND_LINE.get() or _call(operation.__name__, given)
            with (
                Operation(call, writes=not given.get("dry_run")) as under_way,
                _Fetched(wanted(given), given.get("progress")) as fetched,
            ):
                for name in parameters:
                    given[name] = fetched.local(given[name])
                try:
                    report = operation(*bound.args, **bound.kwargs)
                    if not report.output or report.dry_run:  # whatever is written is checked before it gets its name
                        under_way.inputs.check()
                except SurgeryError as problem:
                    cause = under_way.inputs.cause()
                    if cause and not str(problem).startswith(cause):
                        problem.args = (f"{cause}; what came of it: {problem}",)
                    problem.args = tuple(fetched.named(a) if isinstance(a, str) else a for a in problem.args)
                    raise
                made = report.output and not report.dry_run and report.adapters is None and report.sources is None
                if made:
                    report.sources = [s for name in parameters for s in describe(given[name], report.warnings)]
                fetched.rename(report)
                if made and ranks().first and _is_as_described(report, under_way):
                    record(report, call)
            return report

        return wrapper  # type: ignore[return-value]

    return decorate


def _is_as_described(report: Report, under_way: Operation) -> bool:
    """Whether the inputs, which were described when the result had its name already, are still those it was made of."""
    try:
        under_way.inputs.check()
    except SurgeryError as problem:
        report.sources = []
        report.warnings.append(f"{problem}: {report.output} was whole before, but its record is left out")
        return False
    return True


class _Fetched:
    """The references of one call and where they lie now; stubs go away with it."""

    def __init__(self, headers_only: bool, progress: Progress | None) -> None:
        self._headers_only, self._progress = headers_only, progress
        self._names: dict[str, str] = {}  # local path -> reference
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def local(self, value: Any) -> Any:
        """The same with every reference fetched."""
        if isinstance(value, str):
            return value if exists(value) else self._fetch(value)
        if isinstance(value, Sequence):
            return [self.local(item) for item in value]
        return value

    def _fetch(self, text: str) -> str:
        reference = parse_reference(text)
        if reference is None:
            return text
        from lorasurgery.hub import pull

        if self._headers_only:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="lorasurgery-")
            path = str(pull.fetch_headers(reference, Path(self._scratch.name)))
        else:
            path = str(pull.fetch(reference, progress=self._progress))
        self._names[path] = text
        return path

    def named(self, text: str) -> str:
        """A message that names references as they were given, not where they were fetched to."""
        for path, name in self._names.items():
            text = text.replace(path, name)
        return text

    def rename(self, report: Report) -> None:
        """The same in a report."""
        if self._names:
            report.inputs = [self.named(item) for item in report.inputs]
            report.warnings = [self.named(item) for item in report.warnings]
            report.summary = self.named(report.summary)
            for one in report.adapters or ():
                self.rename(one)

    def __enter__(self) -> _Fetched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch:
            self._scratch.cleanup()


_UNSAID = {"out", "device", "overwrite", "resume", "memory_limit", "dry_run", "progress"}


def _call(name: str, given: dict[str, Any]) -> str:
    """The call from Python, with local paths cut to their last names.

    >>> _call("merge", {"base": "/home/me/llama", "adapters": ["/x/style"], "weights": (), "seed": 0, "out": "o"})
    "merge(base='llama', adapters=['style'], weights=(), seed=0)"
    """

    def short(value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return Path(value).name if Path(value).is_absolute() or exists(value) else str(value)
        return [short(item) for item in value] if isinstance(value, list) else value

    said = {key: short(value) for key, value in given.items() if key not in _UNSAID and value is not None}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in said.items())})"
