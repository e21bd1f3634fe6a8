"""check for image models: diffusers itself is run on every case, ComfyUI's rules are held against its own words."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import images
import loose
import pytest
import torch
from loose import Weights
from safetensors.torch import load_file, save_file

from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.merge import merge

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
Case = Callable[[], tuple[Weights, dict[str, str]]]


@lru_cache
def bases() -> dict[str, Path]:
    """Where the tiny pipelines lie; filled by the fixture below."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def _pipelines(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in ("sd1", "flux"):
        bases()[kind] = images.save_pipeline(images.pipeline(kind), tmp_path_factory.mktemp(kind) / "base")


def kohya(kind: str) -> tuple[Weights, str]:
    """Two modules of kohya's, and the name of the first."""
    names = {
        "sd1": ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"],
        "flux": ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_0_txt_attn_proj"],
    }[kind]  # fmt: skip
    return {k: v for n in names for k, v in loose.factors(n, (32, 32)).items()}, names[0]


def without(weights: Weights, name: str) -> Weights:
    return {k: v for k, v in weights.items() if not k.startswith(name + ".")}


def changed(kind: str, change: str) -> Weights:
    """kohya's file with one module written otherwise, or something beside it."""
    weights, name = kohya(kind)
    up, down = weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]
    rest = without(weights, name)
    norm = (
        "lora_unet_down_blocks_0_attentions_0_norm"
        if kind == "sd1"
        else "lora_unet_double_blocks_0_img_attn_norm_query_norm"
    )
    size = 32 if kind == "sd1" else 16
    text = images.text_encoder()
    return {
        "plain": lambda: weights,
        "dora": lambda: weights | {f"{name}.dora_scale": torch.rand(32, 1) + 0.5},
        "loha": lambda: rest | {f"{name}.hada_w{i}_{s}": t for i in (1, 2) for s, t in (("a", up), ("b", down))},
        "lokr": lambda: rest | {f"{name}.lokr_w1": torch.randn(4, 4), f"{name}.lokr_w2": torch.randn(8, 8)},
        "full": lambda: rest | {f"{name}.diff": up @ down},
        "norm": lambda: weights | {f"{norm}.w_norm": torch.randn(size)},
        "bias": lambda: weights | {f"{name.replace('to_q', 'to_out_0')}.diff_b": torch.randn(32)},
        "alphas": lambda: weights | {f"{name}.alpha": torch.tensor(4.0)},
        "text alphas": lambda: weights | loose.text_part("lora_te_" if kind == "sd1" else "lora_te1_", text)
        | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha".replace("te_", "te_" if kind == "sd1" else "te1_", 1): torch.tensor(4.0)},
        "ranks": lambda: weights | loose.factors(name, (32, 32), rank=2),
        "no alpha": lambda: {k: v for k, v in weights.items() if not k.endswith(".alpha")},
        "one alpha": lambda: {k: v for k, v in weights.items() if k != f"{name}.alpha"},
        "text": lambda: weights | loose.text_part("lora_te_" if kind == "sd1" else "lora_te1_", text),
        "t5": lambda: weights | loose.factors("lora_te3_encoder_block_0_layer_0_SelfAttention_q", (32, 32)),
    }[change]()  # fmt: skip


def diffusers(kind: str, change: str) -> tuple[Weights, dict[str, str]]:
    """A file under diffusers' or the original's names."""
    part = "unet" if kind == "sd1" else "transformer"
    names = {
        "sd1": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.proj_in"],
        "flux": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k"],
    }[kind]
    kernel = {"down_blocks.0.attentions.0.proj_in": (1, 1)}
    style = {"native": "diffusion_model."}.get(change, f"{part}.")
    named = ".default" if change == "named" else ""
    weights: Weights = {}
    for name in names:
        made = loose.factors(name, (32, 32, *kernel.get(name, ())))
        weights[f"{style}{name}.lora_A{named}.weight"] = made[f"{name}.lora_down.weight"]
        weights[f"{style}{name}.lora_B{named}.weight"] = made[f"{name}.lora_up.weight"]
        if change.startswith("alpha tensors"):
            weights[f"{style}{name}.alpha"] = made[f"{name}.alpha"]
        if change == "dora":
            weights[f"{style}{name}.lora_magnitude_vector"] = (
                torch.rand(1, 32, 1, 1) + 0.5 if name in kernel else torch.rand(32) + 0.5
            )
        if change == "flat dora":
            weights[f"{style}{name}.lora_magnitude_vector"] = torch.rand(32) + 0.5
    if change == "text":
        q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        weights |= {f"{q}.lora_A.weight": torch.randn(4, 32), f"{q}.lora_B.weight": torch.randn(32, 4)}
    if change == "loha":
        pair = ((32, 4), (4, 32))
        weights = {
            f"{style}{n}.hada_w{i}_{s}": 0.1 * torch.randn(*pair[s == "b"])
            for n in names[:1]
            for i in (1, 2)
            for s in "ab"
        }
    header = {
        f"{part}.r": 4,
        f"{part}.lora_alpha": 2,
        f"{part}.target_modules": names,
        f"{part}.use_dora": change == "dora",
    }
    told = change in ("header", "dora", "alpha tensors and header", "rslora")
    header |= {f"{part}.use_rslora": True} if change == "rslora" else {}
    plain = {"alpha": "2"} if change == "plain alpha" else {}
    return weights, {"format": "pt"} | plain | ({"lora_adapter_metadata": json.dumps(header)} if told else {})


def served(kind: str, file: Path, tmp: Path) -> bool | str:
    """Whether diffusers' fused pipeline is the one that merge writes; `rejected` when it raises."""
    merge(bases()[kind], [file], tmp / "merged", overwrite=True)
    ours = {f"{p}.{k}": v for p in PARTS if (tmp / "merged" / p).is_dir()
            for f in (tmp / "merged" / p).glob("*.safetensors") for k, v in load_file(f).items()}  # fmt: skip
    pipe = images.pipeline(kind)
    try:
        images.quiet(pipe.load_lora_weights, str(file.parent), weight_name=file.name)
    except (ValueError, KeyError, RuntimeError):
        return "rejected"
    loaded = [p for p in PARTS if getattr(getattr(pipe, p, None), "peft_config", None)]
    if loaded:
        images.quiet(pipe.fuse_lora, components=loaded)
        pipe.unload_lora_weights()
    state = {
        f"{p}.{k}": v
        for p in PARTS
        if getattr(pipe, p, None) is not None
        for k, v in getattr(pipe, p).state_dict().items()
    }
    return all(torch.allclose(state[k], v, atol=1e-6) for k, v in ours.items() if k in state)


KOHYA = ["plain", "dora", "loha", "lokr", "full", "norm", "bias", "ranks", "no alpha", "one alpha", "alphas", "text",
         "text alphas"]  # fmt: skip
DIFFUSERS = ["plain", "header", "rslora", "dora", "alpha tensors", "alpha tensors and header", "plain alpha", "named", "native",
             "text", "loha", "flat dora"]  # fmt: skip
CASES = [(kind, "kohya", c) for kind in ("sd1", "flux") for c in KOHYA]
CASES += [(kind, "diffusers", c) for kind in ("sd1", "flux") for c in DIFFUSERS]


@pytest.mark.parametrize(("kind", "style", "change"), CASES, ids=str)
def test_what_diffusers_serves(kind: str, style: str, change: str, tmp_path: Path) -> None:
    """check says `serves` exactly when diffusers' own fused weights are ours, `rejected` when it raises; mends mend."""
    weights, metadata = (changed(kind, change), {}) if style == "kohya" else diffusers(kind, change)
    file = tmp_path / "a.safetensors"
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, file, metadata)
    totals = check(file, "diffusers", base=bases()[kind]).totals
    truth = served(kind, file, tmp_path)
    assert totals["serves"] == (truth is True), (truth, totals["findings"])
    assert any(f["verdict"] == "rejected" for f in totals["findings"]) == (truth == "rejected"), totals["findings"]
    if mended(file, totals["findings"], bases()[kind]):
        assert check(tmp_path / "OUT.safetensors", "diffusers").totals["serves"]
        assert served(kind, tmp_path / "OUT.safetensors", tmp_path) is True


def mended(file: Path, findings: list[dict[str, str]], base: Path) -> bool:
    """Carry out the command that is named, where one and the same mends all."""
    commands = {f["mend"] for f in findings}
    out = file.parent / "OUT.safetensors"
    command = commands.pop() if len(commands) == 1 else ""
    if " convert " in command:
        to = "kohya" if "--to kohya" in command else "diffusers"
        convert(file, out, ConvertOptions(to), base=base)
    return out.exists()


@pytest.mark.parametrize("left_out", ["cross_attn_k", "ffn_2", ""])
def test_diffusers_wan(left_out: str, tmp_path: Path) -> None:
    """Wan's converter raises when a block lacks one of its modules, and check says so."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    leaves = [f"{a}_{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn_0", "ffn_2"]
    names = [f"lora_unet_blocks_{b}_{leaf}" for b in (0, 1) for leaf in leaves if b == 0 or leaf != left_out]
    file = tmp_path / "a.safetensors"
    save_file({k: v for n in names for k, v in loose.factors(n, (24, 24)).items()}, file)
    try:
        images.quiet(WanLoraLoaderMixin.lora_state_dict, str(tmp_path), weight_name=file.name)
    except KeyError:
        assert [f["verdict"] for f in check(file, "diffusers").totals["findings"]] == ["rejected"]
    else:
        assert check(file, "diffusers").totals["serves"]
        assert not left_out


def comfy(weights: Weights, tmp_path: Path, metadata: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """What check says of a file for ComfyUI."""
    file = tmp_path / "a.safetensors"
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, file, metadata or {})
    return [(f["verdict"], f["what"]) for f in check(file, "comfyui").totals["findings"]]


def test_comfyui_takes_kohya_and_lycoris(tmp_path: Path) -> None:
    """LoRA, LoHa, LoKr, differences, norms and biases of kohya's and LyCORIS's files are all in its tables."""
    for kind in ("sd1", "flux"):
        for change in ("plain", "loha", "lokr", "full", "norm", "bias", "ranks", "alphas", "one alpha", "text", "t5"):
            assert comfy(changed(kind, change), tmp_path) == [], change


COMFY: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("flux", "plain", []),
    ("flux", "native", []),
    ("flux", "alpha tensors", []),
    ("flux", "header", [("wrong", "in the header only")]),
    ("flux", "plain alpha", [("wrong", "in the header only")]),
    ("flux", "dora", [("wrong", "in the header only"), ("dropped", "lora_magnitude_vector")]),
    ("flux", "text", []),
    ("sd1", "plain", [("dropped", "attn1.to_q")]),
    ("sd1", "header", [("wrong", "in the header only"), ("dropped", "attn1.to_q")]),
    ("sd1", "alpha tensors", [("dropped", "attn1.to_q")]),
]


@pytest.mark.parametrize(("kind", "change", "said"), COMFY, ids=str)
def test_comfyui_and_diffusers_names(kind: str, change: str, said: list[tuple[str, str]], tmp_path: Path) -> None:
    """What ComfyUI would not load is what its own files say; a conversion to kohya's names mends all but DoRA."""
    weights, metadata = diffusers(kind, change)
    found = comfy(weights, tmp_path, metadata)
    assert len(found) == len(said)
    assert all(v == w and word in what for (v, what), (w, word) in zip(found, said, strict=True)), found
    if change != "dora":
        out = tmp_path / "out.safetensors"
        convert(tmp_path / "a.safetensors", out, ConvertOptions("kohya"), base=bases()[kind])
        assert check(out, "comfyui", base=bases()[kind]).totals["serves"]


def test_comfyui_dora(tmp_path: Path) -> None:
    """dora_scale for each output feature is divided by the base's norm there; for each input feature it is the sum's."""
    weights, name = kohya("sd1")
    assert comfy(weights | {f"{name}.dora_scale": torch.rand(32, 1)}, tmp_path)[0][0] == "wrong"
    assert comfy(weights | {f"{name}.dora_scale": torch.rand(1, 32)}, tmp_path) == []


def test_comfyui_text_encoders_and_biases(tmp_path: Path) -> None:
    """Text encoders need text_model in their keys; lora_B.bias and a third encoder under diffusers' names are not known."""
    weights, _ = diffusers("flux", "text")
    short = {k.replace("text_model.", ""): v for k, v in weights.items()}
    assert [v for v, _ in comfy(short, tmp_path)] == ["dropped"]
    bias = weights | {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.randn(32)}
    assert "lora_B.bias" in comfy(bias, tmp_path)[0][1]


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp", "peft"])
def test_language_servers_and_loose_files(server: str, tmp_path: Path) -> None:
    """A kohya or diffusers file is not a PEFT folder, and that is all that is said."""
    for name, weights in (("k", kohya("flux")[0]), ("d", diffusers("flux", "plain")[0])):
        file = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in weights.items()}, file)
        found = check(file, server).totals["findings"]
        assert [f["verdict"] for f in found] == ["rejected"]
        assert f"lorasurgery convert {file} --to peft" in found[0]["mend"]
        convert(file, tmp_path / f"{name}{server}", ConvertOptions("peft"), base=bases()["flux"])
        assert check(tmp_path / f"{name}{server}", "peft").totals["serves"]


@pytest.mark.parametrize(
    ("kind", "style"), [("sd3", "kohya"), ("sd3", "comfyui"), ("wan", "kohya"), ("wan", "comfyui")]
)
def test_diffusers_other_models(kind: str, style: str, tmp_path: Path) -> None:
    """SD3's loader translates no names, Wan's does: what diffusers' own lora_state_dict leaves for the transformer."""
    from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin, WanLoraLoaderMixin

    native = {
        "sd3": ["joint_blocks.0.x_block.attn.qkv"],
        "wan": [f"blocks.0.{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"]
        + ["blocks.0.ffn.0", "blocks.0.ffn.2"],
    }[kind]
    weights: Weights = {}
    for name in native:
        made = loose.factors(name, (96, 32) if kind == "sd3" else (24, 24), alpha=2.0 if style == "kohya" else None)
        stem = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
        for key, value in made.items():
            leaf = key.removeprefix(f"{name}.")
            leaf = leaf if style == "kohya" else leaf.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            weights[f"{stem}.{leaf}"] = value
    file = tmp_path / "a.safetensors"
    save_file(weights, file)
    loader = SD3LoraLoaderMixin if kind == "sd3" else WanLoraLoaderMixin
    state = images.quiet(loader.lora_state_dict, str(tmp_path), weight_name=file.name)
    translated = any(k.startswith("transformer.") for k in state)
    assert check(file, "diffusers").totals["serves"] == translated
