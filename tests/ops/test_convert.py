"""convert: the same ΔW under other names, bit for bit there and back, and to the oracles' own loaders."""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from pathlib import Path

import images
import loose
import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.diff import diff
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge

KINDS = ["sd1", "sdxl", "flux"]


def updates(path: Path) -> dict[str, Tensor]:
    """Every module's ΔW in float32, by the name that the file gives it."""
    adapter = open_adapter(path)
    return {p: adapter.load_update(d).to(torch.float32).dense() for p, d in adapter.deltas.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the modules and every bit of their updates are the same."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind's diffusers folder, and its single file."""
    root = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        images.save_pipeline(images.quiet(images.pipeline, kind), root / kind)
        images.single_file(kind, root / f"{kind}.safetensors")
    return root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui"])
def test_there_and_back(kind: str, single: bool, to: str, bases: Path, tmp_path: Path) -> None:
    """kohya → another format → kohya keeps names, alphas' meaning and every bit of every ΔW."""
    base = bases / (f"{kind}.safetensors" if single else kind)
    source = loose.kohya(kind, tmp_path / "in.safetensors")
    report = convert(source, tmp_path / "there", ConvertOptions(to), base=base)
    alone = single and kind == "flux"  # Flux's single file is the transformer alone
    assert any("no text encoder" in w for w in report.warnings) == alone
    report = convert(tmp_path / "there", tmp_path / "back.safetensors", ConvertOptions("kohya"), base=base)
    assert report.totals["error"] == 0
    assert same(updates(tmp_path / "back.safetensors"), updates(source))


@pytest.mark.parametrize("kind", ["sd3", "wan", "hunyuan"])
@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui"])
def test_denoisers_alone(kind: str, to: str, tmp_path: Path) -> None:
    """SD3's, Wan's and HunyuanVideo's transformers: there and back, by the names of a folder or of a single file."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model_index.json").write_text("{}")
    images.quiet(images.denoiser(kind).save_pretrained, tmp_path / "base/transformer")
    source = loose.kohya(kind, tmp_path / "in.safetensors", text=False)
    for base in (tmp_path / "base", images.single_file(kind, tmp_path / "single.safetensors")):
        for name in ("there", "back.safetensors"):
            convert(
                source if name == "there" else tmp_path / "there", tmp_path / name,
                ConvertOptions(to if name == "there" else "kohya"), base=base, overwrite=True,
            )  # fmt: skip
        assert same(updates(tmp_path / "back.safetensors"), updates(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui", "kohya"])
def test_merges_alike(kind: str, to: str, bases: Path, tmp_path: Path) -> None:
    """Merged into the folder, the converted adapter gives the weights that the original gives."""
    source = loose.kohya(kind, tmp_path / "in.safetensors")
    convert(source, tmp_path / "there", ConvertOptions(to), base=bases / kind)
    for name, adapter in (("one", source), ("two", tmp_path / "there")):
        merge(bases / kind, [adapter], tmp_path / name)
    files = [f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*.safetensors")]
    for file in files:
        one, two, old = (load_file(root / file) for root in (tmp_path / "one", tmp_path / "two", bases / kind))
        assert all(torch.allclose(one[k], two[k], atol=1e-7, rtol=1e-6) for k in one)
        assert "vae" in file.parts or any(not torch.equal(one[k], old[k]) for k in one) or kind == "flux"


def merged(base: Path, adapter: Path, out: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of each part after our merge, without the `text_model` that files and memory disagree about."""
    merge(base, [adapter], out)
    found = {f.parent.name: load_file(f) for f in out.rglob("*.safetensors") if f.parent.name != "vae"}
    return {part: {k.removeprefix("text_model."): v for k, v in w.items()} for part, w in found.items()}


def agree(model: torch.nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether a model in memory has these weights, to 1e-6."""
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    return all(torch.allclose(state[k], v, atol=1e-6, rtol=1e-6) for k, v in expected.items() if k in state)


def trained(name: str) -> bool:
    """What sd-scripts trains of Flux by default, less linear1, whose height diffusers' converter knows for one size."""
    return "_blocks" in name and "linear1" not in name


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it(kind: str, bases: Path, tmp_path: Path) -> None:
    """PeftModel.from_pretrained finds every key in every part, and its merge is ours."""
    source = loose.kohya(kind, tmp_path / "in.safetensors", alpha=3.0)
    convert(source, tmp_path / "there", ConvertOptions("peft"), base=bases / kind)
    pipe = images.quiet(images.pipeline, kind)
    for part, expected in merged(bases / kind, source, tmp_path / "out").items():
        if (tmp_path / "there" / part).is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message=".*(missing|unexpected).*")
                model = PeftModel.from_pretrained(getattr(pipe, part), tmp_path / "there" / part)
                assert agree(model.merge_and_unload(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [ConvertOptions("diffusers"), ConvertOptions("kohya", portable=True),
                                     ConvertOptions("diffusers", portable=True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_diffusers_loads_it(kind: str, options: ConvertOptions, alpha: float, bases: Path, tmp_path: Path) -> None:
    """load_lora_weights and fuse_lora give our merge of the original, whether alpha is in the header or in factors."""
    only = trained if kind == "flux" and options.to == "kohya" else lambda _: True
    source = loose.kohya(kind, tmp_path / "in.safetensors", only=only, alpha=alpha)
    convert(source, tmp_path / "there", options, base=bases / kind)
    pipe = images.quiet(images.pipeline, kind)
    parts = {"sd1": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}
    images.quiet(pipe.load_lora_weights, tmp_path / "there", weight_name="pytorch_lora_weights.safetensors")
    images.quiet(pipe.fuse_lora, components=parts.get(kind, ["transformer", "text_encoder"]))
    images.quiet(pipe.unload_lora_weights)
    for part, expected in merged(bases / kind, source, tmp_path / "out").items():
        assert agree(getattr(pipe, part), expected), part


def test_parts_with_factors_of_their_own(bases: Path, tmp_path: Path) -> None:
    """diffusers' q, k and v become one fused module: block-diagonal, exact, and rerank brings the rank back down."""
    weights: dict[str, Tensor] = {}
    for name, shape in images.modules(images.denoiser("flux")).items():
        if "attn.to_" in name or "proj_mlp" in name:
            weights |= loose.factors(f"transformer.{name}", shape, alpha=None)
    source = tmp_path / "in.safetensors"
    save_file({k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in weights.items()}, source)
    report = convert(source, tmp_path / "k.safetensors", ConvertOptions("kohya"))
    assert report.totals["rank_max"] == 4 * loose.RANK
    assert "rerank" in report.warnings[0]
    rerank(tmp_path / "k.safetensors", tmp_path / "small.safetensors", RankChoice(rank=12))
    expected = merged(bases / "flux", source, tmp_path / "one")["transformer"]
    assert all(
        torch.allclose(v, expected[k], atol=1e-6)
        for k, v in merged(bases / "flux", tmp_path / "k.safetensors", tmp_path / "two")["transformer"].items()
    )
    there = convert(
        tmp_path / "k.safetensors", tmp_path / "d.safetensors", ConvertOptions("diffusers"), base=bases / "flux"
    )
    assert there.totals["modules"] == len(weights) // 2
    again = updates(tmp_path / "d.safetensors")
    assert all(torch.allclose(again[k], v, atol=1e-6) for k, v in updates(source).items())


def test_a_part_alone(bases: Path, tmp_path: Path) -> None:
    """Only to_q: the rows of k and v are zeros, and the way back drops them again."""
    source = tmp_path / "in.safetensors"
    save_file(loose.factors("transformer.transformer_blocks.0.attn.to_q", (32, 32)), source)
    convert(source, tmp_path / "k.safetensors", ConvertOptions("kohya"), base=bases / "flux")
    ((name, update),) = updates(tmp_path / "k.safetensors").items()
    assert name == "lora_unet_double_blocks_0_img_attn_qkv"
    assert torch.equal(update[:32], next(iter(updates(source).values())))
    assert not update[32:].any()
    convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", ConvertOptions("diffusers"), base=bases / "flux")
    assert same(updates(tmp_path / "d.safetensors"), updates(source))
    save_file(loose.factors("transformer.single_transformer_blocks.0.attn.to_q", (32, 32)), source)
    with pytest.raises(UnsupportedError, match=r"linear1 also holds modules .*; give base"):
        convert(source, tmp_path / "no.safetensors", ConvertOptions("kohya"))
    convert(source, tmp_path / "l.safetensors", ConvertOptions("kohya"), base=bases / "flux")
    assert next(iter(updates(tmp_path / "l.safetensors").values())).shape == (7 * 32, 32)


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_other_products_become_lora(to: str, bases: Path, tmp_path: Path) -> None:
    """LoHa, LoKr, LoCon's core and whole differences come out as plain LoRA with the error that they really have."""
    g = torch.Generator().manual_seed(0)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    parts = {
        "q": {"hada_w1_a": torch.randn(32, 2, generator=g), "hada_w1_b": torch.randn(2, 32, generator=g),
              "hada_w2_a": torch.randn(32, 2, generator=g), "hada_w2_b": torch.randn(2, 32, generator=g)},
        "k": {"lokr_w1": torch.randn(4, 4, generator=g), "lokr_w2_a": torch.randn(8, 2, generator=g),
              "lokr_w2_b": torch.randn(2, 8, generator=g)},
        "v": {"diff": torch.randn(32, 3, generator=g) @ torch.randn(3, 32, generator=g)},
    }  # fmt: skip
    weights = {f"{stem}{leaf}.{name}": t for leaf, found in parts.items() for name, t in found.items()}
    resnet = "lora_unet_down_blocks_0_resnets_0_conv1"
    weights |= {f"{resnet}.lora_up.weight": torch.randn(32, 3, 1, 1, generator=g),
                f"{resnet}.lora_down.weight": torch.randn(3, 32, 1, 1, generator=g),
                f"{resnet}.lora_mid.weight": torch.randn(3, 3, 3, 3, generator=g)}  # fmt: skip
    source = tmp_path / "in.safetensors"
    save_file(weights | {f"{stem}q.alpha": torch.tensor(1.0)}, source)
    report = convert(source, tmp_path / "there", ConvertOptions(to), base=bases / "sd1")
    ranks = {m.name[-1]: m.rank for m in report.modules}
    assert (ranks["q"], ranks["k"], ranks["v"]) == (4, 8, 3)
    assert all(d.form == "lora" for d in open_adapter(tmp_path / "there").deltas.values())
    assert report.totals["error"] < 1e-6
    one = merged(bases / "sd1", source, tmp_path / "one")["unet"]
    two = merged(bases / "sd1", tmp_path / "there", tmp_path / "two")["unet"]
    assert all(torch.allclose(two[k], v, atol=1e-5) for k, v in one.items())


@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui"])
def test_dora_and_biases(to: str, bases: Path, tmp_path: Path) -> None:
    """DoRA's magnitudes and differences of biases are translated with their modules, split ones too."""
    weights: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(0)
    for name, height in (("double_blocks_0_img_attn_qkv", 96), ("double_blocks_0_img_attn_proj", 32)):
        path = f"lora_unet_{name}"
        weights |= loose.factors(path, (height, 32))
        weights[f"{path}.dora_scale"] = 1 + torch.rand(height, 1, generator=g)
        weights[f"{path}.diff_b"] = torch.randn(height, generator=g)
    source = tmp_path / "in.safetensors"
    save_file(weights, source)
    report = convert(source, tmp_path / "there", ConvertOptions(to), base=bases / "flux")
    assert "DoRA" in report.warnings[-1]
    one = merged(bases / "flux", source, tmp_path / "one")["transformer"]
    two = merged(bases / "flux", tmp_path / "there", tmp_path / "two")["transformer"]
    assert all(torch.allclose(two[k], v, atol=1e-6) for k, v in one.items())
    convert(tmp_path / "there", tmp_path / "back.safetensors", ConvertOptions("kohya"), base=bases / "flux")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    kept = [k for k in weights if k.endswith(("dora_scale", "diff_b"))]
    assert all(torch.equal(back[k], weights[k]) for k in kept)
    assert same(updates(tmp_path / "back.safetensors"), updates(source))


def test_metadata_goes_along(bases: Path, tmp_path: Path) -> None:
    """What a trainer wrote stays; ss_network_* and the hashes say what is there now."""
    source = loose.kohya("sd1", tmp_path / "in.safetensors")
    weights = load_file(source)
    save_file(weights, source, metadata(source) | {"modelspec.title": "cat", "ss_tag_frequency": "{}"})
    convert(source, tmp_path / "there", ConvertOptions("peft"), base=bases / "sd1")
    convert(
        tmp_path / "there", tmp_path / "back.safetensors", ConvertOptions("kohya", portable=True), base=bases / "sd1"
    )
    found = metadata(tmp_path / "back.safetensors")
    assert found["modelspec.title"] == "cat"
    assert found["ss_tag_frequency"] == "{}"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    raw = (tmp_path / "back.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert "format" not in found or found["format"] == "pt"


def test_a_language_model_made_portable(tmp_path: Path) -> None:
    """Ranks, alphas, rsLoRA and patterns become one rank with alpha = r, which every server takes and PEFT reloads."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}
    models.peft_adapter(
        "llama", tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **patterns
    )
    report = convert(tmp_path / "a", tmp_path / "b", ConvertOptions("peft", portable=True))
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for server in ("peft", "vllm", "sglang", "llama.cpp"):
        assert check(tmp_path / "b", server).totals["serves"]
    assert report.totals["error"] < 1e-7
    assert (
        models.relative(models.peft_deltas("llama", tmp_path / "b"), models.peft_deltas("llama", tmp_path / "a")) < 1e-6
    )


# A maker's name, options, the error and its words.
REFUSALS: list[tuple[str, ConvertOptions, type[Exception], str]] = [
    ("kohya", ConvertOptions("peft"), UnsupportedError, "underscores.*give base"),
    ("norms", ConvertOptions("diffusers"), UnsupportedError, "difference of a vector.*to='kohya' keeps it"),
    ("llama", ConvertOptions("kohya"), UnsupportedError, "no image model.*PEFT's format"),
    ("saved", ConvertOptions("peft", portable=True), UnsupportedError, "stored whole.*not every server takes"),
    ("dora", ConvertOptions("peft", portable=True), UnsupportedError, "is DoRA, which not every server takes; with base=BASE"),
    ("kohya", ConvertOptions("safetensors"), UsageError, "expected one of peft, kohya"),
    ("kohya", ConvertOptions("peft", rank=0), UsageError, "rank=0"),
    ("tokens", ConvertOptions("peft"), UnsupportedError, "single rows.*merged but not converted"),
    ("lora bias", ConvertOptions("peft", portable=True), UnsupportedError, "has a bias, which not every server"),
    ("norms", ConvertOptions("kohya", portable=True), UnsupportedError, "a vector, which not every reader takes"),
    ("bias", ConvertOptions("diffusers", portable=True), UnsupportedError, "a vector, which not every reader takes"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_refused_by_name(case: int, tmp_path: Path) -> None:
    """What the new format can't say is refused with the reason and the next move; nothing is written."""
    kind, options, error, words = REFUSALS[case]
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    files = {
        "kohya": loose.factors(stem, (64, 64)), "norms": {"unet.mid_block.resnets.0.norm1.w_norm": torch.ones(64)},
        "bias": loose.factors(stem, (64, 64)) | {f"{stem}.diff_b": torch.ones(64)},
    }  # fmt: skip
    extra: dict[str, dict[str, object]] = {
        "llama": {}, "saved": {"modules_to_save": ["norm"]}, "dora": {"use_dora": True},
        "tokens": {"trainable_token_indices": [1, 2]}, "lora bias": {"lora_bias": True},
    }  # fmt: skip
    if kind in files:
        source = tmp_path / "in.safetensors"
        save_file(files[kind], source)
    else:
        source = tmp_path / "in"
        models.peft_adapter("llama", source, r=4, target_modules=["q_proj", "v_proj"], **extra[kind])
    with pytest.raises(error, match=words):
        convert(source, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_lycoris_own_prefix_names_no_part(single: bool, to: str, bases: Path, tmp_path: Path) -> None:
    """`lycoris_` stands before U-Net and text encoder alike; the base tells which is which, and every bit is kept."""
    base = bases / ("sd1.safetensors" if single else "sd1")
    source = loose.kohya("sd1", tmp_path / "in.safetensors")
    weights = load_file(source)
    renamed = {re.sub("^lora_(unet|te)_", "lycoris_", key): tensor for key, tensor in weights.items()}
    assert len(renamed) == len(weights)
    save_file(renamed, tmp_path / "lycoris.safetensors")
    assert any(key.startswith("lycoris_text_model_") for key in renamed)
    for name in ("in", "lycoris"):
        convert(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-out.safetensors", ConvertOptions(to), base=base)
    assert same(updates(tmp_path / "lycoris-out.safetensors"), updates(tmp_path / "in-out.safetensors"))
    if to == "kohya":
        assert {n for n in updates(tmp_path / "lycoris-out.safetensors") if n.startswith("lora_te_")} == {
            n for n in updates(source) if n.startswith("lora_te_")
        }


def test_lycoris_text_modules_need_a_base(tmp_path: Path) -> None:
    """Without a base the prefix means the denoiser, whose names no text encoder has: the line asks for one."""
    save_file({re.sub("^lora_te_", "lycoris_", k): t for k, t in loose.text_part("lora_te_", images.text_encoder()).items()},
              tmp_path / "in.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"lycoris_text_model_.* has underscores where .*give base"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", ConvertOptions("diffusers"))


def test_another_base_is_refused(bases: Path, tmp_path: Path) -> None:
    """With --base every module must be one of the base's, in its shape."""
    source = loose.kohya("sdxl", tmp_path / "in.safetensors")
    with pytest.raises(
        MismatchError,
        match=r"173 of 325 modules match no tensor in .*: lora_unet_input_blocks_4_1_transformer_blocks_1",
    ):
        convert(source, tmp_path / "out", ConvertOptions("peft"), base=bases / "sd1")
    save_file(loose.text_part("lora_te1_", images.text_encoder()), tmp_path / "text.safetensors")
    with pytest.raises(MismatchError, match="is for nothing else; leave base out"):
        convert(
            tmp_path / "text.safetensors", tmp_path / "out", ConvertOptions("peft"), base=bases / "flux.safetensors"
        )
    convert(tmp_path / "text.safetensors", tmp_path / "text", ConvertOptions("peft"))
    found = {k.removeprefix("text_encoder.").replace(".", "_"): v for k, v in updates(tmp_path / "text").items()}
    assert same(found, {k.partition("text_model_")[2]: v for k, v in updates(tmp_path / "text.safetensors").items()})
    with pytest.raises(UsageError, match="a PEFT adapter is a folder"):
        convert(source, tmp_path / "out.safetensors", ConvertOptions("peft"), base=bases / "sdxl")
    report = convert(source, tmp_path / "out", ConvertOptions("peft"), base=bases / "sdxl", dry_run=True)
    assert report.totals["modules"] == report.totals["modules_in"] > 100
    assert not (tmp_path / "out").exists()


def test_parts_of_a_pipeline_as_peft_folders(bases: Path, tmp_path: Path) -> None:
    """A folder of PEFT adapters by part is one adapter: reranked and blended it stays one, and merges as such."""
    source = loose.kohya("sdxl", tmp_path / "in.safetensors")
    convert(source, tmp_path / "parts", ConvertOptions("peft"), base=bases / "sdxl")
    assert {f.name for f in (tmp_path / "parts").iterdir()} == {
        "unet", "text_encoder", "text_encoder_2", "lorasurgery.json",
    }  # fmt: skip
    rerank(tmp_path / "parts", tmp_path / "small", RankChoice(rank=2))
    rerank(source, tmp_path / "small.safetensors", RankChoice(rank=2))
    one = merged(bases / "sdxl", tmp_path / "small", tmp_path / "one")
    two = merged(bases / "sdxl", tmp_path / "small.safetensors", tmp_path / "two")
    assert all(torch.allclose(one[part][k], v, atol=1e-6) for part in two for k, v in two[part].items())
    blend([tmp_path / "parts", tmp_path / "parts"], tmp_path / "half", BlendOptions(weights=[0.25, 0.25]))
    half = merged(bases / "sdxl", tmp_path / "half", tmp_path / "three")
    merge(bases / "sdxl", [source], tmp_path / "four", weights=[0.5])
    whole = load_file(tmp_path / "four/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(half["unet"][k], v, atol=1e-6) for k, v in whole.items())


def test_looking_at_other_products(tmp_path: Path) -> None:
    """inspect and diff take whole differences and LoHa as they take LoRA."""
    g = torch.Generator().manual_seed(0)
    weights = {
        "lora_unet_a.diff": torch.randn(12, 8, generator=g), "lora_unet_b.hada_w1_a": torch.randn(12, 2, generator=g),
        "lora_unet_b.hada_w1_b": torch.randn(2, 8, generator=g), "lora_unet_b.hada_w2_a": torch.randn(12, 2, generator=g),
        "lora_unet_b.hada_w2_b": torch.randn(2, 8, generator=g), "lora_unet_c.diff": torch.randn(8, 12, generator=g),
    }  # fmt: skip
    save_file(weights, tmp_path / "a.safetensors")
    found = {m.name: m.singular_values for m in inspect(tmp_path / "a.safetensors", spectrum=True).modules}
    for name, delta in updates(tmp_path / "a.safetensors").items():
        expected = torch.linalg.svdvals(delta.double())
        assert torch.allclose(torch.tensor(found[name], dtype=torch.float64), expected[: len(found[name])], rtol=1e-5)
    save_file({k: v if "hada_w1_a" not in k else -v for k, v in weights.items()}, tmp_path / "b.safetensors")
    cosines = [m.cosine for m in diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").modules]
    assert cosines == pytest.approx([1, -1, 1], abs=1e-6)


def test_flat_convolutions_get_their_kernel_from_the_base(bases: Path, tmp_path: Path) -> None:
    """LoKr holds a convolution flat; the LoRA made of it has the kernel that loaders build the layer with."""
    g = torch.Generator().manual_seed(0)
    path = "lora_unet_down_blocks_0_resnets_0_conv1"
    source = tmp_path / "in.safetensors"
    parts = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8 * 9)}
    save_file({f"{path}.{k}": torch.randn(v, generator=g) for k, v in parts.items()}, source)
    convert(source, tmp_path / "there", ConvertOptions("diffusers"), base=bases / "sd1")
    down = load_file(tmp_path / "there/pytorch_lora_weights.safetensors")
    assert [t.shape[1:] for k, t in down.items() if "lora_A" in k] == [(32, 3, 3)]
    one = merged(bases / "sd1", source, tmp_path / "one")["unet"]
    pipe = images.quiet(images.pipeline, "sd1")
    images.quiet(pipe.load_lora_weights, tmp_path / "there", weight_name="pytorch_lora_weights.safetensors")
    images.quiet(pipe.fuse_lora, components=["unet"])
    images.quiet(pipe.unload_lora_weights)
    assert all(torch.allclose(v, one[k], atol=1e-5) for k, v in pipe.unet.state_dict().items())


def test_a_folder_of_adapters(bases: Path, tmp_path: Path) -> None:
    """Each is converted under its own name; one that is broken is named and the others are done."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        loose.kohya("sd1", tmp_path / f"in/{name}.safetensors")
    (tmp_path / "in/c.safetensors").write_bytes(b"broken")
    report = convert(tmp_path / "in", tmp_path / "out", ConvertOptions("peft"), base=bases / "sd1")
    assert (report.totals["adapters"], report.totals["failed"]) == (3, 1)
    assert same(updates(tmp_path / "out/a"), updates(tmp_path / "out/b"))
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"a", "b"}


def test_names_that_only_a_base_tells(tmp_path: Path) -> None:
    """Of SD3 the last block is unlike the others, so without a base its modulation has no name in the original."""
    source = tmp_path / "in.safetensors"
    names = ("pos_embed.proj", "transformer_blocks.1.norm1_context.linear")
    save_file({k: v for n in names for k, v in loose.factors(f"transformer.{n}", (64, 32), alpha=None).items()}, source)
    with pytest.raises(UnsupportedError, match=r"the original's name of .*norm1_context.linear.*; give base"):
        convert(source, tmp_path / "out.safetensors", ConvertOptions("kohya"))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS), to=st.sampled_from(["peft", "diffusers", "comfyui"]), seed=st.integers(0, 99),
    alpha=st.sampled_from([0.5, 1.0, 2.7, 3.0, 12.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_part_of_any_adapter(
    kind: str,
    to: str,
    seed: int,
    alpha: float,
    dtype: torch.dtype,
    bases: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever modules, ranks, alphas and dtype a kohya file has, it comes back with the same bits in every ΔW."""
    root = tmp_path_factory.mktemp("any")
    full = load_file(loose.kohya(kind, root / "full.safetensors"))
    rng = random.Random(seed)
    paths = sorted({k.partition(".")[0] for k in full})
    weights: dict[str, Tensor] = {}
    for path in rng.sample(paths, rng.randint(1, 12)):
        rank = rng.randint(1, 4)
        weights[f"{path}.lora_down.weight"] = full[f"{path}.lora_down.weight"][:rank].contiguous().to(dtype)
        weights[f"{path}.lora_up.weight"] = full[f"{path}.lora_up.weight"][:, :rank].contiguous().to(dtype)
        if rng.random() < 0.8:
            weights[f"{path}.alpha"] = torch.tensor(alpha * rng.choice([1, 2, 5]), dtype=dtype)
    save_file(weights, root / "in.safetensors")
    convert(root / "in.safetensors", root / "there", ConvertOptions(to), base=bases / kind)
    convert(root / "there", root / "back.safetensors", ConvertOptions("kohya"), base=bases / kind)
    assert same(updates(root / "back.safetensors"), updates(root / "in.safetensors"))


def test_strength_one_means_the_same_everywhere(bases: Path, tmp_path: Path) -> None:
    """A float16 file with alpha = r/2: the scale goes into the factors, for ComfyUI does not read diffusers' header."""
    source = loose.kohya("sdxl", tmp_path / "in.safetensors")
    save_file({k: v.to(torch.float16) for k, v in load_file(source).items()}, source, metadata(source))
    report = convert(source, tmp_path / "there.safetensors", ConvertOptions("diffusers"), base=bases / "sdxl")
    assert report.totals["alpha_in_header_only"] == 0
    assert not report.warnings
    assert all(d.scale == 1 for d in open_adapter(tmp_path / "there.safetensors").deltas.values())
    assert report.totals["error"] == 0
    source = loose.kohya("sdxl", tmp_path / "thirds.safetensors", alpha=3.0)
    report = convert(source, tmp_path / "thirds-d.safetensors", ConvertOptions("diffusers"), base=bases / "sdxl")
    assert report.totals["alpha_in_header_only"] > 0
    assert "portable=True" in report.warnings[0]


@pytest.mark.parametrize("rank", [None, 6, 32])
def test_dora_becomes_plain_lora(rank: int | None, tmp_path: Path) -> None:
    """With --portable and --base: the best LoRA of the difference that DoRA makes, and the error that it really has."""
    base = models.save(models.make("gpt2"), tmp_path / "base")
    peft = models.peft_adapter("gpt2", tmp_path / "a", r=3, target_modules=["c_attn", "c_fc", "wte"], use_dora=True)
    report = convert(tmp_path / "a", tmp_path / "b", ConvertOptions("peft", portable=True, rank=rank), base=base)
    before = models.make("gpt2").state_dict()
    after = {k.replace("base_model.model.", ""): v for k, v in peft.merge_and_unload().state_dict().items()}
    lost = change = 0.0
    deltas = models.peft_deltas("gpt2", tmp_path / "b")
    for module in report.modules:
        exact = (after[f"{module.name}.weight"] - before[f"{module.name}.weight"]).double()
        best = torch.linalg.svdvals(exact)[rank or 3 :].norm() / exact.norm()
        found = (exact - deltas[module.name]).norm() / exact.norm()
        assert module.error == pytest.approx(float(found), rel=1e-3, abs=1e-5)
        assert float(found) <= float(best) * 1.001 + 1e-5
        lost, change = lost + float((exact - deltas[module.name]).norm()) ** 2, change + float(exact.norm()) ** 2
    assert report.totals["error"] == pytest.approx((lost / change) ** 0.5, rel=1e-3, abs=1e-5)
    assert check(tmp_path / "b", "vllm", max_lora_rank=32).totals["serves"]
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert not config["use_dora"]


@pytest.mark.parametrize("axis", [0, 1])
def test_lycoris_dora_becomes_plain_lora(axis: int, bases: Path, tmp_path: Path) -> None:
    """LyCORIS's DoRA along either axis, fused rows and a convolution too; at full rank nothing is lost."""
    g = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    kind = "sd1" if axis else "flux"
    shapes = {
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
        "down_blocks_0_resnets_0_conv1": (32, 32, 3, 3),
    }
    if kind == "flux":
        shapes = {"double_blocks_0_img_attn_qkv": (96, 32), "double_blocks_0_img_attn_proj": (32, 32)}
    for name, shape in shapes.items():
        weights |= loose.factors(f"lora_unet_{name}", shape)
        size = [1] * len(shape)
        size[axis] = shape[axis]
        weights[f"lora_unet_{name}.dora_scale"] = 0.5 + torch.rand(size, generator=g)
    source = tmp_path / "in.safetensors"
    save_file(weights, source)
    options = ConvertOptions("diffusers", portable=True, rank=32)
    report = convert(source, tmp_path / "there", options, base=bases / kind)
    assert report.totals["error"] < 5e-6  # float32 factors
    part = "unet" if axis else "transformer"
    one = merged(bases / kind, source, tmp_path / "one")[part]
    two = merged(bases / kind, tmp_path / "there", tmp_path / "two")[part]
    assert all(torch.allclose(two[k], v, atol=1e-5) for k, v in one.items())
    low = convert(source, tmp_path / "low", ConvertOptions("kohya", portable=True, rank=2), base=bases / kind)
    assert 0.1 < low.totals["error"] < 1
