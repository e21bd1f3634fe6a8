"""Adapters of a Llama shape with random factors and a falling spectrum, for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file


def llama_modules(hidden: int, inner: int, layers: int) -> Iterator[tuple[str, int, int]]:
    """Yield (path, out, in) for the seven linear modules of each layer."""
    for i in range(layers):
        stem = f"model.layers.{i}"
        for p in "qkvo":
            yield f"{stem}.self_attn.{p}_proj", hidden, hidden
        for p in ("gate", "up"):
            yield f"{stem}.mlp.{p}_proj", inner, hidden
        yield f"{stem}.mlp.down_proj", hidden, inner


def make_adapter(
    folder: Path,
    *,
    hidden: int,
    inner: int,
    layers: int,
    rank: int,
    seed: int,
    dtype: torch.dtype,
    rslora: bool = False,
) -> Path:
    """Write a PEFT adapter, or find an existing one; σᵢ falls as i^-½, as in adapters of trained models."""
    if (folder / "adapter_config.json").exists():
        return folder
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1) ** -0.25
    tensors = {}
    for path, out, into in llama_modules(hidden, inner, layers):
        stem = f"base_model.model.{path}"
        up = torch.randn(out, rank, generator=generator) * fall / out**0.5
        down = torch.randn(rank, into, generator=generator) * fall[:, None] / into**0.5
        tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_A.weight"] = up.to(dtype), down.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "use_rslora": rslora,
        "base_model_name_or_path": f"llama-{hidden}x{layers}",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
