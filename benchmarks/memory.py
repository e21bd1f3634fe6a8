"""Peak memory of every command that reads weights, above that of an interpreter with torch, with its bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.measure import OURS, Contender, Row, interleave, remove, torch_alone
from benchmarks.options import Options
from benchmarks.pair import make_pair
from benchmarks.streams import Weights, folder_bytes

NAME, TITLE = "memory", "Memory"
TAKES = "5 to 10 minutes"
METHOD = """Peak resident memory of each command minus that of `python -c "import torch"` in the same rounds, beside
the bound of 3 × the largest tensor whose values are looked at, in float32, + the bytes of the adapters that are
read (of extract: written) + 256 MB."""
SLACK = 256_000_000
EXTRACT_RANK, MERGE_RANK = 64, 16


@dataclass(frozen=True)
class Case:
    """A command and the parts of its bound."""

    name: str
    arguments: list[str]
    out: Path | None
    largest: int
    adapters: int

    def bound(self) -> int:
        """Return the allowed bytes above the interpreter with torch."""
        return 3 * 4 * self.largest + self.adapters + SLACK


def measure(options: Options) -> dict[str, Any]:
    """Measure every command, `runs` times but at most three; the highest value counts."""
    runs = min(options.runs, 3)
    found = cases(options)
    rows = interleave([torch_alone(runs), *(_contender(c, runs) for c in found)], options.logs, keep=True)
    if not options.keep:
        for case in found:
            if case.out is not None:
                remove(case.out)
    return {"baseline": rows[0], "rows": [r | {"bound": c.bound()} for r, c in zip(rows[1:], found, strict=True)]}


def cases(options: Options) -> list[Case]:
    """Return all commands, ordered so that each finds the output of the ones before it."""
    small, large = options.shape(2), options.shape(10)
    base, tuned = (str(p) for p in make_pair(options.work, small))
    model = make_pair(options.work, large, tuned=False)[0]
    a, b = (options.adapter(large, EXTRACT_RANK, seed) for seed in (0, 1))
    thin = options.adapter(large, MERGE_RANK)
    out = {n: options.work / f"out-memory-{n}" for n in ("extract", "merge", "unmerge", "rerank", "blend", "convert")}
    of_model, of_adapter = _largest(model), _largest(a)
    rank = ["--rank", str(EXTRACT_RANK)]
    written = _adapter_bytes(Path(base), EXTRACT_RANK)
    return [
        Case("extract", ["extract", base, tuned, *rank], out["extract"], _largest(Path(base)), written),
        Case("merge", ["merge", str(model), str(thin)], out["merge"], of_model, folder_bytes(thin)),
        Case("unmerge", ["unmerge", str(out["merge"]), str(thin)], out["unmerge"], of_model, folder_bytes(thin)),
        Case("rerank", ["rerank", str(a), "--rank", "32"], out["rerank"], of_adapter, folder_bytes(a)),
        Case("blend", ["blend", str(a), str(b), *rank], out["blend"], of_adapter, folder_bytes(a) + folder_bytes(b)),
        Case("convert", ["convert", str(a), "--to", "peft", "--portable"], out["convert"], of_adapter, folder_bytes(a)),
        Case("inspect --spectrum", ["inspect", str(a), "--spectrum"], None, of_adapter, folder_bytes(a)),
        Case("diff of checkpoints", ["diff", base, tuned], None, _largest(Path(base)), 0),
        Case("diff of adapters", ["diff", str(a), str(b)], None, of_adapter, folder_bytes(a) + folder_bytes(b)),
        Case("plan", ["plan", str(model)], None, 0, 0),
    ]


def _largest(folder: Path) -> int:
    """Return the number of elements of the largest tensor."""
    return max(torch.Size(s).numel() for s in Weights(folder).shapes.values())


def _adapter_bytes(base: Path, rank: int) -> int:
    """Return the bytes of bfloat16 factors for all linear layers."""
    shapes = [s for n, s in Weights(base).shapes.items() if ".layers." in n and len(s) == 2]
    return sum(2 * rank * (m + n) for m, n in shapes)


def _contender(case: Case, runs: int) -> Contender:
    target = [] if case.out is None else ["-o", str(case.out)]
    device = [] if case.name == "plan" else ["--device", "cpu"]
    return Contender(case.name, [*OURS, *case.arguments, *target, *device, "--json"], case.out, runs)


def render(result: dict[str, Any]) -> list[str]:
    """Write one row per command: its memory above the interpreter with torch, and the bound."""
    start = max(result["baseline"]["peak"])
    lines = [_line(r, start) for r in result["rows"]]
    head = ["", "peak MB", "beyond torch, MB", "bound, MB", "share of the bound", "seconds", "runs"]
    return [f"`import torch` alone: {page.megabytes(start)} MB.", "", *page.table(head, lines)]


def _line(row: Row, start: int) -> list[str]:
    peak = max(row["peak"])
    beyond = max(peak - start, 0)
    cells = [page.megabytes(peak), page.megabytes(beyond), page.megabytes(row["bound"]), f"{beyond / row['bound']:.0%}"]
    return [row["name"], *cells, page.seconds(page.median(row)), str(len(row["seconds"]))]
