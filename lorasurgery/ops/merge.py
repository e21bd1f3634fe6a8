"""merge: W' = round(W + Σᵢ wᵢ·scaleᵢ·BᵢAᵢ), streamed from checkpoint to checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.output import check_output
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.ranks import ranks
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import some
from lorasurgery.ops.asked import Paths, all_paths, merge_options
from lorasurgery.ops.factors.sidecars import carried_files, not_followed
from lorasurgery.ops.merging.options import MergeOptions
from lorasurgery.ops.merging.recipe import Recipe, Rounding, plan_files
from lorasurgery.ops.merging.run_state import RunState
from lorasurgery.ops.merging.targets import (
    check_in_place,
    check_target,
    in_place_call,
    is_recovered,
    record_file,
    recovered_report,
)
from lorasurgery.ops.merging.undo.select import about, before_in_place, begin_record, files_changed, files_in_place
from lorasurgery.ops.placement.block_weight import weighed_plan
from lorasurgery.ops.provenance.record import describe
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.ops.provenance.resume import start_run
from lorasurgery.report import Progress, Report

if TYPE_CHECKING:
    import torch

LOW_RETENTION = 0.9


def merge(
    base: str | Path,
    adapters: Paths,
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    *,
    in_place: bool = False,
    undo: bool | None = None,
    weights: float | Sequence[float] = (),
    block_weights: str | Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    device: str = "auto",
    max_shard_size: int | str | None = None,
    allow_loss: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    memory_limit: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Merge adapters into a checkpoint, one rounding from float32, tensor by tensor.

    Examples:
        ```python
        merge("llama", ["style", "topic"], "merged", weights=[0.7, -0.3])
        merge("llama", "style", in_place=True)
        ```

    Args:
        base: Checkpoint folder or file.
        adapters: The adapters, or the one.
        out: Where the merged checkpoint goes; None with `in_place`.
        options: What the keywords from `weights` on say, as an object; what a keyword says too must not be in it.
        in_place: Change the touched tensors inside the base's own files.
        undo: Keep beside the result what it takes to undo the merge to the bit; None does so in place.
        weights: One strength per adapter, any finite number; the rest are 1.
        block_weights: `[N:]PATTERN=W`, an LBW preset or list: strengths by module, for all adapters or the N-th.
        dtype: Of floating tensors written, 8-bit ones only where an adapter touches them, as "bf16", "bfloat16",
            "BF16" or torch.bfloat16; None keeps each tensor's own.
        rounding: `nearest` (even), or `stochastic`, which is unbiased and seeded by `seed`.
        max_shard_size: Bytes per shard, or a size such as "5GB"; None keeps the base's layout.
        allow_loss: Write the result even when rounding keeps less than half of the update.
        allow_nonfinite: Go on where a weight, an update or their sum is NaN or infinite, instead of naming it.
        resume: Go on with what an interrupted run of the same inputs and options left; the result is the same.
        memory_limit: Bytes that weights on their way may take, or a size such as "2GB".
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    given = {
        "base": base, "adapters": adapters, "out": out, "options": options, "in_place": in_place, "undo": undo,
        "weights": weights, "block_weights": block_weights, "dtype": dtype, "rounding": rounding, "seed": seed,
        "max_shard_size": max_shard_size, "allow_loss": allow_loss, "allow_nonfinite": allow_nonfinite,
        "memory_limit": memory_limit, "device": device, "overwrite": overwrite, "resume": resume,
        "dry_run": dry_run, "progress": progress,
    }  # fmt: skip
    with open_call("merge", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "base", "adapters", "device")
        settings = merge_options(options, given)
        base, sources = call.local(base), call.all_local(all_paths(adapters))
        report = _merge(
            base, sources, out, settings, in_place=in_place, undo=in_place if undo is None else undo, device=device,
            overwrite=overwrite, resume=resume, dry_run=dry_run, progress=progress,
        )  # fmt: skip
        if dry_run:
            return call.checked(report)
        # in place the record is part of the change, so that a kill leaves both or neither
        return call.named(report) if in_place else call.recorded(report, [base, *sources])


def _merge(
    base: str | Path, adapters: Sequence[str | Path], out: str | Path | None, options: MergeOptions, *,
    in_place: bool, undo: bool, device: str, overwrite: bool, resume: bool, dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    clock, strengths = Clock(), options.check(len(adapters))
    check_device_name(device)
    target = check_target(base, out, in_place, options.dtype, options.max_shard_size, undo=undo)
    if in_place and is_recovered(target, resume=resume, dry_run=dry_run):
        return clock.stamp(recovered_report("merge", str(base)))
    checkpoint, opened = Checkpoint.open(base, unfinished=in_place), [open_adapter(a) for a in adapters]
    if not in_place:
        check_output(target, [Path(base), *map(Path, adapters)], overwrite, resume=resume)
    plan = weighed_plan(checkpoint, opened, strengths, options.block_weights)
    used = [a for a, w in zip(opened, strengths, strict=True) if w]
    files = plan_files(checkpoint, checkpoint, plan, target, dtype=options.dtype, max_shard_size=options.max_shard_size)
    brought = files_in_place(checkpoint, used) if in_place and not dry_run else {}
    record = None
    if undo:
        before: dict[str, bytes | None] = {}
        if not dry_run and in_place:
            before = before_in_place(checkpoint, list(brought))
        elif not dry_run:
            before = files_changed(checkpoint, used, plan, target)
        record = begin_record(opened, [str(a) for a in adapters], strengths, options.block_weights, before)
    recipe = Recipe(
        base=checkpoint, disk=checkpoint, companion=checkpoint, adapters=used, edits=plan, out=target, files=files,
        dtype=options.dtype, rounding=options.rounding, seed=options.seed, overwrite=overwrite,
        allow_loss=options.allow_loss, allow_nonfinite=options.allow_nonfinite, memory_limit=options.memory_limit,
        undo=record,
    )  # fmt: skip
    report = start_report("merge", recipe, [str(base), *map(str, adapters)], strengths, dry_run)
    if dry_run and in_place:
        check_in_place(recipe)
    if not dry_run:
        chosen = resolve_device(device)
        report.device, state = str(chosen), RunState(chosen, progress)
        about_it = identity_of(options) | {"undo": undo}
        if in_place:
            _inside(recipe, state, opened, brought, about_it, report, resume=resume)
        else:
            carry_out(recipe, state, report, about_it, resume=resume)
        if ranks().first:
            judge_retention(report, recipe)
    return clock.stamp(report)


def identity_of(options: MergeOptions) -> dict[str, Any]:
    """What of the options decides the result besides what a recipe and its report hold."""
    return {"block_weights": tuple(options.block_weights), "max_shard_size": options.max_shard_size}


def _inside(
    recipe: Recipe, state: RunState, adapters: Sequence[Adapter], files: dict[str, bytes], options: dict[str, Any],
    report: Report, *, resume: bool,
) -> None:  # fmt: skip
    """Merge inside the base's own files.

    Args:
        files: Other files that change too: name -> new content.
    """
    from lorasurgery.ops.merging.in_place import run_in_place  # imports torch

    report.sources = [source for path in report.inputs for source in describe(path, report.warnings)]
    options |= {"rounding": recipe.rounding, "seed": recipe.seed, "weights": report.totals["weights"]}
    identity = about(in_place_call(report), adapters, state.device.type, **options)
    run_in_place(recipe, state, identity, lambda: files | record_file(report), report, resume=resume)


def carry_out(recipe: Recipe, state: RunState, report: Report, options: dict[str, Any], *, resume: bool) -> None:
    """Do what is planned, on as many ranks as there are; what of it an interrupted run did already is left out.

    Args:
        options: What decides the result besides the recipe's own.
    """
    from lorasurgery.ops.merging.stream import run  # imports torch

    source = recipe.companion
    if recipe.out.suffix != ".safetensors" and not source.is_file:
        state.carried = carried_files(source.folder, recipe.adapters, parts=source.parts)
    options |= {name: getattr(recipe, name) for name in ("dtype", "rounding", "seed")}
    options["weights"] = report.totals["weights"]
    job = start_run(report.command, recipe.out, report.inputs, options, state.device, resume=resume, ranks=ranks())
    run(recipe, state, job, report)
    report.resumed = job.resumed


def start_report(command: str, recipe: Recipe, inputs: list[str], weights: list[float], dry_run: bool) -> Report:
    """The report as far as headers can tell it: counts, sizes and the plan."""
    edits, size = recipe.edits, sum(f.nbytes for f in recipe.files)
    report = Report(command, inputs, str(recipe.out), dry_run=dry_run)
    touched = [e for e in edits.edits.values() if e.contributions]
    report.totals = {
        "weights": weights,
        "tensors": sum(len(f.tensors) for f in recipe.files),
        "tensors_touched": len(touched),
        "tensors_replaced": sum(e.replacement is not None for e in edits.edits.values()),
        "adapter_tensors_matched": edits.matched,
        "adapter_tensors_unmatched": 0,  # any that were would have been an error
        "files": [f.name for f in recipe.files],
        "output_bytes": size,
        "untied": edits.untied,
        "vocab_size": edits.vocab_size,
    }
    new_folder = recipe.out != recipe.disk.path and recipe.out.suffix != ".safetensors"
    report.warnings += not_followed(recipe.companion if new_folder else None, recipe.adapters)
    if edits.untied:
        report.warnings.append(
            "lm_head no longer equals the input embedding: it is written as its own tensor and "
            "tie_word_embeddings is set to false"
        )
    report.summary = f"{len(touched)} tensors to change, {size:,} bytes to write"
    return report


def judge_retention(report: Report, recipe: Recipe) -> None:
    """Say in one line how much of the update survived rounding, and the way out when it is too little."""
    totals = report.totals
    kept, noise = totals["retention"], totals["noise"]
    report.summary = (
        f"{totals['tensors_touched']} tensors changed, {totals['tensors_replaced']} replaced: "
        f"{kept:.1%} of the update is in the weights, rounding noise is {noise:.1%} of it"
    )
    if not math.isfinite(kept):
        report.summary = f"{totals['tensors_touched']} tensors changed, {totals['tensors_replaced']} replaced"
        broken = [m.name for m in report.modules if not math.isfinite(m.retention or 0.0)]
        report.warnings.append(f"values in {some(broken)} are not finite; they are written as they came")
        return
    noisy = [m.name for m in sorted(report.modules, key=lambda m: -(m.noise or 0))[:3]]
    if report.modules and (kept < LOW_RETENTION or noise > math.sqrt(1 - LOW_RETENTION**2)):
        report.warnings.append(
            f"rounding keeps {kept:.1%} of the update and adds noise of {noise:.1%} of its norm "
            f"(most in {', '.join(noisy)}): the update is small beside the weights' precision" + _ways_out(recipe)
        )


def _ways_out(recipe: Recipe) -> str:
    wider = [] if recipe.out == recipe.disk.path else ["--dtype float32 keeps all of it"]
    random = ["--rounding stochastic keeps it right on average"] if recipe.rounding == "nearest" else []
    return "; " + ", ".join(wider + random) if wider + random else ""
