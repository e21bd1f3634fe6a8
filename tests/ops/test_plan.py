"""plan against the figures of the papers and of PEFT, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from peft import LoraConfig, get_peft_model

from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.plan import plan
from lorasurgery.report import Planned


def sparse(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A checkpoint with a real header and a hole for its data: any size takes no room."""
    planned = PlannedFile("model.safetensors", tuple(PlannedTensor(n, dtype, s) for n, s in tensors.items()), {})
    path.mkdir(parents=True)
    with (path / "model.safetensors").open("wb") as file:
        header = planned.header()
        file.write(header)
        file.truncate(len(header) + sum(t.nbytes for t in planned.tensors))
    return path


def llama_2_7b() -> dict[str, tuple[int, ...]]:
    """The tensors of Llama-2-7B as they lie on the disk, rotary buffers included."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for i in range(32):
        stem = f"model.layers.{i}"
        found |= {f"{stem}.self_attn.{m}_proj.weight": (4096, 4096) for m in "qkvo"}
        found |= {f"{stem}.mlp.{m}_proj.weight": (11008, 4096) for m in ("gate", "up")}
        found |= {f"{stem}.mlp.down_proj.weight": (4096, 11008), f"{stem}.self_attn.rotary_emb.inv_freq": (64,)}
        found |= {f"{stem}.{norm}.weight": (4096,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found | {"lm_head.weight": (32000, 4096)}


def test_llama_2_7b(tmp_path: Path) -> None:
    """q and v at r = 8: 4,194,304 trainable of 6,742,609,920 parameters, 0.06%; one matrix 65,536, 256 times fewer."""
    report = plan(sparse(tmp_path / "llama", llama_2_7b()), 8, target=["q_proj", "v_proj"])
    t = report.totals
    assert (t["parameters"], t["all_parameters"], t["modules"]) == (4_194_304, 6_742_609_920, 64)
    assert f"{t['trainable_share']:.2%}" == "0.06%"
    assert "4,194,304 trainable of 6,742,609,920 parameters, 0.06%" in report.summary
    assert t["adapter_bytes"] == 2 * 4_194_304
    row = t["by_kind"][0]
    assert (row["kind"], row["shape"], row["each"], row["times_fewer"]) == (
        "self_attn.q_proj",
        [4096, 4096],
        65_536,
        256,
    )
    assert f"{row['share']:.2%}" == "0.39%"
    assert json.dumps(report.to_dict())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_counts_are_pefts(family: str, tmp_path: Path) -> None:
    """Trainable and all parameters on all linear layers are what PEFT counts on the model in memory."""
    model = models.make(family)
    models.save(model, tmp_path / "m")
    report = plan(tmp_path / "m", 4)
    targets = [m.name for m in report.modules]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    trainable, everything = adapted.get_nb_trainable_parameters()
    assert report.totals["parameters"] == trainable
    assert report.totals["all_parameters"] == everything


def test_targets_are_patterns(tmp_path: Path) -> None:
    """Suffixes, regular expressions, presets and --exclude choose as they do for extract."""
    models.save(models.make("llama"), tmp_path / "m")
    names = lambda *t, **k: {m.name.rpartition(".")[2] for m in plan(tmp_path / "m", 2, target=t, **k).modules}  # noqa: E731
    assert names("attention") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names("mlp", exclude=["up_proj"]) == {"gate_proj", "down_proj"}
    assert names(r".*layers\.0\..*_proj") == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert "lm_head" in names("lm_head")
    with pytest.raises(UsageError, match="nearest: q_proj"):
        plan(tmp_path / "m", 2, target=["q_porj"])
    with pytest.raises(UsageError, match="rank=0: expected"):
        plan(tmp_path / "m", 0)
    with pytest.raises(MismatchError, match="leave no matrix"):
        plan(tmp_path / "m", 2, target=["norm"])


def test_experts_count_for_each(tmp_path: Path) -> None:
    """A mixture's experts take r(d + k) each, whether they lie apart or in one tensor."""
    apart: dict[str, tuple[int, ...]] = {}
    for e in range(4):
        apart |= {f"model.layers.0.mlp.experts.{e}.{m}_proj.weight": (48, 32) for m in ("gate", "up")}
        apart[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] = (32, 48)
    (sparse(tmp_path / "moe", apart) / "config.json").write_text('{"model_type": "qwen3_moe"}')
    report = plan(tmp_path / "moe", 2, target=["experts"])
    assert {(m.name, m.shape) for m in report.modules} == {
        ("model.layers.0.mlp.experts.gate_up_proj", (96, 32)), ("model.layers.0.mlp.experts.down_proj", (32, 48)),
    }  # fmt: skip
    assert report.totals["parameters"] == 4 * 2 * (96 + 32) + 4 * 2 * (32 + 48)
    assert all(isinstance(m, Planned) and m.weight_parameters == 4 * m.shape[0] * m.shape[1] for m in report.modules)


def test_a_rank_that_saves_nothing_is_told(tmp_path: Path) -> None:
    """Factors as large as the weight are a warning, not a number to be overlooked."""
    report = plan(sparse(tmp_path / "m", {"layers.0.q_proj.weight": (64, 64)}), 32)
    assert "as much as the weight itself" in report.warnings[0]
    assert report.modules[0].to_dict()["share"] == 1.0
