"""Adapters in one file, without a config: kohya's, LyCORIS's, diffusers', ComfyUI's; read into an Adapter.

What the tensors mean is told by their keys and shapes; alpha by a tensor, or by the header's metadata.
"""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.adapter import Adapter, Format
from lorasurgery.adapters.deltas import Delta
from lorasurgery.adapters.factor_check import check_float
from lorasurgery.adapters.image_names.components import UNDERSCORED_PREFIXES
from lorasurgery.adapters.single_file.header import HeaderConfig, read_header_config
from lorasurgery.adapters.single_file.keys import group_keys, is_adapter_key
from lorasurgery.adapters.single_file.products import read_delta
from lorasurgery.adapters.single_file.stored import StoredModule
from lorasurgery.checkpoint.header import read_header
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError

Parts = dict[str, str]
_NAMES = ("pytorch_lora_weights.safetensors", "adapter.safetensors", "lora.safetensors")
_LEAVES = {"diff_b": "bias", "b_norm": "bias", "w_norm": "weight", "set_weight": "weight"}


def loose_file(path: Path) -> Path | None:
    """The file that holds the adapter: `path` itself, or the only one in a folder (diffusers saves folders)."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    named = [path / name for name in _NAMES if (path / name).is_file()]
    if not named and not path.is_dir():
        raise FormatError(f"{path}: is not a regular file")
    files = named[:1] or [f for f in path.iterdir() if f.suffix == ".safetensors" and not f.name.startswith(".")]
    return files[0] if len(files) == 1 else None


def is_loose(path: Path) -> bool:
    """Tell whether a file, or the only safetensors file of a folder, holds an adapter's keys."""
    file = loose_file(path)
    return file is not None and any(is_adapter_key(key) for key in read_header(file).tensors)


def read_loose(path: Path) -> Adapter:
    """Open an adapter file from its header; only alphas, of four bytes each, are read.

    Raises:
        FormatError: incomplete or unknown tensors.
        UnsupportedError: a family that is not a sum, or alpha unknown.
        MismatchError: shapes that contradict each other.
    """
    file = loose_file(path)
    assert file is not None
    weights = Checkpoint.open(file)
    where = str(file)
    config = read_header_config(next(iter(weights.files.values())).metadata, where)
    reader = _Reader(weights, config, where)
    for module, parts in group_keys(weights.tensors, where).items():
        reader.add(module, parts)
    if not reader.deltas and not reader.diffs and not reader.replaced:
        raise FormatError(f"{where}: holds no update, so there is nothing to merge")
    return Adapter(
        path=str(path), folder=file.parent, weights=weights, deltas=reader.deltas, replaced=reader.replaced,
        diffs=reader.diffs, format=_format(reader.paths), config=config.raw,
    )  # fmt: skip


def _format(paths: list[str]) -> Format:
    if any(p.startswith(UNDERSCORED_PREFIXES) for p in paths):
        return "kohya"
    return "diffusers" if any(p.startswith(("unet.", "transformer.", "text_encoder")) for p in paths) else "comfyui"


class _Reader:
    """Turns each module's parts into a delta, a difference or a replacement."""

    def __init__(self, weights: Checkpoint, config: HeaderConfig, where: str) -> None:
        self.weights, self.config, self.where = weights, config, where
        self.deltas: dict[str, Delta] = {}
        self.diffs: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        self.paths: list[str] = []

    def add(self, path: str, parts: Parts) -> None:
        """One module, with all of its tensors."""
        if set(parts) == {"alpha"}:
            raise FormatError(f"{self.where}: {parts['alpha']} belongs to no factors; is it misspelt?")
        self.paths.append(path)
        parts = dict(parts)
        for part, leaf in _LEAVES.items():
            if part in parts:
                target = self.replaced if part == "set_weight" else self.diffs
                self._claim(target, f"{path}.{leaf}", parts.pop(part))
        if "diff" in parts and len(self.weights.tensors[parts["diff"]].shape) < 2:
            self._claim(self.diffs, f"{path}.weight", parts.pop("diff"))
        if set(parts) - {"alpha"}:
            self.deltas[path] = read_delta(StoredModule(path, parts, self.weights, self.config, self.where))

    def _claim(self, target: dict[str, str], name: str, key: str) -> None:
        """Note a tensor that is added or replaces whole; two that mean the same are an error."""
        if name in target:
            raise FormatError(f"{self.where}: {target[name]} and {key} both change {name}; which is meant?")
        check_float(self.weights.tensors[key], self.where)
        target[name] = key
