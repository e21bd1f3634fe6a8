"""Adapters of a chosen rank and size for any checkpoint, and whether a merge of them comes back to the bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge


def cast(base: Path, target: Path, dtype: torch.dtype) -> Path:
    """A checkpoint folder of one file in another dtype."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(base / "model.safetensors")
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()},
              target / "model.safetensors", {"format": "pt"})  # fmt: skip
    return target


def llama(target: Path, dtype: torch.dtype, hidden: int = 256, layers: int = 2) -> Path:
    """A Llama-shaped checkpoint of one file, values as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden),
             "mlp.up_proj": (11 * hidden // 4, hidden), "mlp.down_proj": (hidden, 11 * hidden // 4)}  # fmt: skip
    weights = {
        f"model.layers.{i}.{kind}.weight": (torch.randn(*size, generator=generator) / hidden**0.5).to(dtype)
        for i in range(layers) for kind, size in sizes.items()
    }  # fmt: skip
    target.mkdir()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def adapter(base: Path, target: Path, rank: int, size: float, seed: int = 0) -> Path:
    """A LoRA on every matrix of the layers, whose update has `size` of the weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if weight.dim() == 2 and "layer" in name and weight.is_floating_point():
            up = torch.randn(weight.shape[0], rank, generator=generator)
            down = torch.randn(rank, weight.shape[1], generator=generator)
            gram = (up.T @ up) * (down @ down.T)
            up *= size * float(weight.float().norm()) / float(gram.sum().sqrt())
            key = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{key}.lora_A.weight": down.contiguous(), f"{key}.lora_B.weight": up.contiguous()}
    target.mkdir()
    save_file(factors, target / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def sums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor."""
    weights = load_file(checkpoint / "model.safetensors")
    raw = {name: t.reshape(-1).view(torch.uint8).numpy() for name, t in weights.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}


def there_and_back(base: Path, lora: Path, work: Path) -> tuple[dict[str, str], int]:
    """Merge, unmerge: the tensors' hashes afterwards, and the bytes of the record."""
    merge(base, [lora], work / "merged", undo=True, allow_loss=True)
    unmerge(work / "merged", [lora], work / "back")
    record = (work / "merged/lorasurgery-undo/0001.safetensors").stat().st_size
    found = sums(work / "back")
    shutil.rmtree(work)
    return found, record
