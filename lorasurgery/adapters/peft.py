"""PEFT's adapter folders: adapter_config.json beside adapter_model.safetensors, read into an Adapter.

Facts, with how each was settled, are in docs/formats.md. What changes the meaning of the factors and is not
understood here is refused by name (peft_config.refuse_variants), never ignored.
"""

from __future__ import annotations

import re
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter, Delta, Kind
from lorasurgery.adapters.peft_config import PeftConfig, read_config
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, MismatchError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# `q_proj.lora_A.weight`, `q_proj.lora_A.default.weight` (not yet stripped of its adapter's name),
# `wte.lora_embedding_A`, `wte.lora_embedding_A.default`, `q_proj.lora_B.bias`
_FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?$"
)
_REFUSED_PARTS = {
    "lora_magnitude_vector": "DoRA's magnitude vectors",
    "lora_diag": "KaSA's diagonals",
    "trainable_tokens": "trainable_token_indices",
    "token_adapter": "trainable_token_indices",
    "lora_E": "AdaLoRA's singular values",
    "ranknum": "AdaLoRA's rank masks",
}


def is_peft(path: Path) -> bool:
    """Tell whether `path` is a PEFT adapter folder, or the weight file inside one."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name == WEIGHTS_NAME
    return named and ((folder / CONFIG_NAME).exists() or (folder / WEIGHTS_NAME).exists())


def read_peft(path: Path) -> Adapter:
    """Open a PEFT adapter from its config and header; no tensor is read.

    Args:
        path: The adapter's folder, or adapter_model.safetensors in it.

    Raises:
        FormatError: a file is missing or broken. UnsupportedError: a variant that is refused by name.
        MismatchError: the config's rank is not the tensors' rank.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / CONFIG_NAME)
    file = folder / WEIGHTS_NAME
    if not file.exists():
        raise FormatError(_missing_weights(folder))
    weights = Checkpoint.open(file)
    sides, replaced = _sort_keys(weights, str(file))
    deltas = {path: _delta(path, parts, weights, config, str(file)) for path, parts in sides.items()}
    if not deltas and not replaced:
        raise FormatError(f"{file}: holds no tensors, so there is nothing to merge")
    saved = config.modules_to_save
    added = frozenset(n for n in replaced if any(n.rpartition(".")[0].endswith(m) for m in saved))
    return Adapter(
        path=str(path), folder=folder, weights=weights, deltas=deltas, replaced=replaced, added=added,
        tied=config.tied, fan_in_fan_out=config.fan_in_fan_out, config=config.raw,
    )  # fmt: skip


def _missing_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            f"{folder / 'adapter_model.bin'}: a pickle file, which can run code when it is opened; load it where it "
            f"is trusted with PeftModel.from_pretrained and save_pretrained it again to get {WEIGHTS_NAME}"
        )
    return f"{folder}: has {CONFIG_NAME} but no {WEIGHTS_NAME}"


def _sort_keys(weights: Checkpoint, where: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Sort every key into factors by module path, or replaced tensors by base name; nothing is passed over."""
    sides: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in weights.tensors:
        name = _strip_prefix(key)
        for part, meaning in _REFUSED_PARTS.items():
            if f".{part}" in name:
                raise UnsupportedError(f"{where}: {key} belongs to {meaning}, which lorasurgery does not merge")
        match = _FACTOR.match(name)
        if match:
            _add_factor(sides, match, key, where)
        elif ".lora_" in name:
            raise UnsupportedError(f"{where}: {key} is a kind of LoRA tensor that lorasurgery does not know")
        else:
            replaced[_strip_wrappers(name)] = key
    return sides, replaced


def _add_factor(sides: dict[str, dict[str, str]], match: re.Match[str], key: str, where: str) -> None:
    path = match["path"]
    if path.endswith(".base_layer") or ".base_layer." in path:
        raise UnsupportedError(
            f"{where}: {key} adapts a parameter inside its module (fused experts or nn.MultiheadAttention), "
            "which lorasurgery does not merge"
        )
    side = "bias" if match["leaf"] == "bias" else (match["embedding"] or "") + match["side"]
    parts = sides.setdefault(path, {})
    if side in parts:
        raise FormatError(f"{where}: {parts[side]} and {key} are both {side} of {path}; keep one adapter in the file")
    parts[side] = key


def _strip_prefix(key: str) -> str:
    return key.removeprefix(PREFIX).removeprefix("_orig_mod.")


def _strip_wrappers(name: str) -> str:
    """`score.modules_to_save.default.weight` and `q_proj.base_layer.bias` name plain tensors of the base."""
    name = re.sub(r"\.modules_to_save\.(?:[^.]+\.)?(?=[^.]+$)", ".", name)
    return name.replace(".base_layer.", ".")


def _delta(path: str, parts: dict[str, str], weights: Checkpoint, config: PeftConfig, where: str) -> Delta:
    kind: Kind = "embedding" if "embedding_A" in parts or "embedding_B" in parts else "linear"
    prefix = "embedding_" if kind == "embedding" else ""
    extra = set(parts) - {f"{prefix}A", f"{prefix}B", "bias"}
    missing = {f"{prefix}A", f"{prefix}B"} - set(parts)
    if missing or extra:
        what = f"lora_{sorted(missing)[0]} is missing" if missing else f"lora_{sorted(extra)[0]} is one too many"
        raise FormatError(f"{where}: {path}: {what}; the adapter is incomplete, save it again")
    down, up = weights.tensors[parts[f"{prefix}A"]], weights.tensors[parts[f"{prefix}B"]]
    for info in (down, up):
        if len(info.shape) != 2:
            what = "a convolution's factor" if len(info.shape) in (3, 4, 5) else "not a matrix"
            raise UnsupportedError(f"{where}: {info.name} has shape {list(info.shape)}: {what}, which is not merged")
        if not info.is_float:
            raise FormatError(f"{where}: {info.name} is {info.dtype}; a LoRA factor must be a floating-point tensor")
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise MismatchError(
            f"{where}: {path}: lora_{prefix}A is {down.shape[0]}×{down.shape[1]} but lora_{prefix}B is "
            f"{up.shape[0]}×{up.shape[1]}; their ranks must agree"
        )
    alpha, scale = config.scaling(path, rank, where)
    return Delta(path, kind, down.name, up.name, (up.shape[0], down.shape[1]), rank, alpha, scale, parts.get("bias"))
