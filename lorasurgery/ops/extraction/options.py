"""How extract chooses ranks and scales, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorasurgery.adapters.model_names.patterns import PRESETS, any_match, check_patterns
from lorasurgery.clients.client import client_named
from lorasurgery.errors import UsageError
from lorasurgery.linalg.rank import RankChoice

if TYPE_CHECKING:
    pass

DEFAULT_RANK = 16


SvdMethod = Literal["auto", "randomized", "exact"]


@dataclass(frozen=True)
class Selection:
    """--target, --exclude, --full and --common, as the command line gives them.

    Examples:
        >>> Selection(exclude=("lm_head",)).wants("model.layers.0.mlp.up_proj")
        True
    """

    target: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    full: tuple[str, ...] = ("auto",)
    common: bool = False

    def wants(self, *paths: str, tensor: str = "") -> bool:
        """Whether --target and --exclude leave a module in, by any of its paths or by its tensor's whole name."""

        def meant(patterns: Sequence[str]) -> bool:
            by_name = [p for p in patterns if p not in PRESETS] if tensor and not tensor.endswith(".weight") else []
            return any(any_match(patterns, p) for p in paths) or any_match(by_name, tensor)

        return (not self.target or meant(self.target)) and not meant(self.exclude)

    def stores(self, *names: str) -> bool:
        """Whether --full means one of these names by a pattern."""
        return any(any_match(self.full_patterns, n) for n in names)

    def names(self, path: str) -> bool:
        """Whether --target means this module by name, not by a preset: so only are a language model's convolutions."""
        return any_match([t for t in self.target if t not in PRESETS], path)

    @property
    def full_patterns(self) -> tuple[str, ...]:
        """The patterns among --full, without the words auto and none."""
        return tuple(f for f in self.full if f not in ("auto", "none"))

    def check(self, paths: Sequence[str]) -> None:
        """Raise UsageError for patterns that mean nothing, with the nearest names."""
        if "none" in self.full and len(self.full) > 1:
            raise UsageError("--full none contradicts the other --full; give one of them")
        check_patterns("--target", self.target, paths)
        check_patterns("--exclude", self.exclude, paths)
        check_patterns("--full", self.full_patterns, paths)


@dataclass(frozen=True)
class ExtractOptions:
    """How extract chooses ranks and scales and what it keeps.

    Args:
        choice: Rank by number, energy, tolerance or a budget (of which a share is taken of the base's bytes).
        alpha: lora_alpha of the adapter; None makes every scale 1, so the factors say ΔW as they are.
        rslora: scale = alpha/√r instead of alpha/r (arXiv:2312.03732).
        uniform_rank: zero-pad all factors to one rank, the form every server takes.
        svd: `exact` for LAPACK/cuSOLVER, `randomized`, or `auto` by the matrix's size.
        dtype: safetensors name for what is written; None takes the tuned weights' own.
        allow_nonfinite: Store tensors whole of which a value is NaN or infinite, instead of stopping at them.
        client: The program it is for: peft, vllm, sglang or llama.cpp (a folder), diffusers, comfyui or kohya (a file).
        keep_rounding: Take tensors too that differ by no more than the rounding of one side's dtype, instead of
            counting them and leaving them out.
    """

    choice: RankChoice = field(default_factory=lambda: RankChoice(rank=DEFAULT_RANK))
    selection: Selection = field(default_factory=Selection)
    alpha: float | None = None
    rslora: bool = False
    uniform_rank: bool = False
    svd: SvdMethod = "auto"
    seed: int = 0
    dtype: str | None = None
    allow_nonfinite: bool = False
    keep_rounding: bool = False
    client: str = "peft"

    def check(self) -> None:
        """Raise UsageError for values that have no meaning."""
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"--alpha {self.alpha}: expected a positive number")
        if self.dtype not in (None, "F32", "BF16", "F16"):
            raise UsageError("--dtype: an adapter is written as float32, bfloat16 or float16")
        client_named(self.client)

    def scaling(self, rank: int) -> tuple[float, float]:
        """(alpha, scale) of a module of this rank."""
        root = math.sqrt(rank) if self.rslora else float(rank)
        alpha = root if self.alpha is None else self.alpha
        return alpha, alpha / root

    def alpha_of(self, rank: int, scale: float) -> float:
        """The alpha that makes this scale of this rank."""
        alpha, own = self.scaling(rank)
        return alpha if scale == own else scale * (math.sqrt(rank) if self.rslora else rank)
