"""The rest of PEFT: DoRA, convolutions, nn.MultiheadAttention, single rows, converted inits, against PEFT's own merge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorasurgery.errors import FormatError, MismatchError, UnsupportedError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge


class Layers(nn.Module):
    """One of each kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.embedding = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, (3, 2))
        self.point = nn.Conv2d(6, 8, 1)
        self.conv3 = nn.Conv3d(6, 8, 2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Not needed: files are compared."""
        return self.linear(x)


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def adapted(root: Path, model: nn.Module, seed: int = 1, **config: object) -> PeftModel:
    """Save the model as root/base and a PEFT adapter with random factors and magnitudes as root/adapter."""
    (root / "base").mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "base/model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 5} | config))).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in name or "trainable_tokens_delta" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        peft.save_pretrained(root / "adapter", save_embedding_layers=False)
    return peft


def check(root: Path, peft: PeftModel, tight: float = 1e-6) -> None:
    """merge gives what merge_and_unload gives, to 1e-6."""
    before = load_file(root / "base/model.safetensors")
    merge(root / "base", [root / "adapter"], root / "out")
    found = load_file(root / "out/model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.merge_and_unload().state_dict()
    assert any(not torch.equal(before[k], found[k]) for k in before)
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=tight, rtol=tight), key


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv1", "conv2", "point", "conv3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer(name: str, dora: bool, rslora: bool, tmp_path: Path) -> None:
    """Plain and DoRA, alpha/r and rsLoRA."""
    peft = adapted(tmp_path, layers(), target_modules=[name], use_dora=dora, use_rslora=rslora)
    check(tmp_path, peft)


def test_multihead_attention(tmp_path: Path) -> None:
    """in_proj takes the module's own factors, out_proj those under its wrapper: twice, as PEFT trains and runs it."""
    peft = adapted(tmp_path, layers(), target_modules=["attention"])
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = peft.base_model.model.attention(x, x, x)[0]
    check(tmp_path, peft)
    merged = layers()
    merged.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    with torch.no_grad():
        assert torch.allclose(merged.attention(x, x, x)[0], expected, atol=1e-5)
    with pytest.raises(UnsupportedError, match="MultiheadAttention"):
        rerank(tmp_path / "adapter", tmp_path / "no", RankChoice(rank=1))


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_dora_in_models(family: str, tmp_path: Path) -> None:
    """Conv1D is stored (in, out), so its norms run the other way."""
    targets = {"gpt2": ["c_attn", "c_fc", "wte"], "bert": ["query", "word_embeddings"]}.get(family, "all-linear")
    base = models.save(models.make(family), tmp_path / "base")
    peft = models.peft_adapter(family, tmp_path / "adapter", r=3, target_modules=targets, use_dora=True)
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    expected = peft.merge_and_unload().state_dict()
    found = models.load(family, tmp_path / "out").state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())


def test_dora_with_a_weight_and_beside_another(tmp_path: Path) -> None:
    """At weight w DoRA moves a share w of the way; a second adapter meets the merged weight, as in PEFT."""
    adapted(tmp_path, layers(), target_modules=["linear"], use_dora=True)
    base = load_file(tmp_path / "base/model.safetensors")["linear.weight"]
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "one")
    whole = load_file(tmp_path / "one/model.safetensors")["linear.weight"]
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", weights=[0.5])
    half = load_file(tmp_path / "half/model.safetensors")["linear.weight"]
    assert torch.allclose(half, (base + whole) / 2, atol=1e-6)
    merge(tmp_path / "one", [tmp_path / "adapter"], tmp_path / "then")
    merge(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "both")
    then, both = (load_file(tmp_path / n / "model.safetensors")["linear.weight"] for n in ("then", "both"))
    assert torch.allclose(then, both, atol=1e-6)


def test_dora_comes_out_only_with_the_base(tmp_path: Path) -> None:
    """The norm that was divided away is nowhere in the file."""
    adapted(tmp_path, layers(), target_modules=["linear"], use_dora=True)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    report = unmerge(tmp_path / "out", [tmp_path / "adapter"], tmp_path / "no")
    assert [m.name for m in report.left_out] == ["linear.weight"]
    (tmp_path / "other").mkdir()
    save_file({"other.weight": torch.zeros(10, 12)}, tmp_path / "other/model.safetensors")
    with pytest.raises(MismatchError, match="matches no tensor"):
        unmerge(tmp_path / "other", [tmp_path / "adapter"], tmp_path / "no2")
    unmerge(tmp_path / "out", [tmp_path / "adapter"], tmp_path / "back", base=tmp_path / "base")
    old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "back"))
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_dora_is_all_or_nothing(tmp_path: Path) -> None:
    """A config and a file that disagree are an incomplete adapter."""
    adapted(tmp_path, layers(), target_modules=["linear"], use_dora=True)
    file, config = (tmp_path / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": False}))
    with pytest.raises(FormatError, match="use_dora is false"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    save_file({k: v for k, v in load_file(file).items() if "magnitude" not in k}, file)
    with pytest.raises(FormatError, match="has no lora_magnitude_vector"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    """Their A is dense over all inputs; PEFT raises too."""
    adapted(tmp_path, layers(), target_modules=["conv2"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    shapes = {"lora_A": torch.ones(3, 6, 3, 3), "lora_B": torch.ones(8, 3, 1, 1)}
    save_file({f"base_model.model.grouped.{k}.weight": v for k, v in shapes.items()}, file)
    with pytest.raises(UnsupportedError, match="grouped convolution"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("indices", [[3, 7, 11], {"embed_tokens": [5, 2]}], ids=str)
def test_single_rows(family: str, indices: object, tmp_path: Path) -> None:
    """trainable_token_indices replaces rows of the embedding, and of the head that shares it."""
    base = models.save(models.make(family), tmp_path / "base")
    peft = models.peft_adapter(
        family, tmp_path / "adapter", r=3, target_modules=["q_proj"], trainable_token_indices=indices
    )
    for name, parameter in peft.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = merge(base, [tmp_path / "adapter"], tmp_path / "out")
    expected = peft.merge_and_unload().state_dict()
    found = models.load(family, tmp_path / "out").state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())
    assert report.full[0].kind == "rows"
    with pytest.raises(UnsupportedError, match="single rows"):
        rerank(tmp_path / "adapter", tmp_path / "no", RankChoice(rank=1))
    back = unmerge(tmp_path / "out", [tmp_path / "adapter"], tmp_path / "back", base=base)
    assert back.left_out == []
    old, new = (models.load(family, tmp_path / n).state_dict() for n in ("base", "back"))
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    """More rows than the config names, or rows beyond the table."""
    base = models.save(models.make("llama"), tmp_path / "base")
    models.peft_adapter("llama", tmp_path / "adapter", r=3, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    for rows, message in (([1], "names 1 tokens"), ([1, 999], "rows up to 999")):
        file.write_text(json.dumps(config | {"trainable_token_indices": rows}))
        with pytest.raises(MismatchError, match=message):
            merge(base, [tmp_path / "adapter"], tmp_path / "out")
    file.write_text(json.dumps(config | {"trainable_token_indices": [-1, "a"]}))
    with pytest.raises(FormatError, match="row numbers"):
        merge(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_inits(init: str, tmp_path: Path) -> None:
    """PiSSA and OLoRA change the base; their converted form (rank doubled, init true) fits the plain one."""
    base = models.save(models.make("llama"), tmp_path / "base")
    peft = get_peft_model(models.make("llama"), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=init))
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.peft_config["default"].init_lora_weights = init
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    peft.save_pretrained(tmp_path / "raw")
    with pytest.raises(UnsupportedError, match=init):
        merge(base, [tmp_path / "raw"], tmp_path / "no")
    peft.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    expected = peft.merge_and_unload().state_dict()
    found = models.load("llama", tmp_path / "out").state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-5) for k, v in expected.items())


@pytest.mark.parametrize("name", ["conv1", "conv2", "point", "conv3"])
def test_convolutions_change_their_rank(name: str, tmp_path: Path) -> None:
    """rerank and blend treat a convolution as the matrix it is, and PEFT loads what they write."""
    adapted(tmp_path, layers(), target_modules=[name])
    rerank(tmp_path / "adapter", tmp_path / "less", RankChoice(rank=2))
    blend([tmp_path / "adapter", tmp_path / "less"], tmp_path / "minus", BlendOptions(weights=[1.0, -1.0]))
    deltas = {}
    for part in ("adapter", "less", "minus"):
        found = PeftModel.from_pretrained(layers(), tmp_path / part)
        deltas[part] = found.base_model.model.get_submodule(name).get_delta_weight("default").detach()
    whole = deltas["adapter"].flatten(1)
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    assert torch.allclose(deltas["less"].flatten(1), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    assert torch.allclose(deltas["minus"], deltas["adapter"] - deltas["less"], atol=1e-5)
    assert inspect(tmp_path / "adapter", spectrum=True).modules[0].kind == "conv"


def test_what_is_no_sum_is_not_reranked(tmp_path: Path) -> None:
    """DoRA merges, but has no rank to change."""
    adapted(tmp_path, layers(), target_modules=["linear"], use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        rerank(tmp_path / "adapter", tmp_path / "out", RankChoice(rank=1))
    assert any("DoRA" in w for w in inspect(tmp_path / "adapter", spectrum=True).warnings)


@pytest.mark.parametrize("name", ["conv1", "conv2", "point", "conv3"])
def test_extract_factors_convolutions_on_demand(name: str, tmp_path: Path) -> None:
    """--target with the name factors a convolution, and PEFT loads it; otherwise its change is stored whole."""
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    before = {k: v.contiguous() for k, v in layers().state_dict().items()}
    after = {k: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(5)) for k, v in before.items()}
    save_file(before, tmp_path / "base/model.safetensors")
    save_file(after, tmp_path / "tuned/model.safetensors")
    options = ExtractOptions(RankChoice(rank=64), Selection(target=(name,)))
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", options)
    assert [m.kind for m in report.modules] == ["conv"]
    model = PeftModel.from_pretrained(layers(), tmp_path / "out")
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default").detach()
    assert torch.allclose(delta, (after[f"{name}.weight"] - before[f"{name}.weight"]), atol=1e-5)
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"]
    assert torch.allclose(found, after[f"{name}.weight"], atol=1e-5)
