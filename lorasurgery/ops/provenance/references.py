"""What stands around the work of a verb: references become local paths before it, the result is recorded after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from lorasurgery.checkpoint.locate import exists
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import SurgeryError
from lorasurgery.hub.reference import parse_reference
from lorasurgery.keywords import say, saying_keywords
from lorasurgery.ops.provenance.record import describe, record
from lorasurgery.report import COMMAND_LINE, Progress, Report


@contextmanager
def open_call(
    name: str, given: Mapping[str, Any], *, writes: bool = True, headers_only: bool = False,
    progress: Progress | None = None,
) -> Iterator[Call]:  # fmt: skip
    """Begin a call of a verb: until the end of the `with` it holds its locks and knows its inputs again.

    What fails in it names references as they were given and keywords as Python has them, and says first when an
    input changed meanwhile.

    Examples:
        ```python
        with open_call("merge", {"base": base, "adapters": adapters}) as call:
            checkpoint = Checkpoint.open(call.local(base))
        ```

    Args:
        name: The verb.
        given: Its arguments by name, for the record; see `_call`.
        writes: Whether it writes anything, so that locks are taken.
        headers_only: Whether headers are all that is read of what lies on the Hub.
    """
    said = COMMAND_LINE.get() or _call(name, given)
    with (
        saying_keywords(name),
        Operation(said, writes=writes) as operation,
        _Fetched(headers_only, progress) as fetched,
    ):
        try:
            yield Call(name, said, operation, fetched)
        except SurgeryError as problem:
            cause = operation.inputs.cause()
            if cause and not str(problem).startswith(cause):
                problem.args = (f"{cause}; what came of it: {problem}",)
            problem.args = tuple(fetched.named(a) if isinstance(a, str) else a for a in problem.args)
            raise


class Call:
    """A call under way. It turns references into local paths, and one of three methods ends its report.

    `checked` is for what only read, `recorded` for what wrote a new output, and `named` for what kept a record of its
    own: a change in place does so as part of the change, and work on a folder of adapters for each of them.
    """

    def __init__(self, verb: str, said: str, operation: Operation, fetched: _Fetched) -> None:
        self._verb, self._said, self._operation, self._fetched = verb, said, operation, fetched

    @overload
    def local(self, given: str | Path) -> str | Path: ...
    @overload
    def local(self, given: None) -> None: ...
    def local(self, given: str | Path | None) -> str | Path | None:
        """The path itself, or where `org/name[@revision]` on the Hub was fetched to; an existing path always wins.

        Without such a reference nothing here touches the network, nor imports what could.
        """
        return self._fetched.local(given) if isinstance(given, str) else given

    def all_local(self, given: Sequence[str | Path]) -> list[str | Path]:
        """The same for several."""
        return [self.local(item) for item in given]

    def named(self, report: Report) -> Report:
        """The report, with references as they were given and, to a caller from Python, keywords for options."""
        self._fetched.rename(report)
        return say(report, self._verb)

    def checked(self, report: Report) -> Report:
        """The report of what wrote nothing, once its inputs are seen to be those that it read.

        Raises:
            FormatError: an input changed meanwhile.
        """
        self._operation.inputs.check()
        return self.named(report)

    def recorded(self, report: Report, made_of: Iterable[str | Path | None]) -> Report:
        """The report of a new output, once lorasurgery.json beside it says what it was made of.

        The output itself was checked before it got its name.

        Args:
            made_of: The local paths of the inputs, in the order of the record; None for one that was not given.

        Raises:
            OutputError: the record can't be written.
        """
        report.sources = [source for path in made_of for source in describe(path, report.warnings)]
        self.named(report)
        if ranks().first and self._is_as_described(report):
            record(report, self._said)
        return report

    def _is_as_described(self, report: Report) -> bool:
        """Whether the inputs, described when the result had its name already, are still those it was made of."""
        try:
            self._operation.inputs.check()
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

    def local(self, text: str) -> str:
        """The same, or where the repository of this name lies now."""
        reference = None if exists(text) else parse_reference(text)
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


def _call(name: str, given: Mapping[str, Any]) -> str:
    """The call from Python, with local paths cut to their last names.

    >>> _call("merge", {"base": "/home/me/llama", "adapters": ["/x/style"], "weights": (), "seed": 0, "out": "o"})
    "merge(base='llama', adapters=['style'], weights=(), seed=0)"
    """

    def short(value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return Path(value).name if Path(value).is_absolute() or exists(value) else str(value)
        return type(value)(map(short, value)) if type(value) in (list, tuple) else value

    said = {key: short(value) for key, value in given.items() if key not in _UNSAID and value is not None}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in said.items())})"
