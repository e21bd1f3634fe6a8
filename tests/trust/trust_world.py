"""A small checkpoint, an adapter for it, and a folder of somebody's that no command may touch."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def checkpoint(folder: Path) -> Path:
    """Two shards of one matrix each, index, config and tokenizer."""
    folder.mkdir(parents=True)
    weight_map = {}
    for i, name in enumerate(NAMES):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        generator = torch.Generator().manual_seed(i)
        save_file({f"{name}.weight": torch.randn(16, 16, generator=generator)}, folder / shard, {"format": "pt"})
        weight_map[f"{name}.weight"] = shard
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 2048}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text('{"a": "base"}')
    return folder


def adapter(folder: Path, *, seed: int = 7, tokenizer: str | None = None) -> Path:
    """A LoRA of rank 2 on both matrices."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in NAMES:
        for side in ("A", "B"):
            shape = (2, 16) if side == "A" else (16, 2)
            factors[f"base_model.model.{name}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * 0.3
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def pipeline(folder: Path) -> Path:
    """A diffusers folder whose one part is a text encoder."""
    part = folder / "text_encoder"
    part.mkdir(parents=True)
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.eye(16)}, part / "model.safetensors", {"format": "pt"})
    (part / "config.json").write_text('{"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}')
    (folder / "model_index.json").write_text('{"text_encoder": ["transformers", "CLIPTextModel"]}')
    return folder


def pipeline_adapter(file: Path) -> Path:
    """A LoRA of kohya's for that text encoder."""
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2),
               f"{key}.alpha": torch.tensor(2.0)}, file)  # fmt: skip
    return file


def victim(folder: Path) -> Path:
    """What lies elsewhere and belongs to somebody: weights, a config, and a key."""
    checkpoint(folder)
    (folder / "precious.json").write_text('{"password": "hunter2"}')
    (folder / "x.json").write_text('{"mine": true}')
    (folder / ".x.json.lorasurgery-partial").write_text("mine too")
    return folder


def world(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Checkpoint, adapter, and what is somebody's."""
    return checkpoint(tmp_path / "ck"), adapter(tmp_path / "style"), victim(tmp_path / "victim")


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What a folder holds, to the bit and the mode; links by where they lead."""
    return {
        path.relative_to(folder).as_posix(): (str(path.readlink()),)
        if path.is_symlink()
        else (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def modes(folder: Path) -> dict[str, int]:
    """The permissions of a folder, `.`, and all in it."""
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))
    }


def copied(folder: Path, target: Path) -> Path:
    """A copy in which links are links."""
    return Path(shutil.copytree(folder, target, symlinks=True))
