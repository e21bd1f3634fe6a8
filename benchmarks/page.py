"""Markdown for docs/benchmarks.md: tables of measured rows, and the page itself from the existing results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.measure import TORCH, Row

KEPT = Path(__file__).parent / "kept"  # figures from machines that `make bench` cannot reach
HEAD = """# Benchmarks

Made by `make bench` from what it measured; do not edit. `benchmarks/README.md` says how each section is measured.

Every figure is of whole processes, interpreter start and imports included, unless it says otherwise; seconds are
medians. Contenders run in turn, round by round. *Times ours* is the median beside ours in the same section: 2.0
took twice as long, 0.5 half as long. Memory is the highest resident memory over all runs as the system accounts it,
mapped file pages included. MB are 10⁶ bytes.
"""


def seconds(value: float) -> str:
    """Format seconds with as many digits as are significant."""
    digits = 1 if abs(value) >= 9.95 else 2 if abs(value) >= 0.0995 else 5
    return f"{value:.{digits}f}"


def megabytes(value: float) -> str:
    """Format bytes in MB."""
    return f"{value / 1e6:,.0f}" if value >= 1e7 else f"{value / 1e6:.1f}"


def span(values: Sequence[float]) -> str:
    """Format the least and the greatest."""
    return f"{seconds(min(values))}–{seconds(max(values))}"


def median(row: Row, key: str = "seconds") -> float:
    """Return a row's median."""
    return statistics.median(row[key])


def beyond_start(rows: Sequence[Row], size: int) -> str:
    """Report ours minus torch's import, measured in the same rounds, and the report's own seconds."""
    start = next(median(r) for r in rows if r["name"] == TORCH)
    rest, inner = median(rows[0]) - start, median(rows[0], "inner")
    return (
        f"Ours without the interpreter's start and torch's import (the difference of the first two rows): "
        f"{seconds(rest)} s, {size / rest / 1e9:.2f} GB/s. The report's own clock: {seconds(inner)} s."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose first `words` columns are words and the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(head)} |", f"|{'|'.join(marks)}|", *(f"| {' | '.join(r)} |" for r in rows)]


def contenders(rows: Sequence[Row], extra: Sequence[tuple[str, str, str]] = ()) -> list[str]:
    """Return the table of contenders, ours first, with extra (head, key, format) columns from the looked-up values."""
    head = ["", "seconds", "min–max", "runs", "and until on disk", "times ours", "peak MB", "memory, times ours"]
    ours, lines = rows[0], []
    for row in rows:
        if not row["seconds"]:
            lines.append(
                [row["name"], f"failed: {row['failed']}".replace("|", "/")] + [""] * (len(head) + len(extra) - 2)
            )
            continue
        peak = max(row["peak"])
        cells = [row["name"], seconds(median(row)), span(row["seconds"]), str(len(row["seconds"]))]
        cells += [f"+{median(row, 'flush'):.2f}", f"{median(row) / median(ours):.2f}"]
        cells += [megabytes(peak), f"{peak / max(ours['peak']):.2f}"]
        lines.append(cells + [format(row[key], spec) if key in row else "" for _, key, spec in extra])
    return table([*head, *(name for name, _, _ in extra)], lines)


def facts(result: dict[str, Any]) -> list[str]:
    """Return the line with date, machine and versions."""
    where = result["machine"]
    parts = [where["processor"], f"{where['cores']} cores", where["memory"], where["disk"], where["system"]]
    parts += [where["gpu"]] if "gpu" in where else []
    made = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [f"**{result['date']}**: {', '.join(parts)}. {made}.", ""]


def render(sections: Sequence[ModuleType], results: Path, target: Path) -> None:
    """Write the page from the existing results, else from those kept by hand; missing sections say so."""
    lines = [HEAD]
    for section in sections:
        lines += [f"## {section.TITLE}", "", section.METHOD, ""]
        path = results / f"{section.NAME}.json"
        if path.exists():
            result = json.loads(path.read_text())
            lines += [*facts(result), *section.render(result), ""]
        else:
            kept = KEPT / f"{section.NAME}.md"
            lines += [kept.read_text().rstrip() if kept.exists() else "Not measured.", ""]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines).rstrip() + "\n")
