"""Small good files of every kind that is read, made without a model class; the hostile ones are made from them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorasurgery.ops.merge import merge

Work = Callable[[], Any]
"""What is done with one hostile input."""

BITS = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U8": 8, "F64": 64, "F8_E4M3": 8, "BOOL": 8, "F4": 4}
WIDTH, RANK = 8, 2
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": 16,
          "num_hidden_layers": 2, "num_attention_heads": 2, "torch_dtype": "float32"}  # fmt: skip
MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
ADAPTER = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {}, "alpha_pattern": {r".*\.layers\.[0-9]+\.self_attn\.q_proj": 8}, "use_rslora": False,
    "use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None, "target_parameters": None,
    "trainable_token_indices": None, "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM",
}  # fmt: skip
METADATA = {"unet.r": RANK, "unet.lora_alpha": 4, "unet.alpha_pattern": {"^down_blocks.0.to_q": 8},
            "unet.rank_pattern": {}, "unet.use_rslora": False, "unet.target_modules": ["to_q"]}  # fmt: skip


def bytes_of(header: dict[str, Any], data: bytes | int = 0) -> bytes:
    """A safetensors file with this header, whatever it says, and data or so many zeros."""
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + (bytes(data) if isinstance(data, int) else data)


def laid_out(tensors: dict[str, tuple[str, list[int]]], metadata: Any = None) -> tuple[dict[str, Any], int]:
    """A header that is consistent for these dtypes and shapes, and the bytes of data that it speaks of."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * BITS.get(dtype, 8) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


def write_sparse(path: Path, header: dict[str, Any], size: int) -> None:
    """The file of a header, with some numbers and then a hole for its data."""
    some = torch.sin(torch.arange(1.0, min(size, 1 << 14) / 4 + 1)).numpy().tobytes()[:size]
    path.write_bytes(bytes_of(header, some))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size - len(some))


def numbers(*shape: int) -> torch.Tensor:
    """Always the same values for a shape."""
    return torch.sin(torch.arange(1.0, prod(shape) + 1)).reshape(shape).contiguous()


class Files:
    """Good files in one folder.

    Attributes:
        base: A checkpoint in two shards. adapter: A PEFT folder. loose: Adapter files by name. merged: The base with the
            adapter and the record of the merge.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"
        self.loose = folder / "loose"
        self._base()
        self._adapter()
        self._loose()
        merge(str(self.base), [str(self.adapter)], str(self.merged), undo=True, device="cpu")

    def _base(self) -> None:
        self.base.mkdir(parents=True)
        tensors = {f"{m}.weight": numbers(WIDTH, WIDTH) for m in MODULES}
        tensors |= {"model.embed_tokens.weight": numbers(16, WIDTH), "model.norm.weight": numbers(WIDTH)}
        names = sorted(tensors)
        weight_map = {}
        for i, part in enumerate((names[:4], names[4:])):
            file = f"model-{i + 1:05}-of-00002.safetensors"
            save_file({n: tensors[n] for n in part}, self.base / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 4 * sum(t.numel() for t in tensors.values())}, "weight_map": weight_map}
        (self.base / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.base / "config.json").write_text(json.dumps(CONFIG))

    def _adapter(self) -> None:
        self.adapter.mkdir()
        tensors = {}
        for m in MODULES:
            tensors[f"base_model.model.{m}.lora_A.weight"] = numbers(RANK, WIDTH)
            tensors[f"base_model.model.{m}.lora_B.weight"] = numbers(WIDTH, RANK)
        save_file(tensors, self.adapter / "adapter_model.safetensors", {"format": "pt"})
        (self.adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))

    def _loose(self) -> None:
        self.loose.mkdir()
        name, pair = "lora_unet_down_blocks_0_attentions_0_proj_in", (numbers(RANK, WIDTH), numbers(WIDTH, RANK))
        kohya = {f"{name}.lora_down.weight": pair[0], f"{name}.lora_up.weight": pair[1],
                 f"{name}.alpha": torch.tensor(1.0), "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": numbers(WIDTH)}  # fmt: skip
        hada = {f"{name}.hada_w{i}_{s}": pair[(s == "b" and 0) or 1] for i in (1, 2) for s in "ab"}
        hada[f"{name}.dora_scale"] = numbers(WIDTH, 1)
        lokr = {f"{name}.lokr_w1": numbers(2, 2), f"{name}.lokr_w2_a": numbers(4, RANK),
                f"{name}.lokr_w2_b": numbers(RANK, 4), f"{name}.alpha": torch.tensor(1.0)}  # fmt: skip
        path = "unet.down_blocks.0.to_q"
        diffusers = {f"{path}.lora_A.weight": pair[0], f"{path}.lora_B.weight": pair[1]}
        for file, tensors in {"kohya": kohya, "hada": hada, "lokr": lokr, "diffusers": diffusers}.items():
            extra = {"lora_adapter_metadata": json.dumps(METADATA)} if file == "diffusers" else {"ss_network_dim": "2"}
            save_file({k: t.clone() for k, t in tensors.items()}, self.loose / f"{file}.safetensors", extra)


def header_of(path: Path) -> dict[str, Any]:
    """The header of a good file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return found


def data_of(path: Path) -> bytes:
    """The data of a good file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 + length :]
