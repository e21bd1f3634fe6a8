"""extract against mergekit-extract-lora on the same pair, which takes minutes."""

from __future__ import annotations

from typing import Any

from benchmarks import page
from benchmarks.environments import environment
from benchmarks.errors import extraction_error
from benchmarks.measure import OURS, Contender, Row, interleave, torch_alone
from benchmarks.options import Options
from benchmarks.pair import make_pair
from benchmarks.streams import folder_bytes

NAME, TITLE = "extract", "Extract"
TAKES = "an hour, nearly all of it for mergekit"
METHOD = """`lorasurgery extract` and `mergekit-extract-lora` at the same rank from the same Llama-shaped pair in
bfloat16, whose linear layers all differ by 3% of their norm: a power law of 128 directions with a noisy tail.
Error: ‖ΔW − BA‖/‖ΔW‖ over all modules, from the files both wrote and in float64. mergekit's adapter may hold
unchanged embeddings and head beside the factors."""
RANK = 64


def measure(options: Options) -> dict[str, Any]:
    """Make the pair, run both interleaved, and compute the errors of their output."""
    shape = options.shape(7)
    base, tuned = make_pair(options.work, shape)

    def look(out: Any) -> Row:
        return {"error": extraction_error(base, tuned, out), "adapter": folder_bytes(out) / 1e6}

    out = {name: options.work / f"out-extract-{name}" for name in ("ours", "mergekit")}
    ours = [*OURS, "extract", str(base), str(tuned), "-o", str(out["ours"])]
    ours += ["--rank", str(RANK), "--device", "cpu", "--json"]
    found = [Contender("lorasurgery", ours, out["ours"], options.runs, look=look), torch_alone(options.runs)]
    if "mergekit" not in options.without and (place := environment("mergekit", options.environments)):
        command = [str(place / "mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(base)]
        command += ["--out-path", str(out["mergekit"]), "--max-rank", str(RANK)]
        # it may fail with a network error after everything is written
        found.append(Contender("mergekit", command, out["mergekit"], options.peer_runs, look=look, tolerant=True))
    rows = interleave(found, options.logs, keep=options.keep)
    return {"shape": vars(shape), "bytes": folder_bytes(base), "rank": RANK, "rows": rows}


def render(result: dict[str, Any]) -> list[str]:
    """Write the size, the table and the ratio of the errors."""
    s, rows = result["shape"], result["rows"]
    extra = [("error of ΔW", "error", ".5f"), ("adapter MB", "adapter", ",.1f")]
    lines = [
        f"Hidden {s['hidden']}, inner {s['inner']}, {s['layers']} layers, vocabulary {s['vocab']}: two checkpoints of "
        f"{result['bytes'] / 1e9:.2f} GB, rank {result['rank']}.",
        "",
        *page.contenders(rows, extra),
        "",
        page.beyond_start(rows, 2 * result["bytes"]),
    ]
    errors = [r["error"] for r in rows if "error" in r]
    return lines + [f"Our error is {errors[0] / errors[1]:.5f} times mergekit's."] * (len(errors) == 2)
