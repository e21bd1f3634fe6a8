"""check: would a server take this adapter, and would it mean there what it means here? From headers alone."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.servers import SERVERS, Finding, findings
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import UsageError
from lorasurgery.ops.planner import plan_edits
from lorasurgery.ops.runtime import Clock
from lorasurgery.report import Report


def check(
    adapter: str | Path, server: str, *, base: str | Path | None = None, max_lora_rank: int | None = None
) -> Report:
    """What a server would reject, get wrong or drop, each with the command that mends it.

    Example:
        check("adapter", "vllm", base="llama").totals["serves"]

    Args:
        adapter: Adapter folder.
        server: One of peft, vllm, sglang, llama.cpp.
        base: Checkpoint that every tensor of the adapter must match.
        max_lora_rank: vLLM's setting; None is its default, 16.

    Raises:
        SurgeryError: the adapter is broken or does not fit the base, in one line. UsageError: no such server.
    """
    clock = Clock()
    if server not in SERVERS:
        raise UsageError(f"--for {server}: expected one of {', '.join(SERVERS)}")
    opened = open_adapter(adapter)
    report = Report("check", [str(adapter), *([str(base)] if base is not None else [])], "")
    matched = None
    if base is not None:
        matched = plan_edits(Checkpoint.open(base), [opened], [1.0]).matched
    found = findings(opened, server, max_lora_rank=max_lora_rank)
    report.totals = {
        "for": server, "serves": not found, "matched": matched, "modules": len(opened.deltas),
        "findings": [{"verdict": f.verdict, "what": f.what, "mend": f.mend} for f in found],
    }  # fmt: skip
    report.summary = _summary(server, found, matched)
    return clock.stamp(report)


def _summary(server: str, found: list[Finding], matched: int | None) -> str:
    fits = f"; all of it matches the base ({matched} tensors)" if matched is not None else ""
    if not found:
        return f"{server} serves it as it is{fits}"
    lines = [f"{server} would not serve it as it is meant{fits}:"]
    lines += [f"  {f.verdict}: {f.what}\n    {f.mend}" for f in found]
    return "\n".join(lines)
