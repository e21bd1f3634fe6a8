"""blend: one adapter out of several, Σ wᵢ·ΔWᵢ or one of its kin; rerank is the blend of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.dtypes import typed_name
from lorasurgery.checkpoint.output import Output, check_output
from lorasurgery.engine.ranks import ranks
from lorasurgery.engine.runtime import Clock, check_device_name, resolve_device
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError
from lorasurgery.linalg.methods import ELEMENTWISE, BlendMethod
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.asked import Paths, all_paths, blend_options
from lorasurgery.ops.blending.join import Joint, Whole, base_models, join, weigh_joints, whole_tensors
from lorasurgery.ops.blending.options import BlendOptions
from lorasurgery.ops.blending.write import factor_dtype
from lorasurgery.ops.factors.folders import find_adapters, run_each
from lorasurgery.ops.factors.layout import check_name
from lorasurgery.ops.factors.losses import rule_warning, total_error, worst
from lorasurgery.ops.factors.sidecars import not_followed
from lorasurgery.ops.placement.block_weight import Blocks
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.ops.provenance.resume import start_run
from lorasurgery.report import ModuleReport, Progress, Report

if TYPE_CHECKING:
    import torch

    from lorasurgery.ops.blending.write import Composed

_WORTH_SAYING = 1e-4  # below this error, where it lies is of no use to anyone


def blend(
    adapters: Paths,
    out: str | Path,
    options: BlendOptions | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    method: BlendMethod | None = None,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    budget: Budget | float | str | None = None,
    max_rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Blend adapters into one; the d×k matrices are never formed for `linear`, `cat` and `knots-ties`.

    Examples:
        ```python
        blend(["style", "topic"], "both", weights=[0.7, 0.3], rank=32)
        blend(["style", "topic"], "both", BlendOptions(density=0.2, seed=1), method="ties")
        ```

    Args:
        adapters: Adapter folders, or one; they may differ in ranks, scaling, dtypes and modules.
        out: Folder for the new PEFT adapter.
        options: The rest of what can be said; what a keyword says too must not be in it.
        weights: One strength per adapter, the rest are 1.
        method: `linear` is the exact weighted sum; docs/maths.md says what the others are.
        rank: As for extract; without one every direction is kept. A budget's share is of the adapters' bytes.
        energy: As for extract; without one every direction is kept. A budget's share is of the adapters' bytes.
        tolerance: As for extract; without one every direction is kept. A budget's share is of the adapters' bytes.
        budget: As for extract; without one every direction is kept. A budget's share is of the adapters' bytes.
        max_rank: As for extract; without one every direction is kept. A budget's share is of the adapters' bytes.
        dtype: What factors are written in, as "bf16", "bfloat16", "BF16" or torch.bfloat16.
        resume: Go on with what an interrupted run of the same inputs and options left; the result is the same.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    given = {
        "adapters": adapters, "out": out, "options": options, "weights": weights, "method": method,
        "rank": rank, "energy": energy, "tolerance": tolerance, "budget": budget, "max_rank": max_rank,
        "dtype": dtype, "device": device, "overwrite": overwrite, "resume": resume, "dry_run": dry_run,
        "progress": progress,
    }  # fmt: skip
    with open_call("blend", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "adapters", "out", "device")
        settings, sources = blend_options(options, given), call.all_local(all_paths(adapters))
        report = _blend(
            sources, Path(out), settings, device=device, overwrite=overwrite, resume=resume, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
        return call.checked(report) if dry_run else call.recorded(report, sources)


def _blend(
    adapters: Sequence[str | Path], out: Path, options: BlendOptions, *, device: str, overwrite: bool, resume: bool,
    dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    clock = Clock()
    check_device_name(device)
    strengths = options.strengths(len(adapters))
    opened = [open_adapter(a) for a in adapters]
    check_name(out, loose=opened[0].format != "peft")
    check_output(out, [Path(a) for a in adapters], overwrite, resume=resume)
    report = Report(options.command, [str(a) for a in adapters], str(out), dry_run=dry_run)
    report.warnings += [] if out.suffix == ".safetensors" else not_followed(None, opened)
    used = [(a, w) for a, w in zip(opened, strengths, strict=True) if w]
    if not used:
        raise UsageError("every weight is 0, so nothing is left to blend")
    sources, weights = [a for a, _ in used], [w for _, w in used]
    _check_tokens(sources)
    joints = join(sources, weights)
    joints, blocks = weigh_joints(joints, options.block_weights, opened)
    _plan(report, sources, joints, strengths, options)
    if not dry_run:
        whole = list(whole_tensors(sources, weights, average=options.average_replaced))
        _warn_alone(report, sources, whole)
        _run(report, sources, weights, joints, whole, options, blocks, device, out, overwrite, resume, progress)
    return clock.stamp(report)


def _check_tokens(sources: Sequence[Adapter]) -> None:
    for adapter in sources:
        if adapter.tokens:
            raise UnsupportedError(
                f"{adapter.path}: replaces single rows ({', '.join(adapter.tokens)}: trainable_token_indices), which "
                "can be merged but not reranked or blended"
            )


def _run(
    report: Report, sources: list[Adapter], weights: list[float], joints: list[Joint], whole: list[Whole],
    options: BlendOptions, blocks: Blocks | None, device: str, out: Path, overwrite: bool, resume: bool,
    progress: Progress | None,
) -> None:  # fmt: skip
    from lorasurgery.ops.blending.combine import Composition  # imports torch
    from lorasurgery.ops.blending.write import Composed

    chosen = resolve_device(device)
    report.device = str(chosen)
    draft = Composed(
        sources, whole, factor_dtype(sources, options), weights, cast=options.dtype is not None, blocks=blocks
    )
    choice = options.choice
    budget = choice.budget.bytes_of(_bytes(sources)) if choice and choice.budget else None
    if budget:
        report.totals["budget"] = budget
    job = start_run(options.command, out, [a.path for a in sources], options, chosen, resume=resume, ranks=ranks())
    job.ranks.wait()  # until all have seen the output as it was
    with Output(out, overwrite=overwrite, run=job, inputs=[a.path for a in sources]) as output:
        work = Composition(joints, options, draft, chosen)
        work.run(budget, progress, job)
        report.warnings += work.fallback.warnings
        if job.ranks.first:
            _finish(draft, options, budget, output)
    job.ranks.wait()
    report.bytes_written = output.bytes_written
    report.bytes_read = sum(a.weights.bytes_read for a in sources)
    report.resumed = job.resumed
    if job.ranks.first:
        _summarise(report, draft, options)


def _finish(draft: Composed, options: BlendOptions, budget: int | None, output: Output) -> None:
    """Cut and pad the modules when all of them are known, and write them."""
    from lorasurgery.ops.blending.write import first_keys

    if budget:
        draft.spend(budget, uniform=options.uniform_rank)
    if options.uniform_rank:
        draft.pad()
    if not draft.modules and not draft.whole and not first_keys(draft.sources):
        names = ", ".join(a.path for a in draft.sources)
        raise MismatchError(f"{names}: the {options.command} is zero in every module, so there is nothing to write")
    draft.write(output)


def _plan(
    report: Report, sources: list[Adapter], joints: list[Joint], strengths: list[float], options: BlendOptions
) -> None:
    """What headers tell: modules, the most their ranks can be, and whether the adapters belong together."""
    names = base_models(sources)
    if len(names) > 1:
        report.warnings.append(
            f"the adapters name different base models ({', '.join(names)}); the shapes agree, so they are blended"
        )
    report.modules = [ModuleReport(j.path, j.shape, kind=j.kind, rank=_upper(j, options)) for j in joints]
    parameters = sum((m.rank or 0) * sum(m.shape) for m in report.modules)
    report.totals = {
        "method": options.method, "weights": strengths, "modules": len(joints), "parameters_at_most": parameters,
        "input_bytes": _bytes(sources),
    }  # fmt: skip
    report.summary = f"{len(joints)} modules of {len(sources)} adapters, at most {parameters:,} parameters in factors"


def _upper(joint: Joint, options: BlendOptions) -> int:
    if options.method == "cat":
        return sum(t.delta.rank for t in joint.terms)
    dense = options.method in ELEMENTWISE
    if options.choice is None:
        return max(t.delta.rank for t in joint.terms) if dense else joint.rank
    asked = options.choice.upper(*joint.shape)
    return asked if dense else min(asked, joint.rank)


def _bytes(sources: Sequence[Adapter]) -> int:
    return sum(a.weights.nbytes for a in sources)


def _warn_alone(report: Report, sources: Sequence[Adapter], whole: Sequence[Whole]) -> None:
    alone = [item.name for item in whole if len(sources) > 1 and any(item.name not in a.replaced for a in sources)]
    if alone:
        report.warnings.append(
            f"{len(alone)} tensors stored whole ({', '.join(alone[:3])}{' …' if len(alone) > 3 else ''}) are not in "
            "every adapter; they are taken as they are, whatever the weights"
        )


def _summarise(report: Report, draft: Composed, options: BlendOptions) -> None:
    report.modules = [f.report for _, f in draft.modules] + [m for m in draft.dropped if options.choice]
    report.left_out = [m for m in draft.dropped if not options.choice]
    report.full = [ModuleReport(w.name, w.copies[0][0].weights.tensors[w.key].shape, kind="whole") for w in draft.whole]
    _, lost = total_error(report)
    report.warnings += rule_warning(report.modules, options.choice, [typed_name(draft.dtype)])
    totals = report.totals
    given = totals["input_bytes"]
    totals |= {"full": len(report.full), "size_ratio": report.bytes_written / given if given else None}
    report.summary = (
        f"error {totals['error']:.2%}, energy {totals['energy']:.2%} over {len(report.modules)} modules; "
        f"ranks {totals['rank_min']} to {totals['rank_max']}, {report.bytes_written / 1e6:.2f} MB from "
        f"{given / 1e6:.2f} MB" + (worst(report.modules, lost) if totals["error"] > _WORTH_SAYING else "")
    )


def rerank(
    adapter: str | Path,
    out: str | Path,
    choice: RankChoice | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    budget: Budget | float | str | None = None,
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Change an adapter's ranks: scale·B·A of each module becomes its best approximation, or itself.

    Examples:
        ```python
        rerank("adapter", "smaller", energy=0.95, max_rank=32)
        ```

    Args:
        adapter: Adapter folder or file, or a folder of several.
        out: Folder or file for the new adapter, in the format of the old one.
        choice: The rule as an object, instead of the five keywords; it has sd-scripts' rules too.
        rank: As for extract; without one the minimal exact rank is kept. A module that has no more directions than
            asked for keeps its factors as they are. A budget's share is of the adapter's bytes.
        energy: As for extract; without one the minimal exact rank is kept. A module that has no more directions than
            asked for keeps its factors as they are. A budget's share is of the adapter's bytes.
        tolerance: As for extract; without one the minimal exact rank is kept. A module that has no more directions than
            asked for keeps its factors as they are. A budget's share is of the adapter's bytes.
        budget: As for extract; without one the minimal exact rank is kept. A module that has no more directions than
            asked for keeps its factors as they are. A budget's share is of the adapter's bytes.
        max_rank: As for extract; without one the minimal exact rank is kept. A module that has no more directions than
            asked for keeps its factors as they are. A budget's share is of the adapter's bytes.
        uniform_rank: Zero-pad all factors to one rank: the form every server takes.
        dtype: What factors are written in, as "bf16", "bfloat16", "BF16" or torch.bfloat16; None keeps the
            adapter's own.
        resume: Go on with what an interrupted run of the same inputs and options left; the result is the same.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    given = {
        "adapter": adapter, "out": out, "choice": choice, "rank": rank, "energy": energy, "tolerance": tolerance,
        "budget": budget, "max_rank": max_rank, "uniform_rank": uniform_rank, "dtype": dtype, "device": device,
        "overwrite": overwrite, "resume": resume, "dry_run": dry_run, "progress": progress,
    }  # fmt: skip
    with open_call("rerank", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "adapter", "out", "device")
        settings = blend_options(BlendOptions(choice=choice, command="rerank"), given)
        adapter = call.local(adapter)
        several = find_adapters(adapter)
        if several and ranks().size > 1:
            raise UsageError(f"{adapter}: a folder of adapters is not shared out over ranks; run it without torchrun")
        if not several:
            report = _blend(
                [adapter], Path(out), settings, device=device, overwrite=overwrite, resume=resume, dry_run=dry_run,
                progress=progress,
            )  # fmt: skip
            return call.checked(report) if dry_run else call.recorded(report, [adapter])
        report = run_each(
            "rerank", adapter, several,
            lambda one, to: rerank(one, to, settings.choice, uniform_rank=uniform_rank, dtype=dtype, device=device,
                                   overwrite=overwrite, resume=resume, dry_run=dry_run, progress=progress),
            out, overwrite=overwrite, dry_run=dry_run,
        )  # fmt: skip
        return call.checked(report) if dry_run else call.named(report)  # each has a record of its own
