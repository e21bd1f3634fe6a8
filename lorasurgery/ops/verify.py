"""verify: is a file whole, and is a merged checkpoint its base plus the adapters?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.arguments import as_tuple, check_kinds
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inplace.recover import in_the_middle, unfinished
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import UnsupportedError, UsageError, some
from lorasurgery.module_location import location_of
from lorasurgery.ops.asked import Paths, all_paths
from lorasurgery.ops.placement.block_weight import check_weights, weighed_plan
from lorasurgery.ops.placement.plan import plan_edits
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import Progress, Report


def findings_in_checkpoint(model: Checkpoint) -> list[str]:
    """What does not agree: index and files, config and shapes."""
    return [*_in_index(model), *_in_config(model), *_unreadable(model)]


def _in_index(model: Checkpoint) -> Iterator[str]:
    for name in [model.index_name] if model.index_name else model.indexes.values():
        index = load_object(model.folder / name)
        listed = set(index.get("weight_map", {}))
        prefix = next((p for p, n in model.indexes.items() if n == name), "")
        here = {n.removeprefix(prefix): i for n, i in model.tensors.items() if n.startswith(prefix)}
        missing = sorted(set(here) - listed)
        if missing:
            yield f"{name}: does not list {some(missing)}, which the files hold; loaders pass over them"
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(i.nbytes for i in here.values())
        if total is not None and total != found:
            yield f"{name}: says {total} bytes of tensors but the files hold {found}"
    if model.index_name:
        stray = sorted(
            f.name
            for f in model.folder.glob("*.safetensors")
            if f.name not in model.files and not f.name.startswith(".")
        )
        if stray:
            yield f"{some(stray)}: lies beside the shards, but the index does not name it"


def _in_config(model: Checkpoint) -> Iterator[str]:
    config = model.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    settings: dict[str, Any] = {**config, **(text or {})}
    names = BaseNames(model.tensors, config, str(model.path))
    embedding = names.input_embedding
    vocabulary = settings.get("vocab_size")
    if embedding and not model.parts and isinstance(vocabulary, int):
        rows = model.tensors[embedding].shape[0]
        if rows < vocabulary:  # more are common: tables are padded
            yield f"config.json: vocab_size is {vocabulary} but {show(embedding)} has {rows} rows"
    yield from _in_layers(model, settings.get("num_hidden_layers"))


def _in_layers(model: Checkpoint, said: Any) -> Iterator[str]:
    """Whether there are as many layers as the config says, and none is missing in between."""
    if not isinstance(said, int):
        return
    stacks: dict[str, set[int]] = {}
    for name in model.tensors:
        place = location_of(name.removesuffix(".weight"))
        if place.layer is not None:
            stacks.setdefault(place.stack, set()).add(place.layer)
    most = max((max(found) + 1 for found in stacks.values()), default=0)
    if 0 < most < said:
        yield f"config.json: num_hidden_layers is {said} but the files hold {most}"
    for prefix, found in stacks.items():
        gaps = most - len(found)
        if gaps and max(found) + 1 == most <= said:  # the first few are looked for, not all up to a far number
            first = [str(n) for n in islice((n for n in range(most) if n not in found), 3)]
            more = f" and {gaps - 3} more" if gaps > 3 else ""
            yield f"{prefix}: layers {', '.join(first)}{more} are missing"


def _unreadable(model: Checkpoint) -> Iterator[str]:
    strange = set()
    for info in model.tensors.values():
        try:
            torch_dtype(info.dtype)
        except UnsupportedError:
            strange.add(info.dtype)
    if strange:
        yield f"dtypes {', '.join(sorted(strange))}: can be copied, but nothing here can compute with them"


def findings_in_adapter(adapter: Adapter) -> list[str]:
    """What of an adapter's file has no meaning, and scales that no training gives."""
    used = {
        name for d in adapter.deltas.values() for name in (*d.names, d.bias, d.magnitude and d.magnitude.name) if name
    }
    used |= {*adapter.replaced.values(), *adapter.diffs.values(), *(key for key, _ in adapter.tokens.values())}
    left = sorted(n for n in set(adapter.weights.tensors) - used if not n.endswith((".alpha", ".dora_scale")))
    found = [f"{some(left)}: belong to no update"] if left and adapter.format == "peft" and not adapter.members else []
    zero = [path for path, d in adapter.deltas.items() if d.scale == 0]
    return found + ([f"{some(zero)}: the scale is 0, so nothing would change"] if zero else [])


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    adapters: Paths = (),
    weights: float | Sequence[float] = (),
    block_weights: str | Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Read everything once and say whether it holds: headers, index, config, every value finite, undo records.

    Examples:
        ```python
        verify("merged", against="llama", adapters="style").totals["holds"]
        ```

    Args:
        path: Checkpoint or adapter.
        against: The checkpoint that it was made from: an adapter must match it tensor by tensor, a checkpoint must
            equal it, plus `adapters` with `weights` and `block_weights` as they were merged.

    Returns:
        `totals`: `holds`; `findings`, a sentence each; `equal`, of a comparison: `rounding` (every value is within
        one step of rounding, or float32's error in the sum, of base + adapters), `bits` (that, and by the hashes of the
        merge's record these are the bytes it met and wrote; without adapters: the same bytes) or `no`.

    Raises:
        SurgeryError: it can't be read at all, in one line.
        UsageError: adapters without `against`.
    """
    given = {
        "path": path, "against": against, "adapters": adapters, "weights": weights, "block_weights": block_weights,
        "device": device, "progress": progress,
    }  # fmt: skip
    with open_call("verify", given, progress=progress) as call:
        check_kinds(given, "path", "device")
        check_device_name(device)
        sources = all_paths(adapters)
        if sources and against is None:
            raise UsageError("--adapter: needs --against BASE, which it was merged into")
        strengths = check_weights(as_tuple(weights), len(sources)) if sources else []
        return call.checked(
            _verify(call.local(path), call.local(against), call.all_local(sources), strengths,
                    as_tuple(block_weights), device, progress)
        )  # fmt: skip


def _verify(
    path: str | Path, against: str | Path | None, adapters: Sequence[str | Path], strengths: list[float],
    block_weights: Sequence[str], device: str, progress: Progress | None,
) -> Report:  # fmt: skip
    clock = Clock()
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
    from lorasurgery.ops.examining.values import find_nonfinite  # imports torch

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
    from lorasurgery.ops.examining.values import check_records, compare, find_nonfinite, has_true_record

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
        equal = compare(model, base, plan, report, chosen)
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
