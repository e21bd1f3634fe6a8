"""Two skills of one model: extract both, check for conflicts, blend them, and switch between them in memory.

    python examples/blend_and_switch.py

Skill a finds a docstring by its function's name. Skill b finds a character's name by its HTML entity (`lArr`:
"leftwards double arrow"). Each is a fine-tune of all weights of all-MiniLM-L6-v2, made here on a CPU. The same weighted
sum is then made in three ways that must agree: a blended adapter, a merged checkpoint, and weights set in memory.
"""

from __future__ import annotations

import html.entities
import sys
import unicodedata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import Pairs, arguments, cli, held_out, load_model, models, show, tuned_model, verdict
from minilm_finetune import Schedule, docstring_pairs, embed_pairs, top1
from torch import Tensor, nn
from transformers import AutoTokenizer

from lorasurgery.nn import load_adapter, merge, set_adapter, unmerge

WEIGHTS = {"a": 0.7, "b": 0.3}
AWAY = {"a": 1.0, "b": -0.5}
LONG = Schedule(steps=40, rate=2e-4)


def main() -> int:
    """Run the example; the exit status says whether its sanity bounds hold."""
    args = arguments(__doc__).parse_args()
    work = args.work / "blend"
    base, tuned_a = models(args.work, args.quick)
    tuned_b = tuned_model(args.work, "tuned-entities", entity_pairs(), LONG, args.quick)

    files = extract_and_blend(work, base, {"a": tuned_a, "b": tuned_b}, "8" if args.quick else "64")
    exam = Exam(base, args.quick)
    model = load_model(base)
    for name in ("a", "b"):
        load_adapter(model, work / name, name)
    scores = score_all(exam, model, {"base": base, "tuned a": tuned_a, "tuned b": tuned_b})
    bounds = agreement(exam, model, base, files)
    return verdict({**bounds, **effects(scores, args.quick)})


def entity_pairs() -> Pairs:
    """Return (longest HTML entity of a character, its Unicode name): ("hookleftarrow", "leftwards …")."""
    found: dict[str, str] = {}
    for entity, characters in sorted(html.entities.html5.items()):
        name = unicodedata.name(characters, "").lower() if len(characters) == 1 else ""
        label = entity.rstrip(";")
        if name and len(label) > len(found.get(name, "")):
            found[name] = label
    return [(label, name) for name, label in found.items()]


def extract_and_blend(work: Path, base: Path, tuned: dict[str, Path], rank: str) -> dict[str, Path]:
    """Run the commands: two adapters, their comparison, two blends, and one merged checkpoint.

    Norms and biases are left out (--full none): an adapter replaces them whole, so two of them can't be summed exactly.
    """
    a, b = work / "a", work / "b"
    print("\nOne adapter for each skill, matrices only, so that their sums are exact:")
    for name, model in tuned.items():
        cli("extract", base, model, "-o", work / name, "--rank", rank, "--full", "none", "--overwrite")
    print("\nDo they conflict? −1 would mean that one undoes the other.")
    cli("diff", a, b)
    print("\nBoth at once, as an adapter and as a checkpoint; then a with less of b, by a negative weight:")
    files = {name: work / name for name in ("blend", "away", "merged")}
    cli("blend", a, b, *options(WEIGHTS), "-o", files["blend"], "--overwrite")
    cli("blend", a, b, *options(AWAY), "-o", files["away"], "--overwrite")
    cli("merge", base, a, b, *options(WEIGHTS), "-o", files["merged"], "--overwrite")
    return files


def options(active: dict[str, float]) -> list[str]:
    """Return weights as command-line options."""
    return [word for weight in active.values() for word in ("-w", str(weight))]


class Exam:
    """Held-out questions of both kinds."""

    def __init__(self, base: Path, quick: bool) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.pairs = {"a": held_out(docstring_pairs(), quick), "b": held_out(entity_pairs(), quick)}

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return the share of right answers for each skill."""
        return {skill: top1(embed_pairs(model.eval(), self.tokenizer, pairs)) for skill, pairs in self.pairs.items()}

    def sample(self, model: nn.Module) -> Tensor:
        """Return embeddings (2, n, 384) of a few docstrings, enough to tell two models apart."""
        return embed_pairs(model.eval(), self.tokenizer, self.pairs["a"][:32])


def score_all(exam: Exam, model: nn.Module, checkpoints: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Print the scores of whole checkpoints, and of one model in memory as it switches between adapters."""
    scores = {name: exam.score(load_model(path)) for name, path in checkpoints.items()}
    switches: list[Any] = ["a", "b", WEIGHTS, {"a": 1.0, "b": 1.0}, AWAY]
    for active in switches:
        set_adapter(model, active)
        label = active if isinstance(active, str) else " ".join(f"{w:+g}·{n}" for n, w in active.items())
        scores[f"in memory: {label}"] = exam.score(model)
    lines = [[name, *(f"{share:.1%}" for share in found.values())] for name, found in scores.items()]
    show("held-out questions answered right", ("", "a: docstrings", "b: characters"), lines)
    return scores


def agreement(exam: Exam, model: nn.Module, base: Path, files: dict[str, Path]) -> dict[str, bool]:
    """Compare the ways to make the same sum, by the embeddings of held-out text."""
    merged = load_model(files["merged"])
    set_adapter(model, WEIGHTS)
    there = exam.sample(model)
    in_memory = merged_in_memory(exam, model, base, merged)
    apart = {
        "the blended file": farthest(exam.sample(with_adapter(base, files["blend"])), there),
        "the merged checkpoint": farthest(exam.sample(merged), there),
        "merge(model)": farthest(in_memory["sample"], there),
    }
    set_adapter(model, AWAY)
    other = with_adapter(base, files["away"])
    apart["the file with a negative weight"] = farthest(exam.sample(other), exam.sample(model))
    print("Largest distance from the weights set in memory, in embeddings of length 1:")
    for name, distance in apart.items():
        print(f"  {distance:.1e}  {name}")
    return {
        "memory, blended files and merged checkpoint agree to 1e-5": max(apart.values()) < 1e-5,
        "merge(model) has the merged checkpoint's weights to 1e-6": in_memory["apart"] < 1e-6,
        "unmerge(model) restores every bit": in_memory["restored"],
    }


def with_adapter(base: Path, adapter: Path) -> nn.Module:
    """Return a fresh model with one adapter on it."""
    return load_adapter(load_model(base), adapter)


def farthest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two values."""
    return float((a - b).abs().max())


def merged_in_memory(exam: Exam, model: nn.Module, base: Path, file: nn.Module) -> dict[str, Any]:
    """Merge and unmerge: the embeddings in between, the distance from the merged file, and whether all is restored."""
    merge(model)
    sample, weights = exam.sample(model), own_tensors(model)
    apart = max(farthest(weights[name], tensor) for name, tensor in file.state_dict().items())
    unmerge(model)
    restored, before = own_tensors(model), load_model(base).state_dict()
    same = all(torch.equal(restored[name], tensor) for name, tensor in before.items())
    return {"sample": sample, "apart": apart, "restored": same}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors under the names they had before adapters were added."""
    return {name.replace(".original.", "."): tensor.clone() for name, tensor in model.state_dict().items()}


def effects(scores: dict[str, dict[str, float]], quick: bool) -> dict[str, bool]:
    """Return the bounds on the held-out scores, which need more than a few steps of training."""
    base, a, b, both = (scores[name] for name in ("base", "in memory: a", "in memory: b", "in memory: +1·a +1·b"))
    if quick:
        return {}
    return {
        "each adapter is better than the base at its own skill": a["a"] > base["a"] and b["b"] > base["b"],
        "the sum of both is better than the base at both": both["a"] > base["a"] and both["b"] > base["b"],
    }


if __name__ == "__main__":
    sys.exit(main())
