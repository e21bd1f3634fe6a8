"""One module of an adapter file without a config: its tensors by part, checked while their shapes are read."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from lorasurgery.adapters.factor_check import check_factor, check_float
from lorasurgery.adapters.image_names.components import adapter_place
from lorasurgery.adapters.magnitude import LycorisMagnitude, Magnitude, PeftMagnitude
from lorasurgery.adapters.single_file.header import HeaderConfig
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, MismatchError, UnsupportedError, size_of


@dataclass(frozen=True)
class StoredModule:
    """What a kind of update is read from.

    Args:
        path: The module's, as the file writes it.
        parts: Part -> name of its tensor, e.g. `hada_w1_a` -> `lora_unet_….hada_w1_a`.
        weights: The file.
        config: What its header says of alpha.
        where: The file, for messages.
    """

    path: str
    parts: dict[str, str]
    weights: Checkpoint
    config: HeaderConfig
    where: str

    def expect(self, needed: Collection[str], allowed: Collection[str]) -> None:
        """Raise FormatError unless all needed parts are here, and no others than the allowed ones."""
        missing, extra = set(needed) - set(self.parts), set(self.parts) - set(needed) - set(allowed)
        if missing or extra:
            first = sorted(missing or extra)[0]
            name = f"lora_{first}" if first in ("down", "up", "mid") else first
            raise self.incomplete(f"{name} is missing" if missing else f"{name} is one too many")

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a factor, which must be a floating-point matrix or kernel with numbers in it."""
        info = self.weights.tensors[self.parts[part]]
        check_factor(info, self.where)
        return info.shape

    def check_no_kernel(self, part: str, shape: tuple[int, ...]) -> None:
        """Raise UnsupportedError for a factor with a kernel where none belongs."""
        if math.prod(shape[2:]) != 1:
            raise UnsupportedError(f"{self.where}: {self.parts[part]} has shape {list(shape)}; expected a kernel of 1")

    def scaling(self, rank: int) -> tuple[float, float]:
        """alpha and alpha/r: by the alpha tensor, else by the header, else 1; LyCORIS's rsLoRA is in its alpha."""
        if "alpha" in self.parts:
            alpha = self.weights.number(self.parts["alpha"])
            if not math.isfinite(alpha):
                raise FormatError(f"{self.where}: {self.parts['alpha']} is {alpha}; expected a finite number")
            return alpha, alpha / rank
        found = self.config.scaling(self.path, rank)
        if found is not None:
            return found
        if "lora_A" in self.parts.get("down", "") and adapter_place(self.path) is None:
            raise UnsupportedError(
                f"{self.where}: LoRA factors without PEFT's adapter_config.json, so alpha is unknown; give the "
                "adapter's folder"
            )
        return float(rank), 1.0

    def magnitude(self, flat: tuple[int, int]) -> Magnitude | None:
        """DoRA's norms for an update of shape (out, in·kernel), if there are any."""
        if "dora_scale" in self.parts and "magnitude" in self.parts:
            raise FormatError(
                f"{self.where}: {self.path} has both dora_scale and lora_magnitude_vector; which is meant?"
            )
        lycoris = "dora_scale" in self.parts
        name = self.parts.get("dora_scale" if lycoris else "magnitude")
        if name is None:
            return None
        shape = self.weights.tensors[name].shape
        size = math.prod(shape)
        by_output = size == flat[0] and (shape[:1] == (size,) or not lycoris)
        by_input = lycoris and shape[:1] == (1,) and 0 < size == math.prod(shape[:2])
        if not by_output and not (by_input and flat[1] % size == 0):
            raise self.mismatch(name.rpartition(".")[2], shape, (flat[0], 1))
        check_float(self.weights.tensors[name], self.where)
        return LycorisMagnitude(name, shape, not by_output) if lycoris else PeftMagnitude(name, shape)

    def incomplete(self, what: str) -> FormatError:
        """The error that a part is missing or one too many."""
        return FormatError(f"{self.where}: {self.path}: {what}; the adapter is incomplete, save it again")

    def mismatch(self, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> MismatchError:
        """The error that shapes contradict each other."""
        return MismatchError(
            f"{self.where}: {self.path}: {what} is {size_of(found)} but the others need {size_of(expected)}"
        )
