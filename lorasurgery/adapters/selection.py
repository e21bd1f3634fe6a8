"""Which modules PEFT's target_modules means (peft 0.21.2, tuners_utils.check_target_module_exists)."""

from __future__ import annotations

import re
from typing import Any


def selects(config: dict[str, Any], path: str) -> bool:
    """Whether PEFT's target_modules, exclude_modules and layers_to_transform mean a module (tuners_utils).

    >>> selects({"target_modules": ["q_proj"]}, "l.0.q_proj"), selects({"target_modules": ".*v"}, "l.0.q_proj")
    (True, False)
    """
    targets = config.get("target_modules")
    if targets is None or targets in ("all-linear", ["all-linear"]):
        return True  # by the model's family, or every linear layer
    if _means(config.get("exclude_modules"), path) or not _means(targets, path):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(targets, str) or path in targets:
        return True
    wanted = [layers] if isinstance(layers, int) else list(layers)
    patterns = config.get("layers_pattern") or None
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^\.]*"]:
        match = re.match(rf".*?\.{pattern}\.(\d+)\.", path)
        if match:
            return int(match[1]) in wanted
    return False


def _means(names: Any, path: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == n or path.endswith(f".{n}") for n in names)
