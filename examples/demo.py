"""The main workflow on real weights: fine-tune MiniLM, extract LoRAs from its update, merge, compare, undo.

    make demo                                   # or: python examples/demo.py
    python examples/demo.py --quick --work /tmp/demo

Everything it makes goes to .demo/ in the checkout; a second run reuses it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import Bench, arguments, cli, load_model, models, short, show, verdict
from peft import PeftModel
from safetensors.torch import load_file


def main() -> int:
    """Run the demo; the exit status says whether its sanity bounds hold."""
    args = arguments(__doc__, long=True).parse_args()
    base, tuned = models(args.work, args.quick, long=True)
    bench = Bench(tuned, args.quick)
    rows = [row_of_model(bench, "base", base)]
    for rank in (4, 64) if args.quick else (4, 8, 16, 32, 64, 128):
        rows.append(one_rank(bench, base, tuned, rank))
    rows.append(row_of_model(bench, "tuned", tuned))
    show_rows(rows)
    last = rows[-2]
    undo(args.work, base, Path(last["merged"]), Path(last["adapter"]))
    status = check(rows)
    whats_next(base, tuned)
    return status


def row_of_model(bench: Bench, name: str, path: Path) -> dict[str, Any]:
    """Score how near a whole checkpoint is to the tuned model."""
    return {"name": name, **bench.score(bench.embed(load_model(path)))}


def one_rank(bench: Bench, base: Path, tuned: Path, rank: int) -> dict[str, Any]:
    """Extract, merge and compare from the command line, and compare base + adapter as PEFT runs it, unmerged."""
    adapter, merged = base.with_name(f"adapter-r{rank}"), base.with_name(f"merged-r{rank}")
    totals = cli("extract", base, tuned, "-o", adapter, "--rank", str(rank), "--overwrite")["totals"]
    cli("merge", base, adapter, "-o", merged, "--overwrite")
    peft = bench.score(bench.embed(PeftModel.from_pretrained(load_model(base), adapter)))
    return row_of_model(bench, f"rank {rank}", merged) | {
        "size": totals["adapter_bytes"], "share": totals["size_ratio"], "error": totals["error"],
        "peft": peft["mean"], "adapter": str(adapter), "merged": str(merged),
    }  # fmt: skip


def undo(work: Path, base: Path, merged: Path, adapter: Path) -> None:
    """Remove the adapter again and say how far the result is from the base."""
    restored = work / "restored"
    cli("unmerge", merged, adapter, "-o", restored, "--base", base, "--overwrite")
    before, after = load_file(base / "model.safetensors"), load_file(restored / "model.safetensors")
    far = max(float((after[n].double() - w.double()).abs().max()) for n, w in before.items())
    same = sum(int((after[n] == w).sum()) for n, w in before.items()) / sum(w.numel() for w in before.values())
    print(f"unmerged: {same:.1%} of all values equal the base's to the bit, the largest difference is {far:.1e}\n")


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table: rank, adapter size, error, and how near each model is to the tuned one."""
    columns = ("", "adapter", "of model", "error of ΔW", "cosine, merged", "least", "cosine, base+PEFT", "top-1")
    lines = []
    for row in rows:
        sizes = (
            [f"{row['size'] / 1e6:.2f} MB", f"{row['share']:.1%}", f"{row['error']:.1%}"] if "size" in row else [""] * 3
        )
        peft = f"{row['peft']:.5f}" if "peft" in row else ""
        lines.append([row["name"], *sizes, f"{row['mean']:.5f}", f"{row['min']:.5f}", peft, f"{row['top1']:.1%}"])
    show("held-out sentences, against the fine-tuned model", columns, lines)


def whats_next(base: Path, tuned: Path) -> None:
    """Print commands to paste."""
    b, t, out = short(base), short(tuned), short(base.parent)
    print(
        "\nTry next:\n"
        f"  lorasurgery extract {b} {t} -o {out}/by-energy --energy 0.9            # the lowest rank for 90%\n"
        f"  lorasurgery extract {b} {t} -o {out}/attention --target attention --rank 16 -v\n"
        f"  lorasurgery merge {b} {out}/adapter-r64 -w 0.5 -o {out}/half            # half the fine-tune\n"
        f"  lorasurgery merge {b} {out}/adapter-r64 -o {out}/bf16 --dtype bfloat16  # see what rounding costs"
    )


def check(rows: list[dict[str, Any]]) -> int:
    """Check the sanity bounds; a demo that shows nonsense must fail."""
    ranks = [r for r in rows if "peft" in r]
    return verdict({
        "a higher rank comes nearer to the tuned model": ranks[0]["mean"] < ranks[-1]["mean"] > 0.99,
        "base + PEFT and the merged checkpoint agree": all(abs(r["peft"] - r["mean"]) < 1e-4 for r in ranks),
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
