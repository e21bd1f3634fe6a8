"""What the header of an adapter file says: alpha in its several spellings, and the hashes that image tools keep."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.config_values import check_selection, deepest, flag
from lorasurgery.adapters.peft.config import pattern, refuse_variants
from lorasurgery.adapters.peft.patterns import PatternTable
from lorasurgery.checkpoint.json_text import parse_object
from lorasurgery.checkpoint.plan import PlannedFile
from lorasurgery.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "lora_adapter_metadata"
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
           "target_modules", "peft_type", "init_lora_weights", "fan_in_fan_out", "bias")  # fmt: skip


@dataclass(frozen=True)
class HeaderConfig:
    """PEFT configs by the prefix of the component they are for (`unet`, `transformer`, …), and the plain alpha.

    >>> HeaderConfig({"unet": {"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}}).scaling("unet.attn.to_q", 4)
    (2.0, 0.5)
    """

    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    alpha: float | None = None
    raw: dict[str, Any] = field(default_factory=dict)
    where: str = "the header"

    def scaling(self, path: str, rank: int) -> tuple[float, float] | None:
        """(alpha, scale) of a module; None when the header doesn't say."""
        prefix = self._component(path)
        if prefix is None:
            return None if self.alpha is None else (self.alpha, self.alpha / rank)
        config, inner = self.components[prefix], path[len(prefix) + 1 :] if prefix else path
        alpha = float(self._alphas[prefix].first(inner, config.get("lora_alpha", 8)))
        return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _component(self, path: str) -> str | None:
        """The first component that a module is in; a component's own file has no prefixes."""
        numbers, most = self._numbers
        parts = path.split(".")[: most + 2]
        prefixes = ["", *(".".join(parts[:n]) for n in range(1, len(parts)))]
        return min((p for p in prefixes if p in numbers), key=lambda p: numbers[p], default=None)

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], int]:
        """The order of the components, and the most dots in any of their prefixes."""
        return {prefix: number for number, prefix in enumerate(self.components)}, deepest(self.components)

    @cached_property
    def _alphas(self) -> dict[str, PatternTable]:
        """alpha_pattern of each component."""
        found = {}
        for prefix, config in self.components.items():
            found[prefix] = PatternTable(config.get("alpha_pattern") or {}, _named(self.where, prefix, "alpha_pattern"))
        return found


def read_header_config(metadata: dict[str, str], where: str) -> HeaderConfig:
    """Take the configs out of a header's metadata.

    Raises:
        FormatError: not JSON, or no number where one must be.
        UnsupportedError: a variant that is refused by name.
    """
    plain = metadata.get("alpha")
    alpha = None if plain is None else _number(plain, f"{where}: the header's alpha")
    if KEY not in metadata:
        return HeaderConfig(alpha=alpha)
    flat = parse_object(metadata[KEY].encode(), f"{where}: {KEY} in the header")
    components: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        prefix, _, name = key.rpartition(".")
        if name in _FIELDS:
            components.setdefault(prefix, {})[name] = value
    for prefix, config in components.items():
        refuse_variants(config, f"{where}: {KEY} of {prefix}")
        check_selection(config, f"{where}: {KEY} of {prefix}")
        flag(config.get("use_rslora"), _named(where, prefix, "use_rslora"))
        for name in ("r", "lora_alpha"):
            _number(config.get(name, 8), _named(where, prefix, name))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern(config.get(name), _named(where, prefix, name), _number)
    return HeaderConfig(components, alpha, flat, where)


def _named(where: str, prefix: str, name: str) -> str:
    return f"{where}: {prefix}.{name} in {KEY}"


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise FormatError(f"{what} is {value!r}; expected a finite number")
    return number


MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def with_hashes(file: PlannedFile, tensors: Mapping[str, Tensor]) -> PlannedFile:
    """The file with the hashes its metadata had, of its new bytes; files that train with sd-scripts get them anyway.

    The model hash is the SHA-256 of all bytes after the header; the legacy hash that of 64 KiB at 1 MiB, in the file
    as it would be with the ss_* metadata alone.
    """
    known = {MODEL, LEGACY, SPEC} & set(file.metadata)
    trained = any(key.startswith("ss_") for key in file.metadata)
    if not known and not trained:
        return file
    plain = replace(file, metadata={k: v for k, v in file.metadata.items() if k.startswith("ss_")})
    start = len(plain.header())
    model, legacy = hashlib.sha256(), hashlib.sha256()
    legacy.update(plain.header()[_LEGACY_START : _LEGACY_START + _LEGACY_LENGTH])
    for item in file.tensors:
        raw = _bytes(tensors[item.name])
        model.update(raw)
        legacy.update(raw[max(0, _LEGACY_START - start) : max(0, _LEGACY_START + _LEGACY_LENGTH - start)])
        start += len(raw)
    found = {MODEL: model.hexdigest(), LEGACY: legacy.hexdigest()[:8]}
    if SPEC in known:
        found[SPEC] = f"0x{model.hexdigest()}"
    return replace(file, metadata=file.metadata | found)


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file whose tensors change while it is streamed: hashes that would be untrue are left out."""
    return {k: v for k, v in metadata.items() if k not in (MODEL, LEGACY, SPEC)}


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
