"""plan: what a LoRA of some rank would take on a model, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.model_names.naming import commonest_dtype, count_parameters
from lorasurgery.arguments import as_tuple, check_kinds
from lorasurgery.checkpoint.header import DTYPE_BITS
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.runtime import Clock
from lorasurgery.errors import MismatchError, UsageError, some
from lorasurgery.module_location import location_of
from lorasurgery.ops.asked import dtype_of
from lorasurgery.ops.extraction.options import DEFAULT_RANK, Selection
from lorasurgery.ops.extraction.pairs import FACTORED, Pair, group_experts, plan_pairs
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import Planned, Report

if TYPE_CHECKING:
    import torch

TARGET = ("all-linear",)


def plan(
    model: str | Path,
    rank: int = DEFAULT_RANK,
    *,
    target: str | Sequence[str] = TARGET,
    exclude: str | Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
) -> Report:
    """Count the parameters and bytes that LoRA would take on a model: r(d + k) for a d×k matrix instead of d·k.

    Examples:
        ```python
        plan("llama-2-7b", 8, target=["q_proj", "v_proj"]).totals["parameters"]  # 4_194_304
        ```

    Args:
        model: Checkpoint folder or file; only its headers are read, and torch is not imported.
        rank: r of every module (LoRA, arXiv:2106.09685, section 4.1).
        target: A suffix (q_proj), a regular expression on the whole path, or attention, mlp, all-linear.
        exclude: A suffix (q_proj), a regular expression on the whole path, or attention, mlp, all-linear.
        dtype: What the factors would be stored in, as "bf16", "bfloat16", "BF16" or torch.bfloat16; None is the
            model's own.

    Returns:
        A report with `Planned` modules; its totals count the adapter among `all_parameters`, as PEFT prints them.

    Raises:
        UsageError: a rank below 1, or a pattern that means no module, with the nearest names.
        MismatchError: nothing that LoRA fits is left.
    """
    given = {"model": model, "rank": rank, "target": target, "exclude": exclude, "dtype": dtype}
    with open_call("plan", given, headers_only=True) as call:
        check_kinds(given, "model", "rank")
        if rank < 1:
            raise UsageError(f"--rank {rank}: expected a whole number of at least 1")
        selection = Selection(as_tuple(target) or TARGET, as_tuple(exclude), ("none",))
        return call.checked(_plan(call.local(model), rank, selection, dtype_of(dtype)))


def _plan(model: str | Path, rank: int, selection: Selection, dtype: str | None) -> Report:
    clock, checkpoint = Clock(), Checkpoint.open(model)
    pairs = group_experts(plan_pairs(checkpoint, checkpoint, selection), checkpoint.config)
    report = Report("plan", [str(model)], "")
    report.modules = [_module(p, rank) for p in pairs if p.treatment in FACTORED and all(p.matrix)]
    if not report.modules:
        raise MismatchError(f"{checkpoint.path}: --target and --exclude leave no matrix that LoRA fits")
    report.totals = _totals(report, checkpoint, rank, dtype or commonest_dtype(checkpoint))
    _warn(report, rank)
    report.summary = _summary(report.totals, rank)
    return clock.stamp(report)


def _module(pair: Pair, rank: int) -> Planned:
    full = sum(prod(t.tuned.shape) for t in pair.tensors)
    parameters = pair.count * rank * sum(pair.matrix)
    return Planned(
        pair.path, pair.matrix, kind=pair.treatment, rank=rank, parameters=parameters,
        weight_parameters=full, share=parameters / full if full else 0.0,
    )  # fmt: skip


def _totals(report: Report, checkpoint: Checkpoint, rank: int, dtype: str) -> dict[str, Any]:
    modules = [m for m in report.modules if isinstance(m, Planned)]
    parameters, model = sum(m.parameters for m in modules), count_parameters(checkpoint)
    return {
        "rank": rank, "dtype": dtype, "modules": len(modules), "parameters": parameters, "model_parameters": model,
        "all_parameters": model + parameters, "trainable_share": parameters / (model + parameters),
        "targeted_parameters": sum(m.weight_parameters for m in modules),
        "adapter_bytes": parameters * DTYPE_BITS[dtype] // 8, "model_bytes": checkpoint.nbytes,
        "by_kind": _by_kind(modules),
    }  # fmt: skip


def _by_kind(modules: Sequence[Planned]) -> list[dict[str, Any]]:
    """A row for each kind of module and shape, with what one of them takes."""
    groups: dict[tuple[str, tuple[int, ...]], list[Planned]] = defaultdict(list)
    for m in modules:
        groups[location_of(m.name).kind, m.shape].append(m)
    return [
        {
            "kind": kind, "shape": list(shape), "modules": len(group), "each": group[0].parameters,
            "each_weight": group[0].weight_parameters, "parameters": sum(m.parameters for m in group),
            "weight_parameters": sum(m.weight_parameters for m in group), "share": group[0].share,
            "times_fewer": group[0].weight_parameters / group[0].parameters,
        }
        for (kind, shape), group in groups.items()
    ]  # fmt: skip


def _warn(report: Report, rank: int) -> None:
    wide = [m.name for m in report.modules if isinstance(m, Planned) and m.share >= 1]
    if wide:
        report.warnings.append(f"at rank {rank} the factors of {some(wide)} take as much as the weight itself or more")


def _summary(t: dict[str, Any], rank: int) -> str:
    return (
        f"rank {rank} on {t['modules']} modules: {t['parameters']:,} trainable of {t['all_parameters']:,} parameters, "
        f"{t['trainable_share']:.2%}; {t['adapter_bytes'] / 1e6:,.2f} MB as {t['dtype']} beside "
        f"{t['model_bytes'] / 1e6:,.1f} MB"
    )
