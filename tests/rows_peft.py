"""Rows of the table whose oracle is PEFT: its models make the adapters, and merge them in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from rows import Made, Row, Weights, weights_of
from safetensors.torch import load_file, save_file
from torch import nn

ORACLE = f"peft {version('peft')}"


class Layers(nn.Module):
    """One of each kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.embedding = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.conv3 = nn.Conv3d(6, 8, 2)
        self.attention = nn.MultiheadAttention(12, 3)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Not needed: files are compared."""
        return self.linear(x)


def layers() -> Layers:
    """The same layers every time."""
    torch.manual_seed(0)
    return Layers().eval()


def save_base(model: nn.Module, path: Path, dtype: torch.dtype | None) -> Path:
    """A checkpoint folder of the model in one dtype, or as it is."""
    path.mkdir()
    if hasattr(model, "save_pretrained"):
        (model.to(dtype) if dtype else model).save_pretrained(path)
    else:
        state = {k: v.to(dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
        save_file(state, path / "model.safetensors")
    return path


def fill(model: PeftModel, dtype: torch.dtype) -> None:
    """Random factors, magnitudes, biases and saved modules, all of them values that the adapter's dtype holds."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data = p.data * (1 + 0.2 * torch.rand(p.shape, generator=generator))
        elif "lora_" in name or "trainable_tokens_delta" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype)
        elif "modules_to_save" in name or (p.requires_grad and name.endswith("bias")):
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
        else:
            continue
        p.data = p.data.to(dtype).to(torch.float64)


def cast_file(file: Path, dtype: torch.dtype) -> None:
    """The adapter's file in another dtype."""
    save_file({k: v.to(dtype).contiguous() for k, v in load_file(file).items()}, file, {"format": "pt"})


def row_of(make: Callable[[], nn.Module], config: dict[str, Any], path: Path, adapter: torch.dtype,
           stored: torch.dtype) -> Made:  # fmt: skip
    """A base, PEFT's adapter for it, and what merge_and_unload makes of them in float64."""
    base = save_base(make(), path / "base", stored)
    model = make().to(stored).to(torch.float64).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | config)), autocast_adapter_dtype=False)
        fill(peft, adapter)
        peft.save_pretrained(path / "adapter", save_embedding_layers=False)
        cast_file(path / "adapter/adapter_model.safetensors", adapter)
        save_base(peft.merge_and_unload(), path / "reference", None)
    return Made(base, path / "adapter", weights_of(path / "reference"))


def converted(init: str, path: Path, adapter: torch.dtype, stored: torch.dtype) -> Made:
    """PiSSA or OLoRA, which change the base, in the form that fits the plain one."""
    base = save_base(layers(), path / "base", stored)
    peft = get_peft_model(layers(), LoraConfig(r=3, target_modules=["linear"], init_lora_weights=init))
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(path / "start")
    peft.peft_config["default"].init_lora_weights = init
    for name, p in peft.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    peft.save_pretrained(path / "adapter", path_initial_model_for_weight_conversion=str(path / "start"))
    plain = PeftModel.from_pretrained(layers().double(), path / "adapter", autocast_adapter_dtype=False)
    expected: Weights = dict(plain.merge_and_unload().state_dict())
    assert json.loads((path / "adapter/adapter_config.json").read_text())["r"] == 6
    return Made(base, path / "adapter", expected)


def _model(name: str) -> Callable[[], nn.Module]:
    return partial(models.make, name) if name in models.MAKERS else partial(zoo.make, name)


F32, HALF, WIDE = ("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")
_EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
_CASES: list[tuple[str, str, Callable[[], nn.Module], dict[str, Any], list[tuple[str, str]]]] = [
    ("LoRA", "linear", layers, {"target_modules": ["linear"]},
     [F32, HALF, WIDE, ("float16", "float16"), ("bfloat16", "bfloat16")]),
    ("LoRA, rsLoRA", "linear", layers, {"target_modules": ["linear"], "use_rslora": True}, [F32]),
    ("LoRA, ranks and alphas by pattern", "linear", _model("llama"),
     {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}, [F32]),
    ("LoRA with lora_bias", "linear", layers, {"target_modules": ["linear"], "lora_bias": True}, [F32, HALF]),
    ("LoRA", "Conv1D of GPT-2", _model("gpt2"), {"target_modules": ["c_attn", "c_fc"]}, [F32, WIDE]),
    ("LoRA", "embedding", layers, {"target_modules": ["embedding"]}, [F32, WIDE]),
    ("LoRA", "conv 1-D", layers, {"target_modules": ["conv1"]}, [F32]),
    ("LoRA", "conv 2-D", layers, {"target_modules": ["conv2"]}, [F32, HALF]),
    ("LoRA", "conv 3-D", layers, {"target_modules": ["conv3"]}, [F32]),
    ("LoRA", "nn.MultiheadAttention", layers, {"target_modules": ["attention"]}, [F32]),
    ("LoRA", "fused experts, split on disk", _model("mixtral"), _EXPERTS, [F32]),
    ("LoRA", "fused experts, stored (in, out)", _model("gpt_oss"), _EXPERTS, [F32, WIDE]),
    ("DoRA", "linear", layers, {"target_modules": ["linear"], "use_dora": True}, [F32, HALF, WIDE]),
    ("DoRA", "Conv1D of GPT-2", _model("gpt2"), {"target_modules": ["c_attn"], "use_dora": True}, [F32]),
    ("DoRA", "embedding", layers, {"target_modules": ["embedding"], "use_dora": True}, [F32]),
    ("DoRA", "conv 2-D", layers, {"target_modules": ["conv2"], "use_dora": True}, [F32]),
    ("LoRA, bias=all", "linear", layers, {"target_modules": ["linear"], "bias": "all"}, [F32]),
    ("modules_to_save", "linear", layers, {"target_modules": ["linear"], "modules_to_save": ["head"]}, [F32]),
    ("trainable_token_indices", "embedding", _model("llama"),
     {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]}, [F32]),
]  # fmt: skip

ROWS = [Row(f"PEFT {family}", kind, ORACLE, partial(row_of, make, config), *pair)
        for family, kind, make, config, pairs in _CASES for pair in pairs]  # fmt: skip
ROWS += [
    Row(f"PEFT {name}, converted", "linear", ORACLE, partial(converted, name.lower())) for name in ("PiSSA", "OLoRA")
]
