"""Projections fused on one side and apart on the other: the rows go where float64 arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg import norms
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

IN, HEADS, GROUPS, WIDTH, INNER = 16, 4, 2, 6, 20
SIZES = {
    "q_proj": HEADS * WIDTH,
    "k_proj": GROUPS * WIDTH,
    "v_proj": GROUPS * WIDTH,
    "gate_proj": INNER,
    "up_proj": INNER,
}
GROUPINGS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
HEADS_SAID = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH}
LAYER = "model.layers.0."


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(path: Path, fused: bool, config: dict[str, object] | None = None, bias: bool = False) -> Path:
    """A layer with all projections, fused or apart, with the same rows in both."""
    tensors = {f"{LAYER}self_attn.o_proj.weight": random(IN, SIZES["q_proj"], seed=9)}
    for i, (module, parts) in enumerate(GROUPINGS.items()):
        height = sum(SIZES[p] for p in parts)
        stacks = {"weight": random(height, IN, seed=i)} | ({"bias": random(height, seed=10 + i)} if bias else {})
        for leaf, whole in stacks.items():
            if fused:
                tensors[f"{LAYER}{module}.{leaf}"] = whole
            else:
                stem = module.rpartition(".")[0]
                for part, rows in zip(parts, whole.split([SIZES[p] for p in parts]), strict=True):
                    tensors[f"{LAYER}{stem}.{part}.{leaf}"] = rows.contiguous()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def adapter(path: Path, modules: dict[str, int], kind: str = "lora", width: int = IN) -> Path:
    """Random factors for modules of these heights; `kind` adds lora_B.bias or a magnitude."""
    tensors = {}
    for i, (module, height) in enumerate(modules.items()):
        stem = f"base_model.model.{LAYER}{module}"
        tensors[f"{stem}.lora_A.weight"] = random(3, width, seed=20 + i)
        tensors[f"{stem}.lora_B.weight"] = random(height, 3, seed=40 + i)
        if kind == "bias":
            tensors[f"{stem}.lora_B.bias"] = random(height, seed=60 + i)
        if kind == "dora":
            tensors[f"{stem}.lora_magnitude_vector"] = 1 + random(height, seed=80 + i).abs()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": sorted(modules)}
    config |= {"lora_bias": kind == "bias", "use_dora": kind == "dora"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def expected(weight: Tensor, factors: dict[str, Tensor], module: str, kind: str) -> Tensor:
    """W + s·BA in float64, or DoRA's m·V/‖V‖."""
    stem = f"base_model.model.{LAYER}{module}"
    up, down = (factors[f"{stem}.lora_{side}.weight"].double() for side in "BA")
    value = weight.double() + 2.0 * up @ down
    if kind == "dora":
        value = factors[f"{stem}.lora_magnitude_vector"].double()[:, None] * value / value.norm(dim=1, keepdim=True)
    return value


def heights(fused: bool) -> dict[str, int]:
    if fused:
        return {m: sum(SIZES[p] for p in parts) for m, parts in GROUPINGS.items()}
    return {f"{m.rpartition('.')[0]}.{p}": SIZES[p] for m, parts in GROUPINGS.items() for p in parts}


@pytest.mark.parametrize("kind", ["lora", "bias", "dora"])
@pytest.mark.parametrize("fused_base", [True, False])
@pytest.mark.parametrize("config", [HEADS_SAID, {}], ids=["heads", "shapes"])
def test_rows_go_where_they_belong(fused_base: bool, kind: str, config: dict[str, object], tmp_path: Path) -> None:
    """An adapter for the other layout gives every part the update of its rows; biases and DoRA's magnitudes too."""
    base(tmp_path / "base", fused_base, config, bias=kind == "bias")
    modules = heights(not fused_base)
    adapter(tmp_path / "adapter", modules, kind)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.totals["adapter_tensors_matched"] == len(modules)
    assert {m.kind for m in report.modules} == {"linear"} | ({"bias"} if kind == "bias" else set())
    assert all(m.name.endswith(".bias") == (m.kind == "bias") for m in report.modules)
    before, found = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for module, parts in GROUPINGS.items():
        stem = module.rpartition(".")[0]
        single = [f"{stem}.{p}" for p in parts]
        disk, named = ([module], single) if fused_base else (single, [module])
        whole = torch.cat([before[f"{LAYER}{n}.weight"] for n in disk])
        rows = whole.split([modules[n] for n in named])
        right = torch.cat([expected(w, factors, n, kind) for n, w in zip(named, rows, strict=True)])
        torch.testing.assert_close(
            torch.cat([found[f"{LAYER}{n}.weight"] for n in disk]).double(), right, atol=1e-6, rtol=1e-6
        )
        if kind == "bias":
            old = torch.cat([before[f"{LAYER}{n}.bias"] for n in disk]).double()
            added = torch.cat([factors[f"base_model.model.{LAYER}{n}.lora_B.bias"] for n in named]).double()
            new = torch.cat([found[f"{LAYER}{n}.bias"] for n in disk]).double()
            torch.testing.assert_close(new, old + 2 * added, atol=1e-6, rtol=1e-6)


def test_a_part_that_ends_within_a_block_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a fused tensor is worked on by blocks, each module's rows get its magnitudes and no others do."""
    monkeypatch.setattr(norms, "_BLOCK_BYTES", 64 * IN * 4)
    modules = {"mlp.gate_proj": 100, "mlp.up_proj": 100}
    name, old = f"{LAYER}mlp.gate_up_proj.weight", random(200, IN, seed=1)
    (tmp_path / "base").mkdir()
    save_file({name: old}, tmp_path / "base/model.safetensors")
    adapter(tmp_path / "adapter", modules, "dora")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    right = [expected(rows, factors, module, "dora") for module, rows in zip(modules, old.split(100), strict=True)]
    found = load_file(tmp_path / "out/model.safetensors")[name]
    torch.testing.assert_close(found.double(), torch.cat(right), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fused_base", [True, False])
def test_one_part_alone_and_back_again(fused_base: bool, tmp_path: Path) -> None:
    """Only the rows that are meant move, and unmerge takes them back."""
    base(tmp_path / "base", fused_base, HEADS_SAID)
    module = "self_attn.qkv_proj" if not fused_base else "self_attn.k_proj"
    adapter(tmp_path / "adapter", {module: heights(not fused_base)[module]})
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    before, found = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    if fused_base:
        name = f"{LAYER}self_attn.qkv_proj.weight"
        moved = (before[name] != found[name]).any(1)
        assert moved.nonzero().flatten().tolist() == list(range(24, 36))
    assert {n for n in before if not torch.equal(before[n], found[n])} == {
        f"{LAYER}self_attn.{p}.weight" for p in (("qkv_proj",) if fused_base else ("q_proj", "k_proj", "v_proj"))
    }
    unmerge(tmp_path / "out", [tmp_path / "adapter"], tmp_path / "back")
    for name, tensor in load_file(tmp_path / "back/model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fused", "modules", "width"),
    [
        (True, {"self_attn.q_proj": 12}, IN), (True, {"self_attn.k_proj": 24}, IN), (True, {"self_attn.v_proj": 6}, IN),
        (True, {"mlp.up_proj": 40}, IN), (True, {"self_attn.q_proj": 24}, 8), (False, {"self_attn.qkv_proj": 47}, IN),
        (False, {"mlp.gate_up_proj": 40}, 8), (True, {"self_attn.qkv_proj": 48, "self_attn.q_proj": 24}, IN),
        (True, {"self_attn.qkv_proj": 48, "self_attn.v_proj": 12}, IN),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("config", [HEADS_SAID, {}], ids=["heads", "shapes"])
def test_rows_that_do_not_add_up(
    fused: bool, modules: dict[str, int], width: int, config: dict[str, object], tmp_path: Path
) -> None:
    """Another width, another number of heads, or the same rows twice: one line, and nothing is written."""
    base(tmp_path / "base", fused, config)
    adapter(tmp_path / "adapter", modules, width=width)
    with pytest.raises(SurgeryError, match="proj"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("query_key_value", "q_proj"), ("query_key_value", "qkv_proj"), ("q_proj", "query_key_value")],
)
def test_interleaved_rows_are_refused(stored: str, asked: str, tmp_path: Path) -> None:
    """query_key_value is interleaved by head: the error says why, whichever side has it."""
    (tmp_path / "base").mkdir()
    save_file({f"{LAYER}self_attn.{stored}.weight": random(48, IN, seed=1)}, tmp_path / "base/model.safetensors")
    adapter(tmp_path / "adapter", {f"self_attn.{asked}": 48})
    with pytest.raises(SurgeryError, match="interleaved by head"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_an_order_of_its_own_is_refused(tmp_path: Path) -> None:
    """CodeGen's qkv_proj is not a q above k above v."""
    base(tmp_path / "base", True, {"model_type": "codegen"})
    adapter(tmp_path / "adapter", {"self_attn.q_proj": 24})
    with pytest.raises(SurgeryError, match="order of its own"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
