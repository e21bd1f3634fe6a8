"""What an operation did, as plain data. Knows no rich and prints nothing; `to_dict()` is the JSON contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lorasurgery.notebook import page
from lorasurgery.totals import TotalsField

Progress = Callable[[str, int, int], None]
"""Called as progress(name, bytes_done, bytes_total) after each tensor."""

RECORD_NAME = "lorasurgery.json"
"""Beside what an operation writes: how it was made, for the model card and for whoever finds the folder later."""

COMMAND_LINE: ContextVar[str | None] = ContextVar("COMMAND_LINE", default=None)
"""The command as it was typed, with local paths cut to their last name; None when there was no command line."""


_LINE = 200  # characters of a summary in a report's repr


@dataclass(slots=True)
class ModuleReport:
    """One module's line: its tensor's name in the base without `.weight`, and what is known of its change.

    Examples:
        >>> ModuleReport("model.norm", (8,), delta_norm=0.5).to_dict()
        {'name': 'model.norm', 'shape': [8], 'delta_norm': 0.5}
    """

    name: str
    shape: tuple[int, ...]
    kind: str | None = None
    rank: int | None = None
    alpha: float | None = None
    delta_norm: float | None = None
    error: float | None = None
    energy: float | None = None
    retention: float | None = None
    noise: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply, with numbers that JSON can hold."""
        return _fields(self)


@dataclass(slots=True)
class Stored(ModuleReport):
    """A tensor as a checkpoint's header has it: dtype, bytes, and the file it lies in."""

    dtype: str = ""
    bytes: int = 0
    file: str = ""


@dataclass(slots=True)
class Planned(ModuleReport):
    """What LoRA would take on one module.

    Args:
        parameters: rank·(out + in), for all experts where there are several.
        weight_parameters: Those of the weight itself.
        share: parameters/weight_parameters.
    """

    parameters: int = 0
    weight_parameters: int = 0
    share: float = 0.0


@dataclass(slots=True)
class Spectrum(ModuleReport):
    """How an adapter's update of one module is spread over directions.

    Args:
        singular_values: Of ΔW, falling.
        effective_rank: exp of the entropy of σ/Σσ (Roy & Vetterli 2007): how many directions are at work.
        stable_rank: ‖ΔW‖_F²/σ₁².
        energy_at: rank -> share of ‖ΔW‖² that the best approximation of this rank keeps.
    """

    singular_values: list[float] = field(default_factory=list)
    effective_rank: float | None = None
    stable_rank: float | None = None
    energy_at: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Comparison(ModuleReport):
    """Two updates of one module beside each other.

    Args:
        cosine: ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖‖ΔW_b‖); negative where they pull against each other.
        norm_ratio: ‖ΔW_b‖/‖ΔW_a‖.
        overlap: Mean cos² of the principal angles between the column spaces; 1 is the same space.
        chance: The overlap that random spaces of these ranks have on average.
        angles: The principal angles in degrees, smallest first.
    """

    norm_a: float | None = None
    norm_b: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    overlap: float | None = None
    chance: float | None = None
    angles: list[float] | None = None


@dataclass(slots=True)
class Change(ModuleReport):
    """One tensor in two checkpoints. `delta_norm` is ‖ΔW‖, None where the shapes differ or one side lacks it.

    Args:
        state: `equal` (the same values), `changed`, `reshaped`, `only_a` or `only_b`.
        norm: ‖W_a‖.
        relative: ‖ΔW‖/‖W_a‖.
        largest: The largest |ΔW| of any element.
        share: Elements that differ, as a share.
        dtypes: What each side is stored in.
    """

    state: str = "equal"
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None
    share: float | None = None
    dtypes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Checked(ModuleReport):
    """A tensor of which something is to be said: it differs from what it should be, or is not finite.

    Args:
        state: `rounding` (within one step), `differs`, `missing`, `extra`, `reshaped` or `not finite`.
        share: Values that differ, or are not finite, as a share.
        steps: The most representable values between what is there and what should be.
    """

    state: str = ""
    share: float | None = None
    steps: int | None = None


@dataclass
class Source:
    """An input, as somebody else can find it again.

    Args:
        name: The last name of a local path, or `org/name` on the Hub.
        revision: The commit on the Hub; None for local paths.
        kind: `checkpoint` or `adapter`.
        base_model: Of an adapter, what its config names; of a checkpoint on the Hub, itself.
        license: What its card says.
        files: name, bytes and sha256 of each weight file; of large local files header_sha256 instead.
    """

    name: str
    kind: str
    revision: str | None = None
    base_model: str | None = None
    license: str | None = None
    files: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known."""
        return _fields(self)


@dataclass(repr=False)
class Report:
    """What one command did: the same object feeds `--json`, the terminal and the tests.

    Over a folder of adapters, `adapters` holds a report for each, and `error` says why one of them failed. `sources`
    are the inputs of what was written, `pushed` says where it was published, `resumed` how many tensors or modules an
    interrupted run had finished already.

    `totals` are those of the command by name and type (lorasurgery/totals.py): `report.totals.error` and
    `report.totals["error"]` are the same.

    Examples:
        >>> report = Report("merge", ["base", "adapter"], "out", summary="2 tensors changed")
        >>> report
        <Report of merge, out: 2 tensors changed>
        >>> report.to_dict()["command"]
        'merge'
    """

    command: str
    inputs: list[str]
    output: str
    version: str = ""
    dry_run: bool = False
    device: str = "cpu"
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    resumed: int = 0
    totals: TotalsField = TotalsField()  # noqa: RUF009  # a descriptor
    modules: list[ModuleReport] = field(default_factory=list)
    full: list[ModuleReport] = field(default_factory=list)
    left_out: list[ModuleReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: str = ""
    adapters: list[Report] | None = None
    error: str | None = None
    sources: list[Source] | None = None
    pushed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON report of the command-line contract (docs/design.md)."""
        return _fields(self)

    def __repr__(self) -> str:
        """One line: the command, where its result is, and the summary."""
        lines = (self.error or self.summary or "dry run" * self.dry_run).splitlines()
        said = f"{lines[0]}{' …' if len(lines) > 1 else ''}" if lines else f"{len(self.modules)} modules"
        where = f", {self.output}" if self.output else ""
        return f"<Report of {self.command}{where}: {said if len(said) <= _LINE else said[: _LINE - 1] + '…'}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: summary, warnings, totals and the first modules."""
        return page(self.to_dict())


def percent(share: float) -> str:
    """A share with three digits that count, however small it is.

    >>> percent(0.0123), percent(0.0000123), percent(0.0)
    ('1.23%', '0.00123%', '0%')
    """
    return f"{100 * share:.3g}%"


def _fields(item: ModuleReport | Report | Source) -> dict[str, Any]:
    names = item.__dataclass_fields__  # fields() makes a list of them again, and there may be 10⁵ modules
    found = {name: plain(value) for name in names if (value := getattr(item, name)) is not None}
    return {key: value for key, value in found.items() if value is not None}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite are None, and what is None in objects is left out.

    >>> plain({"a": (1, 2), "b": None, "c": [math.inf]})
    {'a': [1, 2], 'c': [None]}
    """
    if type(value) in (str, int, bool):  # most of what there is
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (ModuleReport, Report, Source)):
        return value.to_dict()
    if isinstance(value, dict):
        found = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not None}
    return value
