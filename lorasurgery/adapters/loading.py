"""How transformers' from_pretrained names, takes apart and joins what it reads (5.23, core_model_loading)."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from lorasurgery.adapters.cuts import Cut, Shapes, numbered, read_cuts


class Loading:
    """The library's own rules for one model.

    Args:
        model: On the meta device.

    Raises:
        ImportError: transformers 4, which renames nothing but prefixes.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        steps = get_model_conversion_mapping(model)
        self.model, self._rename = model, rename_source_key
        self.renamings = [s for s in steps if isinstance(s, WeightRenaming)]
        self.converters = [s for s in steps if isinstance(s, WeightConverter)]
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def name_of(self, name: str) -> str | None:
        """The name in memory of a tensor that is loaded as it is; None for others."""
        found, pattern = self._place(name)
        return found if found in self.shapes and pattern is None else None

    def keeps(self, path: str) -> bool:
        """Whether PEFT, which renames an adapter's keys by the same rules, leaves this module's as they are."""
        key = f"{path}.lora_A.weight"
        return key.endswith(self._rename(key, self.renamings, [])[0])

    def cuts(self, shapes: Shapes) -> dict[str, tuple[Cut, ...]]:
        """Where the rows of each tensor go that is not loaded as it is; () where it becomes something else.

        Args:
            shapes: Of the tensors on disk; experts are left to the rules for experts.
        """
        by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for name in sorted(shapes, key=_natural) if by_pattern else ():
            memory, pattern = self._place(name)
            if pattern is not None and memory in self.shapes and not _is_of_experts(by_pattern[pattern]):
                groups[memory][name] = pattern
        found: dict[str, tuple[Cut, ...]] = {}
        for memory, members in groups.items():
            converter = copy.deepcopy(by_pattern[next(iter(members.values()))])
            found |= dict.fromkeys(members, ()) | self._converted(converter, memory, members, shapes)
        return found

    def _place(self, name: str) -> tuple[str, str | None]:
        """The first name in memory that a tensor is loaded to, and the pattern of the conversion on the way."""
        prefix = self.model.base_model_prefix
        found, pattern = self._rename(name, self.renamings, self.converters, prefix, self.shapes)
        if found not in self.shapes and name in self.shapes:
            found, pattern = self._rename(name, [], [], base_model_prefix=prefix, meta_state_dict=self.shapes)
        return found, pattern

    def _converted(
        self, converter: Any, memory: str, members: dict[str, str], shapes: Shapes
    ) -> dict[str, tuple[Cut, ...]]:
        own = {name: shapes[name] for name in members}
        if not all(own.values()):  # a scalar has no rows
            return {}
        numbers, owned = numbered(own)
        for name, pattern in members.items():
            converter.add_tensor(memory, name, pattern, numbers[name])
        try:
            loaded = converter.convert(memory, model=self.model, config=self.model.config)
        except Exception:  # a conversion of columns, or of more than rows
            return {}
        return read_cuts({n: v[0] if isinstance(v, list) else v for n, v in loaded.items()}, owned, own, self.shapes)


def _is_of_experts(converter: Any) -> bool:
    names = [type(op).__name__ for op in converter.operations]
    patterns = [p.replace("shared_experts", "") for p in (*converter.source_patterns, *converter.target_patterns)]
    return any("Modulelist" in n or "Experts" in n for n in names) or any("experts" in p for p in patterns)


def _natural(name: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)
