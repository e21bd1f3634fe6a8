"""A Llama-shaped pair of checkpoints: a random base, and the base plus an update with a decaying spectrum."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGNAL_RANK = 128
NOISE = 0.28  # of the signal's norm, spread over all directions as rounding and long training do
STRENGTH = 0.03  # ‖ΔW‖/‖W‖


def make_pair(folder: Path, hidden: int, inner: int, layers: int, vocab: int) -> tuple[Path, Path]:
    """Make (base, tuned) under `folder` in bfloat16, or find them there; all linear layers of tuned differ."""
    base, tuned = folder / "base", folder / "tuned"
    if (tuned / "model.safetensors").exists():
        return base, tuned
    generator = torch.Generator().manual_seed(0)
    weights, changed = {}, {}
    for name, shape in _shapes(hidden, inner, layers, vocab).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = 0.02 * torch.randn(shape, generator=generator)
        weights[name] = weight.to(torch.bfloat16)
        if ".layers." in name:
            changed[name] = (weights[name].float() + _update(weight, generator)).to(torch.bfloat16)
    config = CONFIG | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    for path, tensors in ((base, weights), (tuned, weights | changed)):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return base, tuned


def _shapes(hidden: int, inner: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{stem}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes[f"{stem}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{stem}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def _update(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    m, n = weight.shape
    spectrum = torch.arange(1, SIGNAL_RANK + 1) ** -0.8
    up = torch.randn(m, SIGNAL_RANK, generator=generator) / m**0.5
    down = torch.randn(SIGNAL_RANK, n, generator=generator) / n**0.5
    signal = (up * spectrum) @ down
    noise = torch.randn(m, n, generator=generator) * (NOISE * signal.norm() / (m * n) ** 0.5)
    update = signal + noise
    return update * (STRENGTH * weight.norm() / update.norm())
