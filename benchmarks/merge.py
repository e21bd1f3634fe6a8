"""merge against a copy of the files, a plain read, PEFT, mergekit and axolotl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.environments import environment
from benchmarks.errors import merge_error
from benchmarks.measure import OURS, Contender, Row, interleave, torch_alone
from benchmarks.options import Options
from benchmarks.pair import make_pair
from benchmarks.streams import folder_bytes

NAME, TITLE = "merge", "Merge"
TAKES = "10 to 40 minutes, most of it for PEFT, mergekit and axolotl"
METHOD = """A rank-16 adapter of all linear layers goes into a Llama-shaped bfloat16 checkpoint in shards of at most
2 GB. Limits: `cp` of the files without sharing blocks, then fsync of each; and reading them once, 16 MB at a time.
*PEFT*: `AutoModelForCausalLM.from_pretrained` in bfloat16, `merge_and_unload`, `save_pretrained`. *mergekit*:
`mergekit-yaml`, `passthrough` of `base+adapter`. *axolotl*: `merge_lora_sharded_efficient`, the function behind its
memory-efficient `merge-lora`, called directly on the CPU; its command line needs 58 packages
(bitsandbytes, triton and xformers among them), its function only torch, peft, transformers and accelerate.

Error: over the elements of a few modules spread over the layers, against the result of float64 rounded once to
bfloat16: the share that differs, the largest deviation, and the norm of all deviations beside that of the result."""
RANK = 16
AXOLOTL = (
    "import sys; from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient as merge; "
    "merge(sys.argv[1], sys.argv[2], sys.argv[3], device='cpu')"
)


def measure(options: Options) -> dict[str, Any]:
    """Make the checkpoint and the adapter, run all interleaved, and compare their output."""
    shape = options.shape(10)
    base, _ = make_pair(options.work, shape, tuned=False)
    adapter = options.adapter(shape, RANK)
    rows = interleave(contenders(options, base, adapter), options.logs, keep=options.keep)
    return {"shape": vars(shape), "bytes": folder_bytes(base), "rank": RANK, "rows": rows}


def contenders(options: Options, base: Path, adapter: Path) -> list[Contender]:
    """Return ours, the limits, and the peers that can be installed."""

    def look(out: Path) -> Row:
        return merge_error(base, adapter, out)

    out = {name: options.work / f"out-merge-{name}" for name in ("ours", "cp", "peft", "mergekit", "axolotl")}
    limits = [sys.executable, "-m", "benchmarks.limits"]
    ours = [*OURS, "merge", str(base), str(adapter), "-o", str(out["ours"]), "--device", "cpu", "--json"]
    found = [
        Contender("lorasurgery", ours, out["ours"], options.runs, look=look),
        torch_alone(options.runs),
        Contender("cp + fsync", [*limits, "copy", str(base), str(out["cp"])], out["cp"], options.runs),
        Contender("plain read", [*limits, "read", str(base)], None, options.runs),
    ]
    peft = [sys.executable, "-m", "benchmarks.peers", "merge", str(base), str(adapter), str(out["peft"])]
    if "peft" not in options.without:
        found.append(Contender("PEFT", peft, out["peft"], options.peer_runs, look=look))
    if "mergekit" not in options.without and (place := environment("mergekit", options.environments)):
        command, cache = _mergekit(place, base, adapter, out["mergekit"], options.work)
        found.append(Contender("mergekit", command, out["mergekit"], options.peer_runs, scratch=(cache,), look=look))
    if "axolotl" not in options.without and (place := environment("axolotl", options.environments)):
        command = [str(place / "python"), "-c", AXOLOTL, str(base), str(adapter), str(out["axolotl"])]
        found.append(Contender("axolotl", command, out["axolotl"], options.peer_runs, look=look))
    return found


def _mergekit(place: Path, base: Path, adapter: Path, out: Path, work: Path) -> tuple[list[str], Path]:
    """Write its configuration and return its command and the folder of its intermediate merged model."""
    recipe, cache = work / "mergekit.yml", work / "mergekit-merged"
    lines = ["merge_method: passthrough", "dtype: bfloat16", "models:", f"  - model: {base}+{adapter}"]
    recipe.write_text("\n".join(lines) + "\n")
    command = [str(place / "mergekit-yaml"), str(recipe), str(out), "--lora-merge-cache", str(cache)]
    return [*command, "--lora-merge-dtype", "bfloat16", "--no-copy-tokenizer", "--quiet"], cache


def render(result: dict[str, Any]) -> list[str]:
    """Write the size, the table, and what the limits mean."""
    s, rows = result["shape"], result["rows"]
    extra = [("differ", "differ", ".4%"), ("largest", "max", ".2e"), ("relative", "relative", ".2e")]
    return [
        f"Hidden {s['hidden']}, inner {s['inner']}, {s['layers']} layers, vocabulary {s['vocab']}: "
        f"{result['bytes'] / 1e9:.2f} GB, rank {result['rank']}.",
        "",
        *page.contenders(rows, extra),
        "",
        page.beyond_start(rows, result["bytes"]),
    ]
