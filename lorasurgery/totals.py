"""The totals of each verb's report, by name and type. They are dictionaries too, as the JSON report has them."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import get_annotations
from typing import Any, overload


class Totals(dict[str, Any]):
    """Numbers over all modules: `totals.error` and `totals["error"]` are the same.

    A total that does not apply is None as an attribute and missing as a key. Of a name that is a word of Python's the
    attribute ends in `_`: `from_`, `for_`.

    >>> totals = ExtractTotals(error=0.25)
    >>> totals.error, totals["error"], totals.energy is None, "energy" in totals
    (0.25, 0.25, True, False)
    >>> totals.eror
    Traceback (most recent call last):
        ...
    AttributeError: ExtractTotals has no 'eror'
    """

    def __getattr__(self, name: str) -> Any:
        key = name.removesuffix("_")
        if key in self:
            return self[key]
        if name in self.names():
            return None
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The attributes that there can be."""
        return tuple(name for base in cls.__mro__ for name in get_annotations(base))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.names()]


class FactorTotals(Totals):
    """Of what writes an adapter: its size, and what it holds of the change."""

    modules: int | None
    delta_norm: float | None
    error: float | None
    energy: float | None
    rank_min: int | None
    rank_max: int | None
    adapter_bytes: int | None


class FolderTotals(Totals):
    """Of what also takes a folder of adapters."""

    adapters: int | None
    failed: int | None


class ExtractTotals(FactorTotals):
    """Of extract."""

    tensors: dict[str, int]
    parameters_at_most: int
    model_bytes: int
    unchanged: int | None
    rounding: int | None
    full: int | None
    left_out: int | None
    size_ratio: float | None
    left_out_norm: float | None
    left_out_share: float | None
    excluded: int | None
    excluded_norm: float | None
    excluded_share: float | None
    excluded_unmeasured: int | None


class MergeTotals(Totals):
    """Of merge, unmerge and switch."""

    weights: list[float] | None
    tensors: int | None
    tensors_touched: int | None
    tensors_replaced: int | None
    adapter_tensors_matched: int | None
    adapter_tensors_unmatched: int | None
    files: list[str] | None
    output_bytes: int | None
    untied: bool | None
    vocab_size: int | None
    delta_norm: float | None
    retention: float | None
    noise: float | None
    from_: list[str] | None
    unrecorded: list[str] | None
    what: str | None
    exact: bool | None
    undo_file: str | None


class BlendTotals(FactorTotals, FolderTotals):
    """Of blend and rerank."""

    method: str | None
    weights: list[float] | None
    parameters_at_most: int | None
    input_bytes: int | None
    budget: int | None
    full: int | None
    size_ratio: float | None


class ConvertTotals(FactorTotals, FolderTotals):
    """Of convert."""

    from_: str | None
    to: str | None
    modules_in: int | None
    matched: int | None
    fused: int | None
    alpha_in_header_only: int | None


class InspectTotals(FolderTotals):
    """Of inspect: an adapter, a checkpoint, or a folder of adapters."""

    what: str | None
    format: str | None
    forms: list[str] | None
    base_model: str | None
    modules: int | None
    full: int | None
    rank_min: int | None
    rank_max: int | None
    rslora: bool | None
    dtypes: dict[str, int] | list[str] | None
    parameters: int | None
    adapter_bytes: int | None
    matched: int | None
    base_parameters: int | None
    base_bytes: int | None
    parameter_share: float | None
    byte_share: float | None
    odd: list[str] | None
    delta_norm: float | None
    energy_at: dict[int, float] | None
    layout: str | None
    files: int | None
    architecture: str | None
    model_type: str | None
    tensors: int | None
    bytes: int | None
    layers: dict[str, int] | None
    tied: bool | None
    by_kind: list[dict[str, Any]] | None
    undo: list[list[str]] | None
    unfinished: str | None


class CheckTotals(FolderTotals):
    """Of check."""

    for_: str | None
    format: str | None
    serves: bool | None
    matched: int | None
    modules: int | None
    findings: list[dict[str, Any]] | None


class DiffTotals(Totals):
    """Of diff: two checkpoints, or two adapters."""

    what: str
    tensors: int | None
    equal: int | None
    changed: int | None
    reshaped: int | None
    only_a: int
    only_b: int
    delta_norm: float | None
    norm: float | None
    relative: float | None
    by_layer: list[dict[str, Any]] | None
    by_kind: list[dict[str, Any]] | None
    cosine: float | None
    norm_a: float | None
    norm_b: float | None
    norm_ratio: float | None
    overlap: float | None
    chance: float | None
    modules: int | None
    shared: int | None
    against: int | None


class PlanTotals(Totals):
    """Of plan."""

    rank: int
    dtype: str
    modules: int
    parameters: int
    model_parameters: int
    all_parameters: int
    trainable_share: float
    targeted_parameters: int
    adapter_bytes: int
    model_bytes: int
    by_kind: list[dict[str, Any]]


class PushTotals(Totals):
    """Of push."""

    files: list[str]
    bytes: int
    left_out: list[str]


class VerifyTotals(Totals):
    """Of verify."""

    what: str
    holds: bool
    findings: list[str]
    tensors: int
    matched: int | None
    equal: str | None
    changed: int | None
    undo_file: str | None


KINDS: dict[str, type[Totals]] = {
    "extract": ExtractTotals, "merge": MergeTotals, "unmerge": MergeTotals, "switch": MergeTotals,
    "blend": BlendTotals, "rerank": BlendTotals, "convert": ConvertTotals, "inspect": InspectTotals,
    "check": CheckTotals, "diff": DiffTotals, "plan": PlanTotals, "push": PushTotals, "verify": VerifyTotals,
}  # fmt: skip
"""Verb -> its totals."""


class TotalsField:
    """The field `totals` of a report: whatever mapping is put into it comes out as the totals of the report's verb."""

    @overload
    def __get__(self, report: None, owner: type) -> Any: ...
    @overload
    def __get__(self, report: object, owner: type) -> Totals: ...
    def __get__(self, report: object | None, owner: type) -> Any:
        return () if report is None else report.__dict__["totals"]  # an empty default for the dataclass

    def __set__(self, report: object, value: Mapping[str, Any]) -> None:
        kind = KINDS.get(report.__dict__["command"], Totals)
        report.__dict__["totals"] = value if isinstance(value, kind) else kind(value)
