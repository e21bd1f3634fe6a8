"""Modules that transformers cuts out of one tensor on disk, joins from several or turns row by row, both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo
from file_truth import check_lines
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.model_names.cuts import Cut, numbered, read_cuts
from lorasurgery.errors import MismatchError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify

_EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "image_size": 32, "patch_size": 8}  # fmt: skip
_LARGE = zoo.TEXT | {
    "moe_intermediate_size": 24, "n_shared_experts": 1, "n_routed_experts": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": 8,
    "q_lora_rank": 16, "layer_types": ["indexed_attention"] * 2, "max_position_embeddings": 64,
}  # fmt: skip
_M3 = zoo.TEXT | {
    "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2, "num_local_experts": 4, "rotary_dim": 4,
    "layer_types": ["full_attention"] * 2, "shared_intermediate_size": 24,
}  # fmt: skip
_OLMO = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def seen(name: str, text: dict[str, object]) -> Callable[[], torch.nn.Module]:
    """A maker of a tiny model with eyes."""

    def made() -> torch.nn.Module:
        config = tf.AutoConfig.for_model(name, vision_config=_EYES, text_config=text, image_token_index=10)
        return tf.AutoModelForImageTextToText.from_config(config)

    return made


MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "nomic_bert": zoo.body("nomic_bert"),
    "gte": zoo.body("gte"),
    "hrm_text": zoo.causal("hrm_text"),
    "olmo_hybrid": zoo.causal("olmo_hybrid", **_OLMO),
    "mistral_large4": seen("mistral_large4", _LARGE),
    "minimax_m3_vl": seen("minimax_m3_vl", _M3),
}
FUSED = {"nomic_bert": "Wqkv", "gte": "qkv_proj", "hrm_text": "gqkv_proj", "olmo_hybrid": "q_conv1d",
         "mistral_large4": "wq", "minimax_m3_vl": "shared_experts.gate_proj"}  # fmt: skip


def make(name: str) -> torch.nn.Module:
    """A tiny model with weights that tell rows apart."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def tuned(model: torch.nn.Module, only: str = "") -> dict[str, Tensor]:
    """Move what is not an expert: matrices by rank 4, vectors freely; return the weights as they are then."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only not in name or (p.dim() == 3 and "experts" in name):
                continue
            one, other = torch.randn(p.shape[0], 4, generator=generator), torch.randn(4, p[0].numel() if p.dim() else 1)
            p += 0.05 * ((one @ other).reshape(p.shape) if p.dim() > 1 else one[:, 0])
    return {k: v.clone() for k, v in model.state_dict().items()}


def pair(name: str, folder: Path, only: str = "") -> dict[str, Tensor]:
    """base/ and tuned/ as the library itself writes them; returns the tuned weights in memory."""
    model = make(name)
    model.save_pretrained(folder / "base")
    wanted = tuned(model, only)
    model.save_pretrained(folder / "tuned")
    assert any(FUSED[name] in n for n in load_file(folder / "base" / "model.safetensors"))
    return wanted


def loaded(name: str, path: Path) -> torch.nn.Module:
    """What from_pretrained makes of a checkpoint."""
    return type(MAKERS[name]()).from_pretrained(path)


def in_peft(name: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """PEFT's own merge, which must find a place for every key and take every key from the file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(loaded(name, base), adapter)
    assert not [str(w.message) for w in said if "adapter keys" in str(w.message)]
    return dict(model.merge_and_unload().state_dict())


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same tensors, but for rounding in float32."""
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, atol=2e-5), key


@pytest.mark.parametrize("name", MAKERS)
def test_the_adapter_is_the_tuned_model_in_peft_and_merged(name: str, tmp_path: Path) -> None:
    """Extracted from files with fused, parted or turned tensors, PEFT's model and our merge are the tuned one."""
    wanted = pair(name, tmp_path)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    assert not report.warnings
    assert_close(in_peft(name, tmp_path / "base", tmp_path / "x"), wanted)
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert_close(dict(loaded(name, tmp_path / "m").state_dict()), wanted)


@pytest.mark.parametrize("name", ["gte", "hrm_text", "olmo_hybrid"])
def test_verify_finds_the_merge(name: str, tmp_path: Path) -> None:
    """verify computes the same from base and adapter."""
    pair(name, tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    found = verify(tmp_path / "m", against=tmp_path / "base", adapters=[tmp_path / "x"])
    assert found.totals["equal"] == "rounding"


@pytest.mark.parametrize("name", ["nomic_bert", "mistral_large4", "olmo_hybrid"])
def test_undone_to_the_bit(name: str, tmp_path: Path) -> None:
    """A recorded merge into fused, turned and parted tensors gives the base's bytes back."""
    pair(name, tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m", undo=True)
    unmerge(tmp_path / "m", [tmp_path / "x"], tmp_path / "back")
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("base", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"rslora": True}, {"alpha": 8.0, "rslora": True},
                                     {"uniform_rank": True}, {"choice": RankChoice(energy=1 - 1e-9)}])  # fmt: skip
@pytest.mark.parametrize("only", ["", "gate"])
def test_joined_modules_keep_their_scale(options: dict[str, object], only: str, tmp_path: Path) -> None:
    """gate and up on disk, one layer in memory: the ranks add up, and every option says the same update."""
    model = make("minimax_m3_vl")
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    tuned(model, "shared_experts")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if only and "shared_experts.gate_up_proj" in key:
                half = p.shape[0] // 2
                disk = next(n for n in before if n.endswith(f"layers.{key.split('layers.')[1][0]}.block_sparse_moe."
                                                            "shared_experts.up_proj.weight"))  # fmt: skip
                p[half:] = before[disk]
    model.save_pretrained(tmp_path / "tuned")
    wanted = dict(model.state_dict())
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", ExtractOptions(**options))  # type: ignore[arg-type]
    assert_close(in_peft("minimax_m3_vl", tmp_path / "base", tmp_path / "x"), wanted)
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert_close(dict(loaded("minimax_m3_vl", tmp_path / "m").state_dict()), wanted)
    ranks = {v.shape[0] for k, v in load_file(tmp_path / "x" / "adapter_model.safetensors").items() if "lora_A" in k}
    assert len(ranks) == 1 or "uniform_rank" not in options


@pytest.mark.parametrize("options", [
    {"alpha": 5.0, "choice": RankChoice(rank=3)}, {"alpha": 5.0, "choice": RankChoice(energy=0.8), "rslora": True},
    {"choice": RankChoice(budget=Budget(share=0.2))}, {"alpha": 5.0, "choice": RankChoice(budget=Budget(share=0.2))},
    {"alpha": 7.0, "choice": RankChoice(tolerance=0.2), "uniform_rank": True},
])  # fmt: skip
@pytest.mark.parametrize("name", ["minimax_m3_vl", "hrm_text"])
def test_the_stated_error_is_that_of_the_file(name: str, options: dict[str, object], tmp_path: Path) -> None:
    """In 16 bits too: factors of a joined module, whose scale depends on all its parts, are rounded once."""
    pair(name, tmp_path, {"minimax_m3_vl": "shared_experts", "hrm_text": ""}[name])
    now = ExtractOptions(**options, dtype="BF16")  # type: ignore[arg-type]
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", now)
    check_lines(report, tmp_path / "base", tmp_path / "tuned", tmp_path / "x", tmp_path)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    if "alpha" in options and "uniform_rank" not in options:
        assert {config["lora_alpha"], *config["alpha_pattern"].values()} == {options["alpha"]}


@pytest.mark.parametrize("uniform", [False, True])
def test_a_budget_counts_copies_and_blocks(uniform: bool, tmp_path: Path) -> None:
    """The file keeps to its budget where factors are written for several modules, or joined to one of twice the rank."""
    for name, only, budget in (("hrm_text", "", 60_000), ("minimax_m3_vl", "shared_experts", 6_000)):
        pair(name, tmp_path / name, only)
        options = ExtractOptions(choice=RankChoice(budget=Budget(budget)), uniform_rank=uniform)
        extract(tmp_path / name / "base", tmp_path / name / "tuned", tmp_path / name / "x", options)
        size = (tmp_path / name / "x" / "adapter_model.safetensors").stat().st_size
        assert size <= budget


def test_fused_tensors_stored_whole(tmp_path: Path) -> None:
    """--full on the fused matrix stores each module of memory whole, and merge puts the rows back together."""
    wanted = pair("nomic_bert", tmp_path, "self_attn")
    options = ExtractOptions(selection=Selection(full=(".*qkv.*",)))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", options)
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert any(k.endswith("self_attn.q_proj.weight") for k in keys)
    assert_close(in_peft("nomic_bert", tmp_path / "base", tmp_path / "x"), wanted)
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert_close(dict(loaded("nomic_bert", tmp_path / "m").state_dict()), wanted)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["hrm_text", "mistral_large4", "gte"])
def test_adapters_that_peft_trained(name: str, dora: bool, tmp_path: Path) -> None:
    """Merged as merge_and_unload does, biases of factors and DoRA's norms too; subtracted again, the base is back."""
    make(name).save_pretrained(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora)
        model = get_peft_model(loaded(name, tmp_path / "base"), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
        model.save_pretrained(tmp_path / "x")
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert_close(dict(loaded(name, tmp_path / "m").state_dict()), dict(model.merge_and_unload().state_dict()))
    if not dora:
        unmerge(tmp_path / "m", [tmp_path / "x"], tmp_path / "back")
        assert_close(dict(loaded(name, tmp_path / "back").state_dict()), dict(make(name).state_dict()))


def test_one_of_two_changed_convolutions_writes_both(tmp_path: Path) -> None:
    """What is joined in memory has a change of one part written with the others as they are."""
    wanted = pair("olmo_hybrid", tmp_path, "q_norm")
    base = load_file(tmp_path / "base" / "model.safetensors")
    model = loaded("olmo_hybrid", tmp_path / "tuned")
    name = next(k for k in wanted if k.endswith("conv1d.weight"))
    with torch.no_grad():
        model.get_parameter(name)[:3] += 1
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert keys[f"base_model.model.{name}"].shape == wanted[name].shape
    assert_close(in_peft("olmo_hybrid", tmp_path / "base", tmp_path / "x"), dict(model.state_dict()))
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m", weights=[0.5])
    half = loaded("olmo_hybrid", tmp_path / "m").state_dict()[name]
    assert torch.allclose(half[:3], wanted[name][:3] + 0.5)
    assert torch.equal(half[3:], wanted[name][3:])
    assert any(k.endswith("q_conv1d.weight") for k in base)


def test_a_model_with_a_head_from_a_body(tmp_path: Path) -> None:
    """The base is the body alone, so that the adapter's paths are longer; whole biases and factors find their rows."""
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_config(make("gte").config)
    model.base_model.save_pretrained(tmp_path / "base")
    tuned(model)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    found = dict(type(model).from_pretrained(tmp_path / "m").base_model.state_dict())
    assert_close(found, dict(model.base_model.state_dict()))


@pytest.mark.parametrize("dora", [False, True])
def test_rows_that_take_turns(dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate in the even rows and up in the odd ones, biases too: float64 arithmetic says where factors go; undone."""
    turns = {"gate_proj": range(0, 8, 2), "up_proj": range(1, 8, 2)}
    cuts = {
        f"mlp.{leaf}.{kind}": [(f"mlp.w13.{kind}", Cut(f"mlp.{leaf}.{kind}", rows, range(4), 4))]
        for leaf, rows in turns.items()
        for kind in ("weight", "bias")
    }
    monkeypatch.setattr("lorasurgery.adapters.model_names.naming.library_cuts", lambda *_: cuts)
    generator, stem = torch.Generator().manual_seed(0), "base_model.model.mlp"
    weights = {f"mlp.w13.{k}": torch.randn(8, *s, generator=generator) for k, s in (("weight", (6,)), ("bias", ()))}
    factors, wanted = {}, {k: v.double() for k, v in weights.items()}
    for leaf, rows in turns.items():
        a, b, bias = (torch.randn(*s, generator=generator) for s in ((2, 6), (4, 2), (4,)))
        factors |= {f"{stem}.{leaf}.lora_A.weight": a, f"{stem}.{leaf}.lora_B.weight": b, f"{stem}.{leaf}.bias": bias}
        new = wanted["mlp.w13.weight"][list(rows)] + b.double() @ a.double()
        if dora:
            factors[f"{stem}.{leaf}.lora_magnitude_vector"] = bias.abs() + 1
            new = (bias.abs() + 1).double()[:, None] * new / new.norm(dim=1, keepdim=True)
        wanted["mlp.w13.weight"][list(rows)], wanted["mlp.w13.bias"][list(rows)] = new, bias.double()
    for folder, file, tensors, config in (
        ("base", "model", weights, {}),
        ("x", "adapter_model", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": dora}),
    ):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / f"{file}.safetensors")
        (tmp_path / folder / ("config.json" if folder == "base" else "adapter_config.json")).write_text(
            json.dumps(config | ({"target_modules": list(turns), "bias": "lora_only"} if config else {}))
        )
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m", undo=True)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.allclose(found[k].double(), v, atol=1e-6) for k, v in wanted.items())
    unmerge(tmp_path / "m", [tmp_path / "x"], tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[k], v) for k, v in weights.items())


def test_another_shape_is_refused(tmp_path: Path) -> None:
    """Factors that are no cut of the base's tensor are an error that names the module; nothing is written."""
    pair("hrm_text", tmp_path, "self_attn")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    factors = load_file(file)
    save_file({k: v[:-8].contiguous() if k.endswith("q_proj.lora_B.weight") else v for k, v in factors.items()}, file)
    with pytest.raises(MismatchError, match="q_proj"):
        merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_is_no_selection_of_rows_has_no_cuts() -> None:
    """A row that is lost, doubled, or of another width says that rows alone do not tell the conversion."""
    numbers, owned = numbered({"a": (4, 3)})
    rows = numbers["a"]
    assert (
        read_cuts({"m": rows[:2], "n": rows[2:]}, owned, {"a": (4, 3)}, {"m": (2, 3), "n": (2, 3)})["a"][1].into[0] == 0
    )
    for made, memory in (
        ({"m": rows[:2]}, {"m": (2, 3)}),
        ({"m": rows, "n": rows}, {"m": (4, 3), "n": (4, 3)}),
        ({"m": rows.T}, {"m": (3, 4)}),
    ):
        assert read_cuts(made, owned, {"a": (4, 3)}, memory) == {}


def test_without_the_library_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no library knows the class, factors keep the fused name on disk, and our merge gives the tuned model."""
    wanted = pair("hrm_text", tmp_path)
    for side in ("base", "tuned"):
        config = json.loads((tmp_path / side / "config.json").read_text())
        (tmp_path / side / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysModel"]}))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x")
    assert any("gqkv_proj.lora_A" in k for k in load_file(tmp_path / "x" / "adapter_model.safetensors"))
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m")
    assert_close(dict(loaded("hrm_text", tmp_path / "m").state_dict()), wanted)
