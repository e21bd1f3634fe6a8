"""extract: ΔW = W_tuned − W_base ≈ B·A, one pair of tensors at a time, written as a PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.inside import refuse_link
from lorasurgery.checkpoint.output import Output, check_output
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.client import Client, client_named
from lorasurgery.clients.host import Host
from lorasurgery.clients.issue import Setting
from lorasurgery.clients.servers import SERVERS, findings
from lorasurgery.engine.ranks import ranks
from lorasurgery.engine.runtime import Clock, check_device_name, check_memory_limit, resolve_device
from lorasurgery.errors import UsageError
from lorasurgery.linalg.rank import Budget
from lorasurgery.ops.asked import bytes_of, extract_options
from lorasurgery.ops.conversion.limits import check_place
from lorasurgery.ops.extraction.forms import fit_pairs, host_of, narrowed
from lorasurgery.ops.extraction.options import ExtractOptions
from lorasurgery.ops.extraction.pairs import Pair, group_experts, match_pairs
from lorasurgery.ops.extraction.report import add_excluded, plan_report, summarise, warning_of
from lorasurgery.ops.factors.losses import rule_warning
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.ops.provenance.resume import start_run
from lorasurgery.report import Progress, Report

if TYPE_CHECKING:
    import torch

    from lorasurgery.checkpoint.journal import Run
    from lorasurgery.ops.extraction.decompose import Extraction


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    budget: Budget | float | str | None = None,
    max_rank: int | None = None,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    full: str | Sequence[str] | None = None,
    alpha: float | None = None,
    dtype: str | torch.dtype | None = None,
    client: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    memory_limit: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Extract a LoRA adapter from a fine-tuned checkpoint by truncated SVD of every changed matrix.

    Examples:
        ```python
        extract("llama", "llama-chat", "adapter", rank=64)
        extract("llama", "llama-chat", "adapter", budget="100MB", target="attention", client="vllm")
        extract("llama", "llama-chat", "adapter", ExtractOptions(svd="exact", seed=1), energy=0.9)
        ```

    Args:
        base: Checkpoint folders or files of the same architecture.
        tuned: Checkpoint folders or files of the same architecture.
        out: Folder for adapter_config.json and adapter_model.safetensors; for image tools a .safetensors file.
        options: The rest of what can be said; what a keyword says too must not be in it.
        rank: Directions kept in every module, 16 unless another rule is given; one of these five:
        energy: Keep the least rank that holds this share of ‖ΔW‖².
        tolerance: Keep the least rank with a relative error of at most this.
        budget: For the file: bytes (an int), a share of the base's (a float), or either as text: "100MB", "25%".
        max_rank: A cap on what energy, tolerance or budget ask for.
        target: Only these modules: a suffix (q_proj), a regular expression on the whole path, or attention, mlp,
            all-linear; one or several.
        exclude: Not these modules, in the same words.
        full: What is stored whole: auto, none, or what patterns mean.
        alpha: lora_alpha to write; the factors make up for it.
        dtype: What factors are written in, as "bf16", "bfloat16", "BF16" or torch.bfloat16.
        client: The program it is for: peft, vllm, sglang, llama.cpp, diffusers, comfyui or kohya.
        resume: Go on with what an interrupted run of the same inputs and options left; the result is the same.
        memory_limit: Bytes that differences may take, or a size such as "2GB"; larger ones are read again for every
            pass over them.
        dry_run: Settle everything from headers, write nothing (torch is not imported).

    Raises:
        SurgeryError: one line saying which file, what was expected, what was found and the next move.
    """
    given = {
        "base": base, "tuned": tuned, "out": out, "options": options, "rank": rank, "energy": energy,
        "tolerance": tolerance, "budget": budget, "max_rank": max_rank, "target": target, "exclude": exclude,
        "full": full, "alpha": alpha, "dtype": dtype, "client": client, "device": device, "overwrite": overwrite,
        "resume": resume, "memory_limit": memory_limit, "dry_run": dry_run, "progress": progress,
    }  # fmt: skip
    with open_call("extract", given, writes=not dry_run, headers_only=dry_run, progress=progress) as call:
        check_kinds(given, "base", "tuned", "out", "device")
        settings = extract_options(options, given)
        base, tuned = call.local(base), call.local(tuned)
        report = _extract(
            base, tuned, Path(out), settings, device=device, overwrite=overwrite, resume=resume,
            memory_limit=bytes_of(memory_limit), dry_run=dry_run, progress=progress,
        )  # fmt: skip
        return call.checked(report) if dry_run else call.recorded(report, [base, tuned])


def _extract(
    base: str | Path, tuned: str | Path, out: Path, options: ExtractOptions, *, device: str, overwrite: bool,
    resume: bool, memory_limit: int | None, dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    """Extract into what the client takes: a folder, or a file that is made from one."""
    client = client_named(options.client)
    if client.one_rank:
        options = replace(options, uniform_rank=True)
    if (out.suffix == ".safetensors") != bool(client.file):
        wanted = "one .safetensors file" if client.file else "a folder (config and weights)"
        raise UsageError(f"{out}: an adapter for {client.name} is {wanted}; give such a name")
    check_output(out, [Path(base), Path(tuned)], overwrite, resume=resume)
    folder = staged(out) if client.file else out
    report = _to_folder(
        base, tuned, folder, options, device=device, overwrite=overwrite or bool(client.file), resume=resume,
        memory_limit=memory_limit, dry_run=dry_run, progress=progress,
    )  # fmt: skip
    report.output = str(out)
    if not dry_run and ranks().first:
        if client.file:
            to_file(folder, out, client, Path(base), report, overwrite=overwrite, budget=options.choice.budget)
        report.warnings += reservations(out, client, Checkpoint.open(base))
    return report


def _to_folder(
    base: str | Path, tuned: str | Path, out: Path, options: ExtractOptions, *, device: str, overwrite: bool,
    resume: bool, memory_limit: int | None, dry_run: bool, progress: Progress | None,
) -> Report:  # fmt: skip
    """Extract into a PEFT folder."""
    clock = Clock()
    check_device_name(device)
    check_memory_limit(memory_limit)
    first, second = Checkpoint.open(base), Checkpoint.open(tuned)
    client = client_named(options.client)
    if client.file:
        check_place(first, client.file, str(tuned), "extract --for peft instead")
    matched = match_pairs(first, second, options.selection)
    host = host_of(first, second, matched.pairs, ask=not dry_run)
    fitted = fit_pairs(matched.pairs, host, options.selection)
    fitted = narrowed(fitted, client)
    pairs = group_experts(fitted, first.config | second.config)
    report = plan_report(first, second, out, pairs, options.choice, dry_run)
    report.warnings += matched.notes
    if not dry_run:
        from lorasurgery.ops.factors.workload import named  # imports torch

        chosen = resolve_device(device)
        report.device = str(chosen)
        run = start_run("extract", out, [base, tuned], options, chosen, resume=resume, ranks=ranks())
        with named(str(tuned), str(base), str(out)):
            job = _carry_out(
                first, second, host, options, chosen, run, pairs, out, overwrite, memory_limit, report, progress
            )
        report.bytes_read = first.bytes_read + second.bytes_read
        report.modules, report.full = job.modules, job.full
        report.warnings += job.fallback.warnings
        summarise(report, job.left_out, first.nbytes, unchanged=job.unchanged, rounding=job.rounding)
        report.warnings += rule_warning(report.modules, options.choice, job.dtypes)
        unseen = sum(p.treatment == "skipped" and p.why != "--target" and not p.is_comparable for p in pairs if p.base)
        add_excluded(report, job.excluded, unseen + matched.lone)
        if job.capped:
            report.warnings.append(
                f"{len(job.capped)} modules kept all {job.choice.rank} directions they were allowed to bring "
                f"({', '.join(job.capped[:3])}); a larger --max-rank lets them have more of the budget"
            )
    return clock.stamp(report)


def _carry_out(
    base: Checkpoint, tuned: Checkpoint, host: Host, options: ExtractOptions, device: torch.device, run: Run,
    pairs: Sequence[Pair], out: Path, overwrite: bool, limit: int | None, report: Report, progress: Progress | None,
) -> Extraction:  # fmt: skip
    """Do the work on as many ranks as there are; the first writes the adapter."""
    from lorasurgery.ops.extraction.decompose import Extraction
    from lorasurgery.ops.extraction.write import write_adapter  # imports torch

    job = Extraction(base, tuned, host, options, device, run, limit)
    run.ranks.wait()  # until all have seen the output as it was
    with Output(out, overwrite=overwrite, run=run, inputs=[base.path, tuned.path]) as output:
        draft = job.run(pairs, progress)
        if run.ranks.first:
            problems = write_adapter(draft, tuned, output)
            if not client_named(options.client).file:
                report.warnings += [warning_of(p, base, out) for p in problems]
        report.bytes_written = output.bytes_written
    run.ranks.wait()
    report.resumed = run.resumed
    return job


def staged(out: Path) -> Path:
    """Where the PEFT folder lies that an image tool's file is made from; the same for a run that is resumed.

    Raises:
        OutputError: a link lies there.
    """
    folder = out.with_name(f".{out.name}.lorasurgery-peft")
    refuse_link(folder)
    return folder


def to_file(
    folder: Path, out: Path, client: Client, base: Path, report: Report, *, overwrite: bool,
    budget: Budget | None = None,
) -> None:  # fmt: skip
    """Turn the PEFT folder into the client's file, and remove the folder."""
    from lorasurgery.ops.conversion.options import ConvertOptions
    from lorasurgery.ops.convert import convert_adapter

    assert client.file
    try:
        made = convert_adapter(str(folder), out, ConvertOptions(client.file), base=str(base), overwrite=overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.output, report.bytes_written = str(out), made.bytes_written
    report.warnings += made.warnings
    report.totals["adapter_bytes"] = made.bytes_written
    allowed = budget.bytes_of(Checkpoint.open(base).nbytes) if budget else made.bytes_written
    if made.bytes_written > allowed:
        report.warnings.append(
            f"--budget of {allowed:,} bytes does not hold: it was kept for PEFT's form of the factors, and "
            f"{client.name}'s file, with names of its own and other modules joined, takes {made.bytes_written:,}; "
            "give a smaller one"
        )


def reservations(out: Path, client: Client, base: Checkpoint) -> list[str]:
    """What the client would still reject, get wrong or drop of the file, with what helps."""
    if client.name not in SERVERS or client.name == "peft":  # PEFT's own come from the draft
        return []
    found = findings(open_adapter(out), client.name, Setting(base=base))
    return [f"{client.name}: {f.verdict}: {f.what}; {f.mend}" for f in found]
