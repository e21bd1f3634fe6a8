"""Adapter files without a config: which family a key belongs to, what alpha is, and what is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.single_file.header import KEY
from lorasurgery.adapters.single_file.read import is_loose, read_loose
from lorasurgery.errors import FormatError, MismatchError, SurgeryError, UnsupportedError

DOWN, UP = torch.ones(4, 6), torch.ones(8, 4)
DIFFUSERS = "unet.mid_block.attentions.0.to_q"
STYLES = {
    "kohya": ("lora_unet_mid_block_attentions_0_proj_in", "lora_down.weight", "lora_up.weight", "kohya"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya"),
    "SimpleTuner": ("lycoris_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya"),
    "diffusers": (DIFFUSERS, "lora_A.weight", "lora_B.weight", "diffusers"),
    "diffusers, adapter's name left in": (DIFFUSERS, "lora_A.default.weight", "lora_B.default.weight", "diffusers"),
    "diffusers before PEFT": (DIFFUSERS, "lora.down.weight", "lora.up.weight", "diffusers"),
    "older diffusers": (DIFFUSERS, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "diffusers"),
    "ComfyUI": ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_A.weight", "lora_B.weight", "comfyui"),
    "BFL": ("double_blocks.0.img_attn.qkv", "lora_A.weight", "lora_B.weight", "comfyui"),
}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path / "lora.safetensors", metadata)
    return path / "lora.safetensors"


def diffusers_file(path: Path, config: dict[str, object], name: str = DIFFUSERS) -> Path:
    metadata = {KEY: json.dumps({f"unet.{k}": v for k, v in config.items()})}
    return write(path, {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}, metadata)


@pytest.mark.parametrize("style", STYLES)
def test_styles(style: str, tmp_path: Path) -> None:
    """Everyone's keys are the same two factors, found in a file and in the folder it alone lies in; alpha is the rank."""
    name, down, up, form = STYLES[style]
    file = write(tmp_path, {f"{name}.{down}": DOWN, f"{name}.{up}": UP})
    for path in (file, tmp_path):
        adapter = open_adapter(path)
        delta = adapter.deltas[name]
        assert (adapter.format, delta.rank, delta.alpha, delta.scale, delta.shape) == (form, 4, 4.0, 1.0, (8, 6))
        assert torch.equal(adapter.load(delta).dense(), UP @ DOWN)


OLD = {
    "unet.mid.attn1.processor.to_q_lora": "unet.mid.attn1.to_q",
    "unet.mid.attn1.processor.to_out_lora": "unet.mid.attn1.to_out.0",
    "text_encoder.layers.0.self_attn.to_out_lora": "text_encoder.layers.0.self_attn.out_proj",
    "double_blocks.3.processor.qkv_lora2": "double_blocks.3.txt_attn.qkv",
    "double_blocks.3.processor.proj_lora1": "double_blocks.3.img_attn.proj",
    "single_blocks.3.processor.proj_lora": "single_blocks.3.linear2",
}


@pytest.mark.parametrize("name", OLD)
def test_names_that_were_put_in_processors(name: str, tmp_path: Path) -> None:
    """diffusers before PEFT and XLabs hang the factors on the attention processor; the layer is meant."""
    file = write(tmp_path, {f"{name}.down.weight": DOWN, f"{name}.up.weight": UP})
    assert list(read_loose(file).deltas) == [OLD[name]]


@pytest.mark.parametrize(("config", "alpha", "scale"), [
    ({"lora_alpha": 8}, 8.0, 2.0),
    ({}, 8.0, 2.0),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 2.0, 0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"^mid_block.attentions.0.to_q": 2}}, 2.0, 0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2}}, 8.0, 2.0),
    ({"lora_alpha": 8, "use_rslora": True}, 8.0, 4.0),
])  # fmt: skip
def test_alpha_in_the_header(config: dict[str, object], alpha: float, scale: float, tmp_path: Path) -> None:
    """diffusers' lora_adapter_metadata is PEFT's config with a prefix, patterns and rsLoRA included; PEFT's default is 8."""
    delta = read_loose(diffusers_file(tmp_path, {"r": 4} | config)).deltas[DIFFUSERS]
    assert (delta.alpha, delta.scale) == (alpha, scale)


@pytest.mark.parametrize("more", [0, 20_000])
def test_an_anchored_pattern_is_of_one_module(more: int, tmp_path: Path) -> None:
    """diffusers writes ^PATH for each module, which PEFT reads as that path from its first letter on; many are looked up."""
    said = {"^proj_out": 2, "^blocks.0.to_q": 3}
    patterns = said | {f"^blocks.{i}.to_q": 4 for i in range(1, more)}
    paths = ["proj_out", "blocks.0.proj_out", "blocks.0.to_q"]
    weights = {f"unet.{p}.lora_{side}.weight": DOWN if side == "A" else UP for p in paths for side in "AB"}
    config = {"unet.r": 4, "unet.lora_alpha": 1, "unet.alpha_pattern": patterns}
    found = read_loose(write(tmp_path, weights, {KEY: json.dumps(config)})).deltas
    for path in paths:
        assert found[f"unet.{path}"].alpha == said.get(get_pattern_key(said.keys(), path), 1), path


def test_an_alpha_tensor_goes_before_the_header(tmp_path: Path) -> None:
    """Who reads tensors and who reads headers must agree; where they don't, the module's own word counts."""
    name = STYLES["kohya"][0]
    tensors = {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP}
    assert read_loose(write(tmp_path, tensors, {"alpha": "2"})).deltas[name].scale == 0.5
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    assert read_loose(write(tmp_path, tensors, {"alpha": "2"})).deltas[name].scale == 0.25


@pytest.mark.parametrize(("words", "said"), [
    ({KEY: "{"}, "lora_adapter_metadata in the header: not JSON"),
    ({KEY: "[]"}, "lora_adapter_metadata in the header: expected a JSON object, found list"),
    ({KEY: '{"unet.lora_alpha": "many"}'}, "unet.lora_alpha in lora_adapter_metadata is 'many'; expected a finite number"),
    ({KEY: '{"unet.r": true}'}, "unet.r in lora_adapter_metadata is True; expected a finite number"),
    ({KEY: '{"unet.alpha_pattern": {"to_q": NaN}}'}, r"unet.alpha_pattern in lora_adapter_metadata\['to_q'\] is nan"),
    ({"alpha": "inf"}, "the header's alpha is 'inf'; expected a finite number"),
])  # fmt: skip
def test_broken_headers(words: dict[str, str], said: str, tmp_path: Path) -> None:
    """A header that promises a number and has none is an error of one line, never a scale of 1."""
    file = write(tmp_path, {f"{DIFFUSERS}.lora_A.weight": DOWN, f"{DIFFUSERS}.lora_B.weight": UP}, words)
    with pytest.raises(FormatError, match=said) as problem:
        read_loose(file)
    assert "\n" not in str(problem.value)
    assert str(file) in str(problem.value)


@pytest.mark.parametrize(("config", "said"), [
    ({"use_dora": True, "peft_type": "LOHA"}, "peft_type LOHA is not LORA"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': the factors belong to a base"),
])  # fmt: skip
def test_variants_in_the_header(config: dict[str, object], said: str, tmp_path: Path) -> None:
    """What PEFT's folder would be refused for, a header is too."""
    with pytest.raises(UnsupportedError, match=said):
        read_loose(diffusers_file(tmp_path, {"r": 4} | config))


def test_language_models_need_their_config(tmp_path: Path) -> None:
    """PEFT's factors without adapter_config.json say no alpha, and a guess would be a wrong merge."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    file = write(tmp_path, {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP})
    with pytest.raises(UnsupportedError, match="alpha is unknown"):
        open_adapter(file)


ODD: dict[str, tuple[dict[str, Tensor], type[SurgeryError], str]] = {
    "half": ({"x.lora_down.weight": DOWN}, FormatError, "lora_up is missing"),
    "ranks": ({"x.lora_down.weight": DOWN, "x.lora_up.weight": torch.ones(8, 3)}, MismatchError, "ranks must agree"),
    "integers": ({"x.lora_down.weight": DOWN.int(), "x.lora_up.weight": UP}, FormatError, "floating-point"),
    "vectors": ({"x.lora_down.weight": torch.ones(4), "x.lora_up.weight": UP}, UnsupportedError, "not a factor's"),
    "a kernel above": ({"x.lora_down.weight": torch.ones(4, 6, 1, 1), "x.lora_up.weight": torch.ones(8, 4, 3, 3)},
                       UnsupportedError, "kernel of 1"),
    "two adapters": ({"x.lora_A.one.weight": DOWN, "x.lora_A.two.weight": DOWN, "x.lora_B.one.weight": UP},
                     FormatError, "keep one adapter"),
    "many alphas": ({"x.lora_down.weight": DOWN, "x.lora_up.weight": UP, "x.alpha": torch.ones(2)},
                    FormatError, "single number"),
    "a stranger": ({"x.lora_down.weight": DOWN, "x.lora_up.weight": UP, "x.what": UP}, FormatError, "not an adapter tensor"),
    "integer norms": ({"x.w_norm": torch.ones(4).int()}, FormatError, "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_files(what: str, tmp_path: Path) -> None:
    """Each is one line with the file and the tensor or module in it."""
    tensors, error, words = ODD[what]
    name = STYLES["kohya"][0]
    file = write(tmp_path, {name + k[1:]: v for k, v in tensors.items()})
    assert is_loose(file)
    with pytest.raises(error, match=words) as problem:
        read_loose(file)
    assert "\n" not in str(problem.value)
    assert str(file) in str(problem.value)
    assert name in str(problem.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_factors_of_any_width(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors in 8 bits or in 64 are read for what they are, and multiplied in float32 or wider."""
    name = STYLES["kohya"][0]
    tensors = {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN}
    adapter = read_loose(write(tmp_path, {f"{name}.{k}": v.to(dtype) for k, v in tensors.items()}))
    found = adapter.load_update(adapter.deltas[name]).dense()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.float(), (UP @ DOWN) ** 2)
    plain = read_loose(
        write(tmp_path, {f"{name}.lora_down.weight": DOWN.to(dtype), f"{name}.lora_up.weight": UP.to(dtype)})
    )
    assert torch.equal(plain.load(plain.deltas[name]).dense().float(), UP @ DOWN)


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    """Weights without a LoRA's keys are told apart."""
    file = write(tmp_path, {"model.diffusion_model.input_blocks.0.0.weight": UP})
    assert not is_loose(file)
    with pytest.raises(FormatError, match="no LoRA factors"):
        open_adapter(file)
