"""Models of 70B to 700B parameters, their headers real and their data holes: plans, memory, shares of the work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="neither sparse files nor peak memory as here")

Shapes = dict[str, tuple[int, ...]]
MB = 10**6
RANK = 16


def llama(hidden: int, inner: int, layers: int, heads: int, vocab: int = 128256) -> Shapes:
    """A Llama 3 with 8 key-value heads of 128, in the order of its layers."""
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        stem = f"model.layers.{i}"
        wide, narrow = (heads * 128, hidden), (8 * 128, hidden)
        found |= {f"{stem}.self_attn.{m}_proj.weight": s for m, s in zip("qkv", (wide, narrow, narrow), strict=True)}
        found |= {f"{stem}.self_attn.o_proj.weight": (hidden, heads * 128)}
        found |= {f"{stem}.mlp.{m}_proj.weight": (inner, hidden) for m in ("gate", "up")}
        found |= {f"{stem}.mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{stem}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def deepseek() -> Shapes:
    """DeepSeek-V3 in bfloat16: 61 layers, of which the first three are dense, the others 256 experts and a shared one."""
    hidden, heads, vocab = 7168, 128, 129280
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(61):
        stem = f"model.layers.{i}"
        attention = {
            "q_a_proj": (1536, hidden), "q_a_layernorm": (1536,), "q_b_proj": (heads * 192, 1536),
            "kv_a_proj_with_mqa": (576, hidden), "kv_a_layernorm": (512,), "kv_b_proj": (heads * 256, 512),
            "o_proj": (hidden, heads * 128),
        }  # fmt: skip
        found |= {f"{stem}.self_attn.{m}.weight": s for m, s in attention.items()}
        found |= {f"{stem}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if i < 3:
            found |= _gated(f"{stem}.mlp", hidden, 18432)
            continue
        found |= {f"{stem}.mlp.gate.weight": (256, hidden), f"{stem}.mlp.gate.e_score_correction_bias": (256,)}
        found |= _gated(f"{stem}.mlp.shared_experts", hidden, 2048)
        for expert in range(256):
            found |= _gated(f"{stem}.mlp.experts.{expert}", hidden, 2048)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _gated(stem: str, hidden: int, inner: int) -> Shapes:
    found: Shapes = {f"{stem}.{m}_proj.weight": (inner, hidden) for m in ("gate", "up")}
    return found | {f"{stem}.down_proj.weight": (hidden, inner)}


@dataclass(frozen=True)
class Model:
    """A model's tensors, its type, and what is known of it: its parameters, how many shards of which size it has."""

    shapes: Callable[[], Shapes]
    kind: str
    parameters: int
    shards: range
    limit: int = 5_000_000_000


MODELS = {
    "70B": Model(lambda: llama(8192, 28672, 80, 64), "llama", 70_553_706_496, range(25, 41)),
    "405B": Model(lambda: llama(16384, 53248, 126, 128), "llama", 405_853_388_800, range(150, 201)),
    "671B": Model(deepseek, "deepseek_v3", 671_026_419_200, range(150, 171), 8_600_000_000),
}


@cache
def shapes_of(name: str) -> Shapes:
    """A model's tensors, made once."""
    return MODELS[name].shapes()


def header(shapes: Shapes) -> bytes:
    """The first bytes of a safetensors file of bfloat16 tensors."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hole(path: Path, shapes: Shapes) -> None:
    """A file with its header and its length, which takes no room for what it doesn't hold."""
    with path.open("wb") as file:
        file.truncate(file.write(header(shapes)) + 2 * sum(map(prod, shapes.values())))


def sharded(shapes: Shapes, limit: int) -> Iterator[Shapes]:
    """The tensors by shard, none larger than the limit."""
    group, size = {}, 0
    for name, shape in shapes.items():
        if size + 2 * prod(shape) > limit:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += 2 * prod(shape)
    yield group


def checkpoint(folder: Path, name: str) -> Path:
    """A model's folder: shards, index and config."""
    folder.mkdir(parents=True)
    model, index = MODELS[name], {}
    shards = list(sharded(shapes_of(name), model.limit))
    for i, shapes in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        hole(folder / file, shapes)
        index |= dict.fromkeys(shapes, file)
    total = {"total_size": 2 * model.parameters}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": model.kind, "tie_word_embeddings": False}))
    return folder


def matrices(name: str) -> Shapes:
    """Module -> (out, in) of every matrix of the layers but routers, each expert's by itself."""
    found = {n.removesuffix(".weight"): s for n, s in shapes_of(name).items() if ".layers." in n and len(s) == 2}
    return {n: s for n, s in found.items() if not n.endswith("mlp.gate")}


def adapter(folder: Path, name: str) -> Path:
    """A PEFT adapter of rank 16 on every matrix of the layers, experts by the parameters that hold them in memory."""
    folder.mkdir(parents=True)
    factors: Shapes = {}
    fused: Shapes = {}
    for path, (out, into) in matrices(name).items():
        stem, leaf = path.rpartition(".")[::2]
        if ".experts." not in path:
            factors |= {f"{path}.lora_A.weight": (RANK, into), f"{path}.lora_B.weight": (out, RANK)}
        elif leaf != "up_proj" and stem.endswith(".0"):
            fused[f"{stem[:-2]}.{leaf.replace('gate_proj', 'gate_up_proj')}"] = (
                2 * out if leaf == "gate_proj" else out,
                into,
            )
    for path, (out, into) in fused.items():  # PEFT wraps one parameter in the other's wrapper
        place = path.rpartition(".")[0] + (".base_layer" if path.endswith("gate_up_proj") else "")
        factors |= {f"{place}.lora_A.weight": (256 * RANK, into), f"{place}.lora_B.weight": (out, 256 * RANK)}
    hole(folder / "adapter_model.safetensors", {f"base_model.model.{n}": s for n, s in factors.items()})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    if fused:
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model's checkpoint and adapter, made once."""
    root = tmp_path_factory.mktemp("scale")

    def made(name: str) -> tuple[Path, Path]:
        if not (root / name).exists():
            checkpoint(root / name / "base", name)
            adapter(root / name / "adapter", name)
        return root / name / "base", root / name / "adapter"

    return made


_SMALL = (
    "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"  # a child starts with its parent's peak
)
_BEGIN = """
import json, resource, sys
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def alone(code: str, *arguments: object) -> Any:
    """What code prints as JSON in a small process of its own, where `peak()` is its memory at most."""
    command = [sys.executable, "-S", "-c", _SMALL, sys.executable, "-c", _BEGIN + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_the_models_are_what_they_stand_for(name: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    """The stand-ins have the published number of parameters, shards as on the Hub, and take no room on the disk."""
    folder, _ = folders(name)
    files = sorted(folder.glob("*.safetensors"))
    assert sum(map(prod, shapes_of(name).values())) == MODELS[name].parameters
    assert len(files) in MODELS[name].shards
    assert sum(f.stat().st_size for f in files) > 2 * MODELS[name].parameters
    assert sum(f.stat().st_blocks for f in files) * 512 < 50 * MB


_PLANS = """
from lorasurgery import ExtractOptions, RankChoice, extract, merge, plan
base, adapter, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = {"merge": merge(base, [adapter], "never", dry_run=True).totals, "plan": plan(base, rank).totals}
report = extract(base, base, "never", ExtractOptions(RankChoice(rank=rank)), dry_run=True)
found["extract"], found["matrices"] = report.totals, len(report.modules)
print(json.dumps(found | {"peak": peak(), "torch": "torch" in sys.modules}))
"""


@pytest.mark.parametrize("name", MODELS)
def test_plans_from_headers_alone(name: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    """merge --dry-run, plan and extract --dry-run count tensors, parameters and bytes right, in 300 MB without torch."""
    base, lora = folders(name)
    shapes, layers = shapes_of(name), matrices(name)
    found = alone(_PLANS, base, lora, RANK)

    merged = found["merge"]
    assert merged["tensors"] == len(shapes)
    assert merged["tensors_touched"] == len(layers)
    assert merged["adapter_tensors_unmatched"] == 0
    assert merged["output_bytes"] == 2 * MODELS[name].parameters
    assert len(merged["files"]) in MODELS[name].shards

    factored = layers | {"lm_head": shapes["lm_head.weight"]}  # gate and up of an expert share what they read
    factors = sum(RANK * (m + n) for path, (m, n) in layers.items() if ".experts." not in path)
    experts = {p: s for p, s in layers.items() if ".experts." in p}
    factors += sum(
        RANK * (2 * m + n if p.endswith("gate_proj") else m + n)
        for p, (m, n) in experts.items()
        if not p.endswith("up_proj")
    )
    planned = found["plan"]
    assert planned["model_parameters"] == MODELS[name].parameters
    assert planned["model_bytes"] == 2 * MODELS[name].parameters
    assert planned["parameters"] == factors
    assert planned["all_parameters"] == MODELS[name].parameters + factors
    assert planned["adapter_bytes"] == 2 * factors
    assert planned["targeted_parameters"] == sum(map(prod, layers.values()))

    outside = RANK * sum(2 * sum(shapes[f"{n}.weight"]) for n in ("lm_head",)) // 2
    outside += RANK * sum(shapes["model.embed_tokens.weight"])
    assert found["matrices"] == len(factored) + 1
    assert found["extract"]["parameters_at_most"] == factors + outside
    assert found["extract"]["model_bytes"] == 2 * MODELS[name].parameters
    assert sum(found["extract"]["tensors"].values()) == len(shapes)

    assert found["peak"] < 300 * MB
    assert not found["torch"]
