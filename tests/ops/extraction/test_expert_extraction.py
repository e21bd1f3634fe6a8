"""Fused experts are extracted one by one: PEFT loads what is written, and the stated errors are those of the file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo
from file_truth import check_lines
from peft import PeftModel, get_peft_model_state_dict
from references import best
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.blend import rerank
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.merge import merge

# Families whose own renames PEFT 0.21.2 trips over (laguna's shared_expert), or that pack other tensors on loading
# (bailing_hybrid's q_conv1d, k_conv1d, v_conv1d); docs/formats.md names them.
LOADABLE = tuple(n for n in zoo.EXPERTS if n not in ("laguna", "bailing_hybrid"))
FULL = ExtractOptions(RankChoice(rank=128))


def pair(name: str, tmp: Path, only: str = "", std: float = 0.02) -> torch.nn.Module:
    """tmp/base and tmp/tuned on disk, every parameter whose name holds `only` moved; gives the tuned model."""
    model = zoo.make(name)
    model.save_pretrained(tmp / "base")
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        noise = std * torch.randn(parameter.shape, generator=generator)
        if only in key:
            parameter.data += noise
    model.save_pretrained(tmp / "tuned")
    return model


def loaded(name: str, adapter: Path) -> PeftModel:
    """The adapter as PEFT loads it; a key that it misses, or does not know, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(zoo.make(name), adapter).eval()


def config_of(adapter: Path) -> dict[str, object]:
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", LOADABLE)
def test_full_rank_is_the_tuned_model(name: str, tmp_path: Path) -> None:
    """PEFT loads every tensor to the bit, its merge_and_unload and our merge give the tuned model."""
    tuned = pair(name, tmp_path)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", FULL)
    assert report.totals["error"] < 1e-5
    assert not report.left_out
    model = loaded(name, tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    again = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(written[k], again[k]) for k in again)
    inside = dict(model.state_dict())
    for key in written.keys() - again.keys():  # bare parameters, which PEFT loads by name and does not save
        assert torch.equal(inside[key], written[key]), key
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    ours = type(tuned).from_pretrained(tmp_path / "merged").state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.merge_and_unload().state_dict()
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-6, msg=key)
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=2e-6, msg=key)


SQUARE = {
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**zoo.TEXT | {"intermediate_size": 32}, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "llama4_text": lambda: zoo.causal("llama4_text", intermediate_size=32)(),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.TEXT | {"intermediate_size": 32}, num_local_experts=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SQUARE)
def test_square_experts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shapes can't tell which way a stack is stored, the family does: as PEFT takes it."""
    monkeypatch.setitem(zoo.MAKERS, name, SQUARE[name])
    test_full_rank_is_the_tuned_model(name, tmp_path)


def test_stacks_that_are_turned_on_loading(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's files may hold (E, in, out), which transformers turns: the factors are those of memory."""
    tuned = pair("qwen3_vl_moe", tmp_path)
    for folder in ("base", "tuned"):
        file = tmp_path / folder / "model.safetensors"
        weights = {k: t.mT.contiguous() if ".mlp.experts." in k else t for k, t in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", FULL)
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    model = loaded("qwen3_vl_moe", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged/model.safetensors")
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=2e-6, msg=key)
        on_disk = value.mT if ".mlp.experts." in key else value
        torch.testing.assert_close(ours[key], on_disk, rtol=0, atol=2e-6, msg=key)


@pytest.mark.parametrize("options", [
    {"choice": RankChoice(rank=3)}, {"alpha": 5.0, "choice": RankChoice(energy=0.8), "rslora": True},
    {"choice": RankChoice(budget=Budget(60_000))}, {"alpha": 5.0, "choice": RankChoice(budget=Budget(60_000))},
    {"alpha": 7.0, "choice": RankChoice(tolerance=0.2), "uniform_rank": True},
])  # fmt: skip
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_line_in_every_way(name: str, options: dict[str, object], tmp_path: Path) -> None:
    """Tensors of experts, whole stacks or one by one, under rules, scales and cuts, in 16 bits."""
    pair(name, tmp_path)
    now = ExtractOptions(**options, dtype="BF16")  # type: ignore[arg-type]
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", now)
    check_lines(report, tmp_path / "base", tmp_path / "tuned", tmp_path / "x", tmp_path)


def dense(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in float64."""
    return {k: t.double() for k, t in load_file(path / "model.safetensors").items()}


def merged_deltas(tmp: Path) -> dict[str, Tensor]:
    """ΔW of every tensor on disk that the adapter means, in float64: factors times scale, sliced by hand."""
    adapter = open_adapter(tmp / "out")
    found = {}
    for delta in adapter.deltas.values():
        for e in range(delta.experts):
            update = adapter.load_expert(delta, e)
            product = update.scale * update.up.double() @ update.down.double()
            found[f"{delta.parameter}.{e}"] = product
    return found


PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 5.0}, {"rslora": True}, {"alpha": 3.0, "rslora": True}, {"uniform_rank": True}, {"dtype": "BF16"}],
    ids=str,
)
@pytest.mark.parametrize("choice", [RankChoice(rank=5), RankChoice(energy=0.7)], ids=["rank", "energy"])
def test_stated_errors_are_measured(choice: RankChoice, options: dict[str, object], tmp_path: Path) -> None:
    """A line for every expert's matrix: its norm and error are those of the written factors, by float64 arithmetic."""
    pair("qwen3_moe", tmp_path)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(choice, **options))  # type: ignore[arg-type]
    loaded("qwen3_moe", tmp_path / "out")
    before, after, ours = dense(tmp_path / "base"), dense(tmp_path / "tuned"), merged_deltas(tmp_path)
    lines = {m.name: m for m in report.modules if ".experts." in m.name}
    assert len(lines) == 2 * 4 * 3
    for key, product in ours.items():
        module, leaf, expert = key.rsplit(".", 2)
        for part, rows in zip(PARTS[leaf], product.chunk(len(PARTS[leaf])), strict=True):
            name = f"{module}.{expert}.{part}"
            delta = after[f"{name}.weight"] - before[f"{name}.weight"]
            assert lines[name].delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
            assert lines[name].error == pytest.approx(float((delta - rows).norm() / delta.norm()), rel=1e-4)
    total = sum(
        float((after[f"{n}.weight"] - before[f"{n}.weight"]).square().sum()) for n in (m.name for m in report.modules)
    )
    assert report.totals["delta_norm"] == pytest.approx(total**0.5, rel=1e-5)


def test_each_expert_has_its_own_best_approximation(tmp_path: Path) -> None:
    """At rank r an expert's factors are the SVD truncation of its own ΔW, gate above up."""
    pair("deepseek_v3", tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=3)))
    before, after = dense(tmp_path / "base"), dense(tmp_path / "tuned")
    for key, product in merged_deltas(tmp_path).items():
        module, leaf, expert = key.rsplit(".", 2)
        names = [f"{module}.{expert}.{part}.weight" for part in PARTS[leaf]]
        delta = torch.cat([after[n] - before[n] for n in names])
        assert float((product - best(delta, 3)).norm() / delta.norm()) < 1e-5


def test_a_transposed_stack(tmp_path: Path) -> None:
    """GPT-OSS holds (E, in, out): one line for the tensor, whose error is that of all its experts together."""
    pair("gpt_oss", tmp_path)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=4)))
    before, after, ours = dense(tmp_path / "base"), dense(tmp_path / "tuned"), merged_deltas(tmp_path)
    lines = {m.name: m for m in report.modules if ".experts." in m.name}
    assert len(lines) == 4
    for name, line in lines.items():
        delta = after[name] - before[name]
        rest = torch.stack([delta[e] - ours[f"{name}.{e}"].T for e in range(4)])
        assert line.shape == tuple(delta.shape)
        assert line.error == pytest.approx(float(rest.norm() / delta.norm()), rel=1e-4)


def test_experts_that_did_not_change_are_zero(tmp_path: Path) -> None:
    """One expert's down_proj moved: only this parameter is named, the other experts' factors are zero."""
    pair("mixtral", tmp_path, only="nothing")
    weights = load_file(tmp_path / "tuned/model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2"
    weights[f"{name}.weight"] += 0.1
    save_file(weights, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert [m.name for m in report.modules] == [name]
    assert report.totals["unchanged"] == len(weights) - 1
    assert config_of(tmp_path / "out")["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert {k.rpartition(".")[0].removesuffix(".1") for k, t in merged_deltas(tmp_path).items() if t.any()} == {
        "model.layers.1.mlp.experts.down_proj"
    }
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    torch.testing.assert_close(found[f"{name}.weight"], weights[f"{name}.weight"])
    loaded("mixtral", tmp_path / "out")


@pytest.mark.parametrize("uniform", [False, True])
def test_a_budget_is_kept(uniform: bool, tmp_path: Path) -> None:
    """--budget counts every expert's directions, the file fits, and the errors after the cut are the file's."""
    pair("qwen2_moe", tmp_path)
    options = ExtractOptions(RankChoice(budget=Budget(size=120_000)), uniform_rank=uniform)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", options)
    size = (tmp_path / "out/adapter_model.safetensors").stat().st_size
    assert 0.8 * 120_000 < size <= 120_000
    loaded("qwen2_moe", tmp_path / "out")
    before, after, ours = dense(tmp_path / "base"), dense(tmp_path / "tuned"), merged_deltas(tmp_path)
    lines = {m.name: m for m in report.modules}
    for key, product in ours.items():
        module, leaf, expert = key.rsplit(".", 2)
        for part, rows in zip(PARTS[leaf], product.chunk(len(PARTS[leaf])), strict=True):
            name = f"{module}.{expert}.{part}"
            delta = after[f"{name}.weight"] - before[f"{name}.weight"]
            assert lines[name].error == pytest.approx(float((delta - rows).norm() / delta.norm()), rel=1e-3)
            assert lines[name].delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_target_and_exclude_mean_whole_parameters(tmp_path: Path) -> None:
    """Experts are chosen by parameter or by all of its matrices; a part of one is refused by name."""
    pair("qwen3_moe", tmp_path)

    def chosen(target: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
        selection = Selection(target, exclude, ("none",))
        options = ExtractOptions(RankChoice(rank=2), selection)
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", options, overwrite=True)
        return set(config_of(tmp_path / "out").get("target_parameters", ()))  # type: ignore[call-overload]

    up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    assert chosen(("gate_up_proj",)) == {up}
    assert chosen(("gate_proj", "up_proj")) == {up}
    assert chosen(("mlp",)) == {up, down}
    assert chosen(exclude=("down_proj",)) == {up}
    assert chosen(exclude=("experts",)) == set()
    assert chosen((r"model\.layers\.1\.mlp.*",)) == {f"model.layers.1.{n}" for n in (up, down)}
    with pytest.raises(UsageError, match="gate_up_proj"):
        chosen(("up_proj",))
    with pytest.raises(UsageError, match="gate_up_proj"):
        extract(
            tmp_path / "base",
            tmp_path / "tuned",
            tmp_path / "x",
            ExtractOptions(selection=Selection(full=("up_proj",))),
        )
    assert not (tmp_path / "x").exists()


def test_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """A missing expert, and one of another shape, are errors that name it; nothing is written."""
    pair("qwen3_moe", tmp_path)
    weights = load_file(tmp_path / "tuned/model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    save_file(weights | {name: torch.zeros(3, 32)}, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"experts\.1\.up_proj"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    for folder in ("base", "tuned"):
        rest = {k: t for k, t in load_file(tmp_path / folder / "model.safetensors").items() if k != name}
        save_file(rest, tmp_path / folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match="expert 1 is incomplete"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_families_that_keep_experts_apart(tmp_path: Path) -> None:
    """Without a model type that stacks its experts, each matrix is a module of its own, by its name on disk."""
    pair("qwen3_moe", tmp_path)
    for folder in ("base", "tuned"):
        (tmp_path / folder / "config.json").write_text("{}")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", FULL)
    assert "target_parameters" not in config_of(tmp_path / "out")
    keys = load_file(tmp_path / "out/adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight" in keys
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    expected, found = dense(tmp_path / "tuned"), dense(tmp_path / "merged")
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())


def test_the_plan_lists_every_matrix(tmp_path: Path) -> None:
    """--dry-run has a line for each tensor and counts the parameters of all experts."""
    pair("qwen3_moe", tmp_path, only="experts")
    plan = extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=3)), dry_run=True
    )
    done = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=3)))
    assert {m.name for m in done.modules} <= {m.name for m in plan.modules}
    assert plan.totals["tensors"]["experts"] == 2 * 4 * 3


@pytest.mark.parametrize("target", [(), (r".*mlp.*",)], ids=["all", "mlp"])
def test_what_was_named_as_a_parameter_is_reranked(target: tuple[str, ...], tmp_path: Path) -> None:
    """A rerank keeps naming them so, with ranks that PEFT finds; both merge to what the reranked factors say."""
    pair("deepseek_v3", tmp_path)
    selection = Selection(target, ("experts",), ("none",))
    extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "first", ExtractOptions(RankChoice(energy=0.9), selection)
    )
    rerank(tmp_path / "first", tmp_path / "out", RankChoice(energy=0.6))
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    found = type(zoo.make("deepseek_v3")).from_pretrained(tmp_path / "merged").state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded("deepseek_v3", tmp_path / "out").merge_and_unload().state_dict()
    before = zoo.make("deepseek_v3").state_dict()
    assert any("shared_experts" in k and not torch.equal(before[k], model[k]) for k in before)
    for key, value in model.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)
