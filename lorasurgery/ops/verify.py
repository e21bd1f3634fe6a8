"""verify: is a checkpoint or an adapter whole, finite and consistent, and is it what it is said to be made of?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.settle import in_the_middle, unfinished
from lorasurgery.errors import UsageError
from lorasurgery.ops.block_weight import weighed_plan
from lorasurgery.ops.merge import check_weights
from lorasurgery.ops.planner import plan_edits
from lorasurgery.ops.references import on_references
from lorasurgery.ops.runtime import Clock, check_device_name, resolve_device
from lorasurgery.ops.verify_config import findings_in_adapter, findings_in_checkpoint
from lorasurgery.report import Progress, Report


@on_references("path", "against", "adapters")
def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    block_weights: Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Read everything once and say whether it holds: headers, index, config, every value finite, undo records.

    Example:
        verify("merged", against="llama", adapters=["style"]).totals["holds"]

    Args:
        path: Checkpoint or adapter. against: The checkpoint that it was made from: an adapter must match it tensor by
            tensor, a checkpoint must equal it, plus `adapters` with `weights` and `block_weights` as they were merged.

    Returns:
        `totals`: `holds`; `findings`, a sentence each; `equal`, of a comparison: `rounding` (every value is within
        one step of rounding, or float32's error in the sum, of base + adapters), `bits` (that, and by the hashes of the
        merge's record these are the bytes it met and wrote; without adapters: the same bytes) or `no`.

    Raises:
        SurgeryError: it can't be read at all, in one line. UsageError: adapters without `against`.
    """
    clock = Clock()
    check_device_name(device)
    if adapters and against is None:
        raise UsageError("--adapter: needs --against BASE, which it was merged into")
    strengths = check_weights(weights, len(adapters)) if adapters else []
    report = Report("verify", [str(path), *map(str, adapters), *([str(against)] if against is not None else [])], "")
    report.totals = {"what": "checkpoint", "holds": True, "findings": []}
    if Path(path).exists() and is_adapter(Path(path)):
        _verify_adapter(open_adapter(path), against, report, progress)
    else:
        _verify_checkpoint(path, against, [open_adapter(a) for a in adapters], strengths, block_weights, report,
                           device, progress)  # fmt: skip
    found = report.totals["findings"]
    report.totals["holds"] = not found and report.totals.get("equal") != "no"
    report.summary = _summary(str(path), report)
    return clock.stamp(report)


def _verify_adapter(adapter: Adapter, against: str | Path | None, report: Report, progress: Progress | None) -> None:
    from lorasurgery.ops.verify_values import find_nonfinite  # imports torch

    report.totals |= {"what": "adapter", "tensors": len(adapter.weights.tensors)}
    found = findings_in_adapter(adapter)
    if against is not None:
        report.totals["matched"] = plan_edits(Checkpoint.open(against), [adapter], [1.0]).matched
    found += find_nonfinite(adapter.weights, report, progress)
    report.totals["findings"] = found
    report.bytes_read = adapter.weights.bytes_read


def _verify_checkpoint(
    path: str | Path, against: str | Path | None, adapters: list[Adapter], strengths: list[float],
    block_weights: Sequence[str], report: Report, device: str, progress: Progress | None,
) -> None:  # fmt: skip
    from lorasurgery.ops.verify_equal import compare, has_true_record
    from lorasurgery.ops.verify_values import check_records, find_nonfinite

    model = Checkpoint.open(path, unfinished=True)
    report.totals["tensors"] = len(model.tensors)
    about = unfinished(Path(path))
    found = [in_the_middle(Path(path), about)] if about is not None else findings_in_checkpoint(model)
    found += find_nonfinite(model, report, progress)
    if about is None:
        found += check_records(model)
    report.totals["findings"] = found
    if against is not None:
        base = Checkpoint.open(against)
        chosen = resolve_device(device)
        report.device = str(chosen)
        plan = weighed_plan(base, adapters, strengths, block_weights)
        equal = compare(model, base, adapters, plan, report, chosen)
        # a record alone shows nothing, for whoever changed the weights could have changed it too
        if equal == "rounding" and has_true_record(model, base, adapters, strengths, block_weights, report):
            equal = "bits"
        report.totals["equal"] = equal
        report.bytes_read += base.bytes_read
    report.bytes_read += model.bytes_read


_EQUAL = {"bits": "equal to the bit", "rounding": "equal to rounding", "no": "not equal"}


def _summary(path: str, report: Report) -> str:
    totals = report.totals
    count = f"{totals['tensors']} tensors"
    what = f"{path}: {totals['what']} of {count}"
    equal = f"; {_EQUAL[totals['equal']]} to what it is compared with" if "equal" in totals else ""
    if not totals["findings"]:
        return f"{what}, whole and finite{equal}"
    return "\n".join([f"{what}{equal}:", *(f"  {sentence}" for sentence in totals["findings"])])
