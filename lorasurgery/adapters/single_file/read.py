"""Adapters in one file, without a config: kohya's, LyCORIS's, diffusers', ComfyUI's; read into an Adapter.

What the tensors mean is told by their keys and shapes; alpha by a tensor, or by the header's metadata.
"""

from __future__ import annotations

import math
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter, Delta, Form, Format
from lorasurgery.adapters.factor_check import check_factor, check_float
from lorasurgery.adapters.image_names.components import UNDERSCORED_PREFIXES, adapter_place
from lorasurgery.adapters.single_file.header import HeaderConfig, read_header_config
from lorasurgery.adapters.single_file.keys import group_keys, is_adapter_key
from lorasurgery.checkpoint.header import TensorInfo, read_header
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, MismatchError, UnsupportedError, size_of

Parts = dict[str, str]
_NAMES = ("pytorch_lora_weights.safetensors", "adapter.safetensors", "lora.safetensors")
_KRONECKER = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
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
        FormatError: incomplete or unknown tensors. UnsupportedError: a family that is no sum, or alpha unknown.
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
            self.deltas[path] = self._delta(path, parts)

    def _claim(self, target: dict[str, str], name: str, key: str) -> None:
        """Note a tensor that is added or replaces whole; two that mean the same are an error."""
        if name in target:
            raise FormatError(f"{self.where}: {target[name]} and {key} both change {name}; which is meant?")
        target[name] = self._float(key).name

    def _delta(self, path: str, parts: Parts) -> Delta:
        if "down" in parts or "up" in parts:
            return self._lora(path, parts)
        if any(p.startswith("hada_") for p in parts):
            return self._hadamard(path, parts)
        if any(p.startswith("lokr_") for p in parts):
            return self._kronecker(path, parts)
        self._expect(path, parts, {"diff"}, {"alpha"})
        shape = self._shape(parts["diff"])
        flat = (shape[0], math.prod(shape[1:]))
        return Delta(
            path, "conv" if shape[2:] else "linear", "", "", flat, min(flat), float(min(flat)), 1.0, kernel=shape[2:],
            form="full", parts={"diff": parts["diff"]},
        )  # fmt: skip

    def _lora(self, path: str, parts: Parts) -> Delta:
        self._expect(path, parts, {"down", "up"}, {"mid", "alpha", "bias", "dora_scale", "magnitude"})
        down, up = self._shape(parts["down"]), self._shape(parts["up"])
        core = self._shape(parts["mid"]) if "mid" in parts else ()
        if core and (len(core) < 3 or core[0] != up[1] or core[1] != down[0] or math.prod(down[2:]) != 1):
            raise self._mismatch(path, "lora_mid", core, (up[1], down[0]))
        if not core and up[1] != down[0]:
            raise MismatchError(
                f"{self.where}: {path}: lora_down is {size_of(down)} but lora_up is {size_of(up)}; their ranks must "
                "agree"
            )
        if math.prod(up[2:]) != 1:
            raise UnsupportedError(f"{self.where}: {parts['up']} has shape {list(up)}; expected a kernel of 1")
        kernel = core[2:] if core else down[2:]
        into = down[1] * math.prod(kernel)
        alpha, scale = self._scaling(path, parts, down[0])
        form: Form = "tucker" if core else "lora"
        named = {p: parts[p] for p in ("up", "mid", "down")} if core else {}
        return Delta(
            path, "conv" if kernel else "linear", parts["down"], parts["up"], (up[0], into), down[0], alpha, scale,
            bias=parts.get("bias"), kernel=kernel, magnitude=self._magnitude(path, parts, (up[0], into)), form=form,
            parts=named, lycoris="dora_scale" in parts,
        )  # fmt: skip

    def _hadamard(self, path: str, parts: Parts) -> Delta:
        needed = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        cores = {"hada_t1", "hada_t2"} & set(parts)
        self._expect(path, parts, needed | ({"hada_t1", "hada_t2"} if cores else set()), {"alpha", "dora_scale"})
        one, two = (self._half(path, parts, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        if one[0] != two[0]:
            raise self._mismatch(path, "the two halves of LoHa", two[0], one[0])
        ranks = [self._shape(parts[f"hada_w{i}_b"])[0] for i in (1, 2)]
        return self._product(path, parts, "hadamard", one[0], ranks[0], one[1], math.prod(ranks))

    def _kronecker(self, path: str, parts: Parts) -> Delta:
        sides: list[tuple[int, int]] = []
        kernel: tuple[int, ...] = ()
        rank, width = None, 1
        for i in (1, 2):
            name = f"lokr_w{i}"
            if name in parts:
                shape = self._shape(parts[name])
                sides.append((shape[0], math.prod(shape[1:])))
                kernel = shape[2:] or kernel
                width *= min(sides[-1])
                continue
            if not {f"{name}_a", f"{name}_b"} <= set(parts):
                raise FormatError(f"{self.where}: {path}: {name} is missing; the adapter is incomplete, save it again")
            flat, found = self._half(path, parts, f"lokr_t{i}", f"{name}_a", f"{name}_b")
            sides.append(flat)
            kernel, rank = found or kernel, self._shape(parts[f"{name}_b"])[0]
            width *= min(*flat, rank)
        flat = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
        self._expect(path, parts, set(), {"alpha", "dora_scale", *_KRONECKER})
        if rank is None:  # both halves are full: LyCORIS sets the scale to 1, whatever alpha says
            return self._product(path, parts, "kronecker", flat, min(flat), kernel, width, scaling=(min(flat), 1.0))
        return self._product(path, parts, "kronecker", flat, rank, kernel, width)

    def _product(
        self, path: str, parts: Parts, form: Form, flat: tuple[int, int], rank: int, kernel: tuple[int, ...],
        width: int, scaling: tuple[float, float] | None = None,
    ) -> Delta:  # fmt: skip
        alpha, scale = scaling or self._scaling(path, parts, rank)
        return Delta(
            path, "conv" if kernel else "linear", "", "", flat, rank, alpha, scale, kernel=kernel, form=form,
            parts={p: k for p, k in parts.items() if p not in ("alpha", "dora_scale")},
            magnitude=self._magnitude(path, parts, flat), lycoris="dora_scale" in parts, width=width,
        )  # fmt: skip

    def _half(self, path: str, parts: Parts, core: str, a: str, b: str) -> tuple[tuple[int, int], tuple[int, ...]]:
        """(out, in·kernel) of core ×₁ a ×₂ b, or of a @ b, and the kernel if the tensors tell it."""
        first, second = self._shape(parts[a]), self._shape(parts[b])
        for name, flat in ((a, first), (b, second if core in parts else ())):
            if math.prod(flat[2:]) != 1:
                raise UnsupportedError(f"{self.where}: {parts[name]} has shape {list(flat)}; expected a kernel of 1")
        if core in parts:
            shape = self._shape(parts[core])
            if len(shape) < 3 or shape[:2] != (first[0], second[0]):
                raise self._mismatch(path, core, shape, (first[0], second[0]))
            return (first[1], second[1] * math.prod(shape[2:])), shape[2:]
        if first[1] != second[0]:
            raise self._mismatch(path, b, second, (first[1],))
        return (first[0], math.prod(second[1:])), second[2:]

    def _scaling(self, path: str, parts: Parts, rank: int) -> tuple[float, float]:
        """alpha and alpha/r: by the alpha tensor, else by the header, else 1; LyCORIS's rsLoRA is in its alpha."""
        if "alpha" in parts:
            alpha = self.weights.number(parts["alpha"])
            if not math.isfinite(alpha):
                raise FormatError(f"{self.where}: {parts['alpha']} is {alpha}; expected a finite number")
            return alpha, alpha / rank
        found = self.config.scaling(path, rank)
        if found is not None:
            return found
        if "lora_A" in parts.get("down", "") and adapter_place(path) is None:
            raise UnsupportedError(
                f"{self.where}: LoRA factors without PEFT's adapter_config.json, so alpha is unknown; give the "
                "adapter's folder"
            )
        return float(rank), 1.0

    def _magnitude(self, path: str, parts: Parts, flat: tuple[int, int]) -> str | None:
        if "dora_scale" in parts and "magnitude" in parts:
            raise FormatError(f"{self.where}: {path} has both dora_scale and lora_magnitude_vector; which is meant?")
        name = parts.get("dora_scale") or parts.get("magnitude")
        if name is None:
            return None
        shape = self.weights.tensors[name].shape
        by_output = math.prod(shape) == flat[0] == shape[0] or ("magnitude" in parts and math.prod(shape) == flat[0])
        by_input = "dora_scale" in parts and shape[:1] == (1,) and math.prod(shape) == math.prod(shape[:2])
        if not by_output and not (by_input and flat[1] % math.prod(shape) == 0):
            raise self._mismatch(path, name.rpartition(".")[2], shape, (flat[0], 1))
        self._float(name)
        return name

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self.weights.tensors[name]
        check_factor(info, self.where)
        return info.shape

    def _float(self, name: str) -> TensorInfo:
        info = self.weights.tensors[name]
        check_float(info, self.where)
        return info

    def _expect(self, path: str, parts: Parts, needed: set[str], allowed: set[str]) -> None:
        missing, extra = needed - set(parts), set(parts) - needed - allowed
        if missing or extra:
            first = sorted(missing or extra)[0]
            name = f"lora_{first}" if first in ("down", "up", "mid") else first
            what = f"{name} is missing" if missing else f"{name} is one too many"
            raise FormatError(f"{self.where}: {path}: {what}; the adapter is incomplete, save it again")

    def _mismatch(self, path: str, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> MismatchError:
        return MismatchError(
            f"{self.where}: {path}: {what} is {size_of(found)} but the others need {size_of(expected)}"
        )
