"""PEFT's adapter folders: adapter_config.json beside adapter_model.safetensors, read into an Adapter.

Facts, with how each was settled, are in docs/formats.md. What changes the meaning of the factors and is not
understood here is refused by name (peft_config.refuse_variants), never ignored.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.deltas import AttentionOutput, Delta, Embedding, Experts, Lora
from lorasurgery.adapters.factor_check import check_factor
from lorasurgery.adapters.image_names.components import FOLDER_NAMES
from lorasurgery.adapters.magnitude import PeftMagnitude
from lorasurgery.adapters.peft.config import PeftConfig, read_config
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.locate import Located
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, MismatchError, UnsupportedError, size_of

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# `q_proj.lora_A.weight`, `q_proj.lora_A.default.weight` (not yet stripped of its adapter's name),
# `wte.lora_embedding_A`, `wte.lora_embedding_A.default`, `q_proj.lora_B.bias`
_FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?:(?P<side>[AB])(?:\.[^.]+)?\.(?P<leaf>weight|bias)|(?P<embedding>embedding_[AB])(?:\.[^.]+)?)$"
)
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.[^.]+){0,2}$")
_TOKENS = re.compile(r"(?P<path>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.[^.]+)?$")
_REFUSED_PARTS = {
    "lora_diag": "KaSA's diagonals",
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
        FormatError: a file is missing or broken.
        UnsupportedError: a variant that is refused by name.
        MismatchError: the config's rank is not the tensors' rank.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / CONFIG_NAME)
    file = folder / WEIGHTS_NAME
    if not file.exists():
        raise FormatError(_missing_weights(folder))
    if not file.is_file():
        raise FormatError(f"{file}: is not a regular file")
    weights = Checkpoint.open(file)
    sides, replaced = _sort_keys(weights, str(file))
    found = [_delta(path, parts, weights, config, str(file)) for path, parts in sides.items() if "tokens" not in parts]
    deltas: dict[str, Delta] = {delta.path: delta for delta in found}
    tokens = {f"{p}.weight": _tokens(p, parts["tokens"], weights, config) for p, parts in sides.items()
              if "tokens" in parts}  # fmt: skip
    if not deltas and not replaced and not tokens:
        raise FormatError(f"{file}: holds no tensors, so there is nothing to merge")
    added = frozenset(n for n in replaced if _is_saved(n.rpartition(".")[0], config.saved))
    return Adapter(
        path=str(path), folder=folder, weights=weights, deltas=deltas, replaced=replaced, added=added, tokens=tokens,
        tied=config.tied, fan_in_fan_out=config.fan_in_fan_out, config=config.raw,
    )  # fmt: skip


def _is_saved(path: str, saved: dict[int, set[str]]) -> bool:
    """Whether a path ends as one of modules_to_save."""
    return any(path[len(path) - size :] in names for size, names in saved.items() if size <= len(path))


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
        magnitude, tokens = _MAGNITUDE.match(name), _TOKENS.match(name)
        if match:
            side = "bias" if match["leaf"] == "bias" else match["embedding"] or match["side"]
            _add_part(sides, _inner_path(match["path"]), side, key, where)
        elif magnitude:
            _add_part(sides, _inner_path(magnitude["path"]), "magnitude", key, where)
        elif tokens:
            _add_part(sides, tokens["path"], "tokens", key, where)
        elif ".lora_" in name:
            raise UnsupportedError(f"{where}: {key} is a kind of LoRA tensor that lorasurgery does not know")
        else:
            replaced[_strip_wrappers(name)] = key
    return sides, replaced


def _inner_path(path: str) -> str:
    """nn.MultiheadAttention's out_proj lies under its wrapper; a wrapped parameter keeps base_layer in its path."""
    return path.replace(".base_layer.", ".")


def _add_part(sides: dict[str, dict[str, str]], path: str, side: str, key: str, where: str) -> None:
    parts = sides.setdefault(path, {})
    if side in parts:
        raise FormatError(f"{where}: {parts[side]} and {key} are both {side} of {path}; keep one adapter in the file")
    parts[side] = key


def _strip_prefix(key: str) -> str:
    return key.removeprefix(PREFIX).removeprefix("_orig_mod.")


def _strip_wrappers(name: str) -> str:
    """`score.modules_to_save.default.weight` and `q_proj.base_layer.bias` name plain tensors of the base."""
    parts = re.sub(r"\.modules_to_save\.(?:[^.]+\.)?(?=[^.]+$)", ".", name).split(".")
    return ".".join([*parts[:1], *(p for p in parts[1:-1] if p != "base_layer"), *parts[1:][-1:]])


def _delta(path: str, parts: dict[str, str], weights: Checkpoint, config: PeftConfig, where: str) -> Lora:
    """One module's factors, of the class that says where in the model they belong."""
    prefix = "embedding_" if {"embedding_A", "embedding_B"} & set(parts) else ""
    _check_parts(path, parts, prefix, config, where)
    down, up = weights.tensors[parts[f"{prefix}A"]], weights.tensors[parts[f"{prefix}B"]]
    _check_factors(down, up, where)
    module, rank, experts = path, down.shape[0], 0
    if config.is_parameter(path):
        module, rank, experts = config.parameter(path, rank, where)
        if experts == 1 and module.endswith(".weight"):  # a matrix after all, such as a router's
            path, experts = module.removesuffix(".weight"), 0
    if up.shape[1] != down.shape[0]:
        raise MismatchError(
            f"{where}: {path}: lora_{prefix}A is {size_of(down.shape[:2])} but lora_{prefix}B is "
            f"{size_of(up.shape[:2])}; their ranks must agree"
        )
    alpha, scale = config.scaling(module, rank, where)
    magnitude = parts.get("magnitude")
    make = partial(Experts, count=experts) if experts else _class_of(down.name, embedding=bool(prefix))
    if make is AttentionOutput:
        scale *= 2
    return make(
        path=path, down=down.name, up=up.name, shape=(up.shape[0], math.prod(down.shape[1:])), rank=rank, alpha=alpha,
        scale=scale, bias=parts.get("bias"), kernel=down.shape[2:], parameter=module if module != path else "",
        magnitude=PeftMagnitude(magnitude, weights.tensors[magnitude].shape) if magnitude else None,
    )  # fmt: skip


def _class_of(name: str, *, embedding: bool) -> type[Lora]:
    """The class of factors that are a module's own."""
    if embedding:
        return Embedding
    return AttentionOutput if ".base_layer.out_proj.lora_" in name else Lora


def _check_parts(path: str, parts: dict[str, str], prefix: str, config: PeftConfig, where: str) -> None:
    """Both factors must be here, what the config promises beside them, and nothing else."""
    needed = {f"{prefix}A", f"{prefix}B"}
    missing, extra = needed - set(parts), set(parts) - needed - {"bias", "magnitude"}
    if missing or extra:
        what = f"lora_{sorted(missing)[0]} is missing" if missing else f"lora_{sorted(extra)[0]} is one too many"
        raise FormatError(f"{where}: {path}: {what}; the adapter is incomplete, save it again")
    if config.dora != ("magnitude" in parts):
        raise FormatError(
            f"{where}: {path}: use_dora is {str(config.dora).lower()} in adapter_config.json but the module has "
            f"{'no' if config.dora else 'a'} lora_magnitude_vector; the adapter is incomplete, save it again"
        )


def _check_factors(down: TensorInfo, up: TensorInfo, where: str) -> None:
    for info in (down, up):
        check_factor(info, where)
    if len(up.shape) != len(down.shape):
        raise UnsupportedError(
            f"{where}: {up.name} has shape {list(up.shape)} but {down.name} "
            f"has {list(down.shape)}; expected as many axes"
        )
    if math.prod(up.shape[2:]) != 1:
        raise UnsupportedError(f"{where}: {up.name} has shape {list(up.shape)}; expected a kernel of 1 in lora_B")


def _tokens(path: str, key: str, weights: Checkpoint, config: PeftConfig) -> tuple[str, tuple[int, ...]]:
    """The rows that trainable_token_indices replaces, in the order of the tensor's rows."""
    rows, found = config.token_rows(path), weights.tensors[key]
    if len(found.shape) != 2 or found.shape[0] != len(rows):
        raise MismatchError(
            f"{weights.path}: {key} has shape {list(found.shape)} but adapter_config.json names {len(rows)} tokens"
        )
    return key, rows


def members(path: Path) -> list[str]:
    """The parts that have an adapter of their own in a folder."""
    return [name for name in FOLDER_NAMES if (path / name).is_dir() and is_peft(path / name)]


def is_peft_members(path: Path) -> bool:
    """Tell whether a folder holds PEFT adapters by part."""
    return path.is_dir() and not is_peft(path) and bool(members(path))


def read_peft_members(path: Path) -> Adapter:
    """Open the adapters of all parts as one.

    Raises:
        SurgeryError: as read_peft does for each.
    """
    found = {name: read_peft(path / name) for name in members(path)}
    files = {f"{name}/{WEIGHTS_NAME}": f"{name}." for name in found}
    together = Adapter(
        path=str(path), folder=path, weights=Checkpoint(path, Located(path, list(files), parts=files)), deltas={},
        replaced={}, members=found,
    )  # fmt: skip
    for name, member in found.items():
        _join(together, f"{name}.", member)
    return together


def _join(together: Adapter, prefix: str, member: Adapter) -> None:
    together.deltas |= {prefix + path: delta.prefixed(prefix) for path, delta in member.deltas.items()}
    together.replaced |= {prefix + name: prefix + key for name, key in member.replaced.items()}
    together.tokens |= {prefix + name: (prefix + key, rows) for name, (key, rows) in member.tokens.items()}
    together.added |= {prefix + name for name in member.added}
