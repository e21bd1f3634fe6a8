"""check: would a program take this adapter, and would it mean there what it means here? From headers alone."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.arguments import check_kinds
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.issue import Issue, Setting
from lorasurgery.clients.servers import SERVERS, findings
from lorasurgery.engine.runtime import Clock
from lorasurgery.errors import UsageError
from lorasurgery.ops.factors.folders import find_adapters, run_each
from lorasurgery.ops.placement.plan import plan_edits
from lorasurgery.ops.provenance.references import open_call
from lorasurgery.report import Report


def check(
    adapter: str | Path, server: str, *, base: str | Path | None = None, max_lora_rank: int | None = None
) -> Report:
    """What a server would reject, get wrong or drop, each with the command that fixes it.

    Examples:
        ```python
        check("adapter", "vllm", base="llama").totals["serves"]
        ```

    Args:
        adapter: Adapter folder or file of any format, or a folder of several.
        server: One of peft, vllm, sglang, llama.cpp, diffusers, comfyui.
        base: Checkpoint that every tensor of the adapter must match; some rules need it.
        max_lora_rank: vLLM's setting; None is its default, 16.

    Raises:
        SurgeryError: the adapter is broken or does not fit the base, in one line.
        UsageError: no such server.
    """
    given = {"adapter": adapter, "server": server, "base": base, "max_lora_rank": max_lora_rank}
    with open_call("check", given, headers_only=True) as call:
        check_kinds(given, "adapter", "server")
        if server not in SERVERS:
            raise UsageError(f"--for {server}: expected one of {', '.join(SERVERS)}")
        adapter, model = call.local(adapter), call.local(base)
        several = find_adapters(adapter)
        if not several:
            return call.checked(_check(adapter, server, model, max_lora_rank))
        report = run_each(
            "check", adapter, several, lambda p, _: check(p, server, base=model, max_lora_rank=max_lora_rank)
        )
        good = [bool(r.totals.get("serves")) for r in report.adapters or []]
        report.totals |= {"for": server, "serves": all(good)}
        report.summary = f"{server} serves {sum(good)} of {len(good)} adapters as they are"
        return call.checked(report)


def _check(adapter: str | Path, server: str, base: str | Path | None, max_lora_rank: int | None) -> Report:
    """Check one adapter."""
    clock, opened = Clock(), open_adapter(adapter)
    checkpoint = Checkpoint.open(base) if base is not None else None
    report = Report("check", [str(adapter), *([str(base)] if base is not None else [])], "")
    matched = plan_edits(checkpoint, [opened], [1.0]).matched if checkpoint else None
    found = findings(opened, server, Setting(max_lora_rank, checkpoint))
    report.totals = {
        "for": server, "format": opened.format, "serves": not found, "matched": matched, "modules": len(opened.deltas),
        "findings": [{"verdict": f.verdict, "what": f.what, "mend": f.mend} for f in found],
    }  # fmt: skip
    report.summary = _summary(server, found, matched)
    return clock.stamp(report)


def _summary(server: str, found: list[Issue], matched: int | None) -> str:
    fits = f"; all of it matches the base ({matched} tensors)" if matched is not None else ""
    if not found:
        return f"{server} serves it as it is{fits}"
    lines = [f"{server} would not serve it as it is meant{fits}:"]
    lines += [f"  {f.verdict}: {f.what}\n    {f.mend}" for f in found]
    return "\n".join(lines)
