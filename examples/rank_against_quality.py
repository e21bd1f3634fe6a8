"""Which rank is enough? Size and error of adapters of many ranks, and their quality on held-out text.

    python examples/rank_against_quality.py

A fine-tune of all-MiniLM-L6-v2 is extracted at fixed ranks, at the lowest ranks that hold a share of the change's
energy (--energy), and within a share of the model's size (--budget), where all modules compete for the bytes. All
adapters are added to one model in memory and activated in turn. If matplotlib is installed, a picture is drawn too:
rank/rank-against-quality.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from common import Bench, arguments, cli, load_model, models, short, show, verdict

from lorasurgery.nn import load_adapter, set_adapter

RANKS = (2, 4, 8, 16, 32, 64, 128)
ENERGIES = (0.5, 0.8)
BUDGETS = (5, 20)  # per cent of the model
# Three of Okabe & Ito's colours, each with its own marker: nothing is distinguished by colour alone.
LOOKS = {"rank": ("#0072B2", "o", "-"), "energy": ("#D55E00", "s", ":"), "budget": ("#009E73", "^", "--")}

Row = dict[str, Any]

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def main() -> int:
    """Run the example; the exit status says whether its sanity bounds hold."""
    args = arguments(__doc__).parse_args()
    base, tuned = models(args.work, args.quick)
    rows = extract_all(args.work / "rank", base, tuned, args.quick)
    bench = Bench(tuned, args.quick)
    score(rows, bench, base)
    ends = {"base": bench.score(bench.embed(load_model(base))), "tuned": bench.score(bench.reference)}
    show_rows(rows, ends)
    draw(rows, ends, args.work / "rank/rank-against-quality.svg")
    return check(rows)


def extract_all(work: Path, base: Path, tuned: Path, quick: bool) -> list[Row]:
    """Extract one adapter for each choice of ranks, with the report of each."""
    ranks, energies, budgets = ((4, 16), (0.3,), (2,)) if quick else (RANKS, ENERGIES, BUDGETS)
    print("\nThe same rank in every module:")
    rows = [extract_one(work, base, tuned, "rank", str(rank)) for rank in ranks]
    print("\nThe lowest rank of each module that holds a share of its ‖ΔW‖²:")
    rows += [extract_one(work, base, tuned, "energy", str(share)) for share in energies]
    print("\nA share of the model's bytes, spent where they are worth most:")
    whole = (base / "model.safetensors").stat().st_size
    for percent in budgets:
        rows.append(extract_one(work, base, tuned, "budget", f"{percent}%") | {"most": whole * percent / 100})
    return rows


def extract_one(work: Path, base: Path, tuned: Path, kind: str, value: str) -> Row:
    """Extract with one choice of ranks."""
    adapter = work / f"{kind}-{value.replace('.', '_').rstrip('%')}"  # also the adapter's name in memory
    totals = cli("extract", base, tuned, "-o", adapter, f"--{kind}", value, "--overwrite")["totals"]
    return {
        "kind": kind, "value": value, "adapter": adapter, "error": totals["error"], "energy": totals["energy"],
        "ranks": (totals["rank_min"], totals["rank_max"]), "share": totals["size_ratio"],
        "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
    }  # fmt: skip


def score(rows: list[Row], bench: Bench, base: Path) -> None:
    """Add every adapter to one model, and score each on the held-out text."""
    model = load_model(base)
    for row in rows:
        load_adapter(model, row["adapter"], row["adapter"].name)
    for row in rows:
        set_adapter(model, row["adapter"].name)
        row |= bench.score(bench.embed(model))


def show_rows(rows: list[Row], ends: dict[str, dict[str, float]]) -> None:
    """Print all choices, between base and tuned model."""

    def quality(found: dict[str, Any]) -> list[str]:
        return [f"{found['mean']:.5f}", f"{found['top1']:.1%}"]

    lines = [["base", *[""] * 4, *quality(ends["base"])]]
    for row in rows:
        ranks = "–".join(str(rank) for rank in row["ranks"]) if row["kind"] != "rank" else row["value"]
        sizes = [f"{row['bytes'] / 1e6:.2f} MB", f"{row['share']:.1%}", f"{row['error']:.1%}"]
        lines.append([f"--{row['kind']} {row['value']}", ranks, *sizes, *quality(row)])
    lines.append(["tuned", *[""] * 4, *quality(ends["tuned"])])
    show(
        "adapter size against quality on held-out docstrings",
        ("", "ranks", "adapter", "of model", "error of ΔW", "cosine to tuned", "top-1"),
        lines,
    )


def draw(rows: list[Row], ends: dict[str, dict[str, float]], file: Path) -> None:
    """Draw error, distance and top-1 against size, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        print("no picture without matplotlib: pip install 'lorasurgery[plot]'")
        return
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    error, distance, top1 = figure.subplots(1, 3)
    for ax, title, values in (
        (error, "error of ΔW", [row["error"] for row in rows]),
        (distance, "1 − cosine to the tuned model", [1 - row["mean"] for row in rows]),
        (top1, "right docstring found", [row["top1"] for row in rows]),
    ):
        curves(ax, rows, values)
        ax.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    error.set_ylim(0, 1)
    top1.margins(y=0.1)
    distance.set_yscale("log")
    mark(distance, "base", 1 - ends["base"]["mean"])
    mark(top1, "base", ends["base"]["top1"])
    mark(top1, "tuned", ends["tuned"]["top1"])
    for ax in (error, top1):
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file)
    print("drawn:", short(file))


def curves(ax: Axes, rows: list[Row], values: list[float]) -> None:
    """Draw one curve over size for each way to choose ranks; the fixed ranks are on the upper axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    points = [(row["kind"], row["bytes"] / 1e6, value) for row, value in zip(rows, values, strict=True)]
    for kind, (colour, shape, line) in LOOKS.items():
        found = [(x, y) for k, x, y in points if k == kind]
        ax.plot(*zip(*found, strict=True), color=colour, marker=shape, linestyle=line, label=f"--{kind}")
    ax.set(xscale="log", xlabel="adapter, MB")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25)
    ax.spines["right"].set_visible(False)
    above = ax.secondary_xaxis("top")
    above.set_xticks([x for k, x, _ in points if k == "rank"], [r["value"] for r in rows if r["kind"] == "rank"])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("fixed rank")


def mark(ax: Axes, name: str, height: float) -> None:
    """Draw a line for a whole model, with its name next to the plot, where there is no curve."""
    ax.axhline(height, color="#6b6b6b", linewidth=1)
    ax.annotate(name, (1.01, height), xycoords=("axes fraction", "data"), color="#6b6b6b", va="center")


def check(rows: list[Row]) -> int:
    """Check the sanity bounds."""
    fixed = [row for row in rows if row["kind"] == "rank"]
    errors, cosines = [row["error"] for row in fixed], [row["mean"] for row in fixed]
    shares = [row for row in rows if row["kind"] == "energy"]
    budgets = [row for row in rows if row["kind"] == "budget"]
    return verdict({
        "error falls and cosine rises with rank": errors == sorted(errors, reverse=True) and cosines == sorted(cosines),
        "--energy keeps the requested share": all(row["energy"] >= float(row["value"]) for row in shares),
        "--budget is not exceeded": all(row["bytes"] <= row["most"] for row in budgets),
        "--budget has no more error than a fixed rank of the same size": all(
            budget["error"] <= row["error"] for budget in budgets for row in fixed if row["bytes"] <= budget["bytes"]
        ),
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
