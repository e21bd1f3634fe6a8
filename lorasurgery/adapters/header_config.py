"""What the header of an adapter file says about alpha: diffusers' lora_adapter_metadata, or a plain `alpha`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from lorasurgery.adapters.peft_config import first_match, refuse_variants
from lorasurgery.errors import FormatError

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

    def scaling(self, path: str, rank: int) -> tuple[float, float] | None:
        """(alpha, scale) of a module; None when the header doesn't say."""
        for prefix, config in self.components.items():
            if not prefix or path.startswith(f"{prefix}."):  # a component's own file has no prefixes
                inner = path[len(prefix) + 1 :] if prefix else path
                pattern = {k.removeprefix("^"): v for k, v in (config.get("alpha_pattern") or {}).items()}
                alpha = float(first_match(pattern, inner, config.get("lora_alpha", 8)))
                return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return None if self.alpha is None else (self.alpha, self.alpha / rank)


def read_header_config(metadata: dict[str, str], where: str) -> HeaderConfig:
    """Take the configs out of a header's metadata.

    Raises:
        FormatError: not JSON, or no number where one must be. UnsupportedError: a variant that is refused by name.
    """
    plain = metadata.get("alpha")
    alpha = None if plain is None else _number(plain, f"{where}: the header's alpha")
    if KEY not in metadata:
        return HeaderConfig(alpha=alpha)
    try:
        flat = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: {KEY} in the header is not JSON") from None
    if not isinstance(flat, dict):
        raise FormatError(f"{where}: {KEY} in the header is not an object")
    components: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        prefix, _, name = key.rpartition(".")
        if name in _FIELDS:
            components.setdefault(prefix, {})[name] = value
    for prefix, config in components.items():
        refuse_variants(config, f"{where}: {KEY} of {prefix}")
        for name in ("r", "lora_alpha"):
            _number(config.get(name, 8), f"{where}: {prefix}.{name} in {KEY}")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in (config.get(name) or {}).items():
                _number(value, f"{where}: {prefix}.{name}[{key!r}] in {KEY}")
    return HeaderConfig(components, alpha, flat)


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise FormatError(f"{what} is {value!r}; expected a finite number")
    return number
