"""Models of 70B to 700B parameters, their headers real and their data holes: plans, memory, shares of the work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.plan import PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.ranks import Ranks
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.extraction.pairs import group_experts, plan_pairs
from lorasurgery.ops.merging.recipe import Recipe, plan_files
from lorasurgery.ops.merging.stream import _share
from lorasurgery.ops.placement.block_weight import weighed_plan

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="neither sparse files nor peak memory as here")

Shapes = dict[str, tuple[int, ...]]
Array = np.ndarray[Any, Any]
MB = 10**6
RANK = 16
SIZES = (2, 8, 64)  # of a job, in ranks
WEIGHTS = "adapter_model.safetensors"


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
            both = leaf == "gate_proj"  # gate and up are one parameter
            fused[f"{stem[:-2]}.{'gate_up_proj' if both else leaf}"] = (2 * out if both else out, into)
    for path, (out, into) in fused.items():  # PEFT wraps one parameter in the other's wrapper
        place = path.rpartition(".")[0] + (".base_layer" if path.endswith("gate_up_proj") else "")
        factors |= {f"{place}.lora_A.weight": (256 * RANK, into), f"{place}.lora_B.weight": (out, 256 * RANK)}
    hole(folder / WEIGHTS, {f"base_model.model.{n}": s for n, s in factors.items()})
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


# A child starts with its parent's peak, so a small process of its own starts it.
_SMALL = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
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
    """merge --dry-run, plan and extract --dry-run count tensors, parameters and bytes right, in 300 MB without torch.

    All three take seconds for 45,000 tensors; minutes would mean that all of them are looked at for each of them.
    """
    base, lora = folders(name)
    shapes, layers = shapes_of(name), matrices(name)
    found = alone(_PLANS, base, lora, RANK)

    merged = found["merge"]
    assert merged["tensors"] == len(shapes)
    assert merged["tensors_touched"] == len(layers)
    assert merged["adapter_tensors_unmatched"] == 0
    assert merged["output_bytes"] == 2 * MODELS[name].parameters
    assert len(merged["files"]) in MODELS[name].shards

    factors = sum(RANK * sum(shape) for shape in layers.values())  # an expert's gate and up share what they read
    factors -= sum(RANK * n for path, (_, n) in layers.items() if ".experts." in path and path.endswith(".up_proj"))
    planned = found["plan"]
    assert planned["model_parameters"] == MODELS[name].parameters
    assert planned["model_bytes"] == 2 * MODELS[name].parameters
    assert planned["parameters"] == factors
    assert planned["all_parameters"] == MODELS[name].parameters + factors
    assert planned["adapter_bytes"] == 2 * factors
    assert planned["targeted_parameters"] == sum(map(prod, layers.values()))

    tables = [shapes["lm_head.weight"], shapes["model.embed_tokens.weight"]]
    assert found["matrices"] == len(layers) + len(tables)
    assert found["extract"]["parameters_at_most"] == factors + RANK * sum(map(sum, tables))
    assert found["extract"]["model_bytes"] == 2 * MODELS[name].parameters
    assert sum(found["extract"]["tensors"].values()) == len(shapes)

    assert found["peak"] < 300 * MB
    assert not found["torch"]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_merge_is_one_ranks(name: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    """Ranks share the output's shards, or its tensors where shards are too few: all, once, even to within a unit."""
    recipe = merging(*folders(name))
    for size in SIZES:
        whole = len(recipe.files) >= size
        assert whole == (name != "70B" or size < 64)
        units = [nbytes(f.tensors) if whole else max(t.nbytes for t in f.tensors) for f in recipe.files]
        given, sizes = shared(recipe, size, set())
        assert sorted(given) == sorted(shapes_of(name))
        _even(sizes, max(units))


def test_what_is_done_is_nobodys(folders: Callable[[str], tuple[Path, Path]]) -> None:
    """After an interruption the ranks share what is left, all of it and once, though it all lies in one half."""
    recipe = merging(*folders("405B"))
    names = list(shapes_of("405B"))
    given, sizes = shared(recipe, 8, set(names[: len(names) // 2]))
    assert sorted(given) == sorted(names[len(names) // 2 :])
    _even(sizes, max(nbytes(f.tensors) for f in recipe.files))


@pytest.mark.parametrize("name", MODELS)
def test_every_pair_of_an_extract_is_one_ranks(name: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    """Ranks share the matrices to be factored, all experts of a parameter as one: all, once, even to within a unit."""
    model = Checkpoint.open(folders(name)[0])
    costs = [p.nbytes for p in group_experts(plan_pairs(model, model, Selection()), model.config)]
    assert sum(costs) == 2 * MODELS[name].parameters
    for size in SIZES:
        found = [Ranks(r, size).mine(range(len(costs)), costs) for r in range(size)]
        assert [i for mine in found for i in mine] == list(range(len(costs)))
        _even([sum(costs[i] for i in mine) for mine in found], max(costs))


def merging(base: Path, lora: Path) -> Recipe:
    """A merge, planned."""
    opened, model = open_adapter(lora), Checkpoint.open(base)
    plan, out = weighed_plan(model, [opened], [1.0], []), base.parent / "never"
    files = plan_files(model, model, plan, out)
    return Recipe(base=model, disk=model, companion=model, adapters=[opened], edits=plan, out=out, files=files)


def shared(recipe: Recipe, size: int, done: set[str]) -> tuple[list[str], list[int]]:
    """(the tensors that the ranks get, one after the other, and how many bytes each gets)."""
    journals: list[Any] = [SimpleNamespace(ranks=Ranks(r, size), done=done) for r in range(size)]
    shares = [[t for tensors in _share(recipe, j).values() for t in tensors] for j in journals]
    return [t.name for share in shares for t in share], [nbytes(share) for share in shares]


def nbytes(tensors: Iterable[PlannedTensor]) -> int:
    """Bytes of all of them."""
    return sum(t.nbytes for t in tensors)


def _even(shares: list[int], unit: int) -> None:
    """No share is further than a unit from the mean."""
    mean = sum(shares) / len(shares)
    assert max(abs(s - mean) for s in shares) <= unit


LARGE = "model.layers.0.mlp.down_proj"
ROWS = {3: 1.0, 4: 0.8, 4097: 0.6, 6000: 0.4, 8191: 0.3}  # row -> size of its change
_EXTRACT = """
import torch
before = peak()
from lorasurgery import ExtractOptions, RankChoice, extract
from lorasurgery.ops.extraction.pairs import Selection
base, tuned, out, target, limit = sys.argv[1:]
options = ExtractOptions(RankChoice(rank=4), Selection(target=(target,)))
report = extract(base, tuned, out, options, device="cpu", memory_limit=int(limit) or None)
modules = [[m.name, m.rank, m.delta_norm, m.error] for m in report.modules]
print(json.dumps({"modules": modules, "full": len(report.full), "read": report.bytes_read, "peak": peak() - before}))
"""


@pytest.fixture(scope="module")
def changed(
    folders: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Array]:
    """Two checkpoints of a 70B shape and the rows in which one matrix of them differs, in float64."""
    base, tuned = folders("70B")[0], checkpoint(tmp_path_factory.mktemp("tuned") / "70B", "70B")
    index = json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"]
    width = shapes_of("70B")[f"{LARGE}.weight"][1]
    generator, rows = np.random.default_rng(0), []
    with (tuned / index[f"{LARGE}.weight"]).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start = 8 + size + json.loads(file.read(size))[f"{LARGE}.weight"]["data_offsets"][0]
        for row, scale in ROWS.items():
            values = (scale * generator.standard_normal(width)).astype(np.float32).view(np.uint32) >> 16
            file.seek(start + 2 * width * row)
            file.write(values.astype(np.uint16).tobytes())
            rows.append(_doubles(values))
    return base, tuned, np.stack(rows)


def test_extract_of_one_matrix_of_a_70b_model(changed: tuple[Path, Path, Array], tmp_path: Path) -> None:
    """Only the chosen matrix is read; its error is as float64 finds it, near the least possible; memory is bounded.

    It holds less than three such matrices in float32, the adapter and 256 MB; --memory-limit 256MB holds that, the
    adapter and 128 MB, and writes the same bytes.
    """
    base, tuned, rows = changed
    height, width = shapes_of("70B")[f"{LARGE}.weight"]
    target = LARGE.replace(".", r"\.")
    found = alone(_EXTRACT, base, tuned, tmp_path / "out", target, 0)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert found["peak"] < 3 * 4 * height * width + size + 256 * MB
    assert found["read"] == 2 * 2 * height * width
    assert found["full"] == 0

    [[name, rank, norm, error]] = found["modules"]
    up, down = factors_of(tmp_path / "out")
    assert (name, rank, up.shape, down.shape) == (LARGE, 4, (height, 4), (4, width))
    touched = np.isin(np.arange(height), list(ROWS))
    lost = np.linalg.norm(rows - up[touched] @ down) ** 2
    lost += np.linalg.norm(up[~touched] @ np.linalg.qr(down.T, mode="r").T) ** 2  # without the dense product
    singular = np.linalg.svd(rows, compute_uv=False)
    least = singular[4] / np.linalg.norm(singular)
    assert norm == pytest.approx(np.linalg.norm(rows), rel=1e-5)
    assert error == pytest.approx(math.sqrt(lost) / np.linalg.norm(rows), rel=1e-4)
    assert least < error < least * 1.01

    limited = alone(_EXTRACT, base, tuned, tmp_path / "limited", target, 256 * MB)
    assert limited["peak"] < 256 * MB + size + 128 * MB
    assert limited["modules"] == found["modules"]
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "limited" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def factors_of(folder: Path) -> tuple[Array, Array]:
    """(scale·B, A) of an adapter of one module, in float64, as its file has them."""
    raw = (folder / WEIGHTS).read_bytes()
    start, found = 8 + int.from_bytes(raw[:8], "little"), {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16"
            first, last = entry["data_offsets"]
            numbers = np.frombuffer(raw[start + first : start + last], dtype=np.uint16)
            found["lora_A" in name] = _doubles(numbers).reshape(entry["shape"])
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"] * found[False], found[True]


def _doubles(bfloat16: Array) -> Array:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
