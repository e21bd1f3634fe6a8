"""Publish an adapter and use it as anybody would: plan, extract --push, merge and load, straight from the Hub.

    python examples/publish.py                          # a local Hub on 127.0.0.1; nothing leaves this machine
    python examples/publish.py --repo me/minilm-docs    # the real one, with the login of `hf auth login`

On the real one it creates three private repositories: me/minilm-docs, me/minilm-docs-base and me/minilm-docs-tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from common import arguments, cli, held_out, load_model, models, verdict
from local_hub import LocalHub
from minilm_finetune import docstring_pairs, embed_pairs
from torch import Tensor, nn
from transformers import AutoTokenizer

Env = Mapping[str, str]


@dataclass(frozen=True)
class Names:
    """The repositories of this example."""

    base: str = "me/base"
    tuned: str = "me/tuned"
    adapter: str = "me/adapter"


def main() -> int:
    """Run the example; the exit status says whether its sanity bounds hold."""
    parser = arguments(__doc__)
    parser.add_argument("--repo", help="publish on the real Hub, as ORG/NAME")
    parser.add_argument("--as-reader", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_reader:
        print(json.dumps(read(*args.as_reader)))
        return 0
    base, tuned = models(args.work, args.quick)
    work = args.work / "publish"
    shutil.rmtree(work, ignore_errors=True)
    if args.repo:
        names = Names(f"{args.repo}-base", f"{args.repo}-tuned", args.repo)
        return publish(names, base, tuned, work, os.environ | {"HF_HUB_OFFLINE": "0"})
    with LocalHub(work / "hub") as hub:
        print(f"\nA local Hub, on this machine only:\n$ export HF_ENDPOINT={hub.url}")
        return publish(Names(), base, tuned, work, os.environ | hub.environment(), hub)


def publish(names: Names, base: Path, tuned: Path, work: Path, env: Env, hub: LocalHub | None = None) -> int:
    """Go from two local checkpoints to an adapter on the Hub, and back."""
    print("\nBoth models go to the Hub, each in one commit:")
    cli("push", base, names.base, "--private", env=env)
    commit = cli("push", tuned, names.tuned, "--private", env=env)["pushed"]["commit"]

    print("\nWhat would a LoRA take? For a model on the Hub, only headers are fetched:")
    bounds = plan(names.base, env, hub)

    print("\nFrom the Hub to the Hub, pinned to the tuned model's current commit:")
    source = f"{names.tuned}@{commit}"
    cli("extract", names.base, source, "-o", work / "adapter", "--push", names.adapter, "--private", env=env)

    print("\nAnyone with read access can merge it:")
    cli("merge", names.base, names.adapter, "-o", work / "merged", env=env)
    print("\nand load it, here in a process that knows only the names:")
    found = in_another_process(names, work / "merged", env)
    print("\nIts model card begins:\n")
    print("\n".join(f"  {line}".rstrip() for line in found["card"][:16]))
    print()
    return verdict({**bounds, "PEFT, lorasurgery.nn and the merged checkpoint agree to 1e-5": found["apart"] < 1e-5})


def plan(model: str, env: Env, hub: LocalHub | None) -> dict[str, bool]:
    """Plan, and count the requests; only the local Hub reports them."""
    if hub:
        hub.log.clear()
    whole = cli("plan", model, env=env)["totals"]["model_bytes"]
    if not hub:
        return {}
    fetched = sum(request.sent_bytes for request in hub.log)
    print(f"  fetched {fetched / 1e3:.0f} kB of {whole / 1e6:.1f} MB, in {len(hub.log)} requests")
    return {"a plan fetches less than 1% of the model": fetched < whole / 100}


def in_another_process(names: Names, merged: Path, env: Env) -> dict[str, Any]:
    """Run `read` in a process that knows only the names and the login."""
    command = [sys.executable, "-W", "ignore", __file__, "--as-reader", names.base, names.adapter, str(merged)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name, distance in found["distances"].items():
        print(f"  {distance:.1e} from the merged checkpoint at most, in embeddings of length 1: {name}")
    return found


def read(base: str, adapter: str, merged: str) -> dict[str, Any]:
    """Load a published adapter in two ways, and return their distances from the merged checkpoint.

    Args:
        base, adapter: Repositories on the Hub.
        merged: A local checkpoint.
    """
    from huggingface_hub import hf_hub_download
    from peft import PeftModel

    from lorasurgery.nn import load_adapter

    tokenizer, pairs = AutoTokenizer.from_pretrained(base), held_out(docstring_pairs(), quick=True)

    def embed(model: nn.Module) -> Tensor:
        return embed_pairs(model.eval(), tokenizer, pairs)

    expected = embed(load_model(merged))
    ways = {
        f'PeftModel.from_pretrained(model, "{adapter}")': PeftModel.from_pretrained(load_model(base), adapter),
        f'lorasurgery.nn.load_adapter(model, "{adapter}")': load_adapter(load_model(base), adapter),
    }
    distances = {name: float((embed(model) - expected).abs().max()) for name, model in ways.items()}
    card = Path(hf_hub_download(adapter, "README.md")).read_text()
    return {"distances": distances, "apart": max(distances.values()), "card": card.splitlines()}


if __name__ == "__main__":
    sys.exit(main())
