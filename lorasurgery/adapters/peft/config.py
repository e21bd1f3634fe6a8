"""adapter_config.json: what PEFT's LoRA configuration means for files, and what of it is refused by name."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasurgery.adapters import config_values as values
from lorasurgery.adapters.config_values import deepest, endings
from lorasurgery.adapters.peft.patterns import PatternTable
from lorasurgery.checkpoint.json_text import MOST_CONFIG
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.errors import FormatError, MismatchError, UnsupportedError

# Each of these changes what the factors mean, so ignoring it would give wrong weights.
_REFUSED_KEYS = {
    "use_qalora": "QALoRA",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA (aLoRA), which has no merged form",
    "arrow_config": "an Arrow router, which has no merged form",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA",
    "monteclora_config": "MonteCLoRA",
}
_NO_DELTA = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
}
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying")
# These begin by subtracting from the base; only the converted form (init true, rank doubled) fits the plain base.
_UNCONVERTED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """The part of PEFT's LoraConfig that decides what the tensors mean.

    >>> PeftConfig(r=8, alpha=16).scaling("q_proj", 8)
    (16.0, 2.0)
    >>> PeftConfig(r=8, alpha=16, rank_pattern={"q_proj": 4}, rslora=True).scaling("l.0.q_proj", 4)
    (16.0, 8.0)
    """

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    tied: bool = False
    fan_in_fan_out: bool = False
    dora: bool = False
    parameters: tuple[str, ...] = ()
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    where: str = "adapter_config.json"

    def scaling(self, path: str, rank: int, where: str = "adapter_config.json") -> tuple[float, float]:
        """Give (alpha, scale) of the module at `path`, whose factors have `rank` (LoRA section 4.1; rsLoRA 2023).

        Raises:
            MismatchError: the config says another rank than the tensors have.
        """
        r = self.ranks.first(path, self.r)
        if r != rank:
            raise MismatchError(f"{where}: {path}: the factors have rank {rank} but adapter_config.json says {r}")
        alpha = float(self.alphas.first(path, self.alpha))
        return alpha, alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @cached_property
    def saved(self) -> dict[int, set[str]]:
        """modules_to_save by length, to be looked up."""
        table: dict[int, set[str]] = defaultdict(set)
        for name in self.modules_to_save:
            table[len(name)].add(name)
        return dict(table)

    @cached_property
    def ranks(self) -> PatternTable:
        """rank_pattern, ready to be asked."""
        return PatternTable(self.rank_pattern, f"{self.where}: rank_pattern")

    @cached_property
    def alphas(self) -> PatternTable:
        """alpha_pattern, the same."""
        return PatternTable(self.alpha_pattern, f"{self.where}: alpha_pattern")

    def is_parameter(self, path: str) -> bool:
        """Whether factors at this path belong to parameters inside a module (target_parameters), such as experts."""
        return bool(self._leaves(path.split(".base_layer")[0]))

    def parameter(self, path: str, rows: int, where: str) -> tuple[str, int, int]:
        """(path, rank, experts) of the wrapped parameter whose lora_A has rank·experts rows.

        The keys do not name the parameter: PEFT wraps a module's parameters one inside the other in the order in which
        the module has them, so the first lies under the most `base_layer`s.
        """
        module, inside = path.split(".base_layer")[0], path.count(".base_layer")
        leaves = self._leaves(module)
        leaves.sort(key=lambda leaf: leaf.startswith("down"))  # every family has gate_up_proj before down_proj
        if inside >= len(leaves):
            raise FormatError(f"{where}: {path} wraps more parameters than adapter_config.json names ({len(leaves)})")
        found = f"{module}.{leaves[len(leaves) - 1 - inside]}"
        rank = int(self.ranks.first(found, self.r))
        if rank < 1 or rows % rank:
            raise MismatchError(f"{where}: {path}: lora_A has {rows} rows, which is not a multiple of rank {rank}")
        return found, rank, rows // rank

    def _leaves(self, module: str) -> list[str]:
        """The names of a module's parameters that are adapted, in the config's order."""
        table = self._parameters
        found = sorted(item for end in endings(module, deepest(table)) for item in table.get(end, ()))
        return list(dict.fromkeys(leaf for _, leaf in found))

    @cached_property
    def _parameters(self) -> dict[str, list[tuple[int, str]]]:
        """target_parameters: end of a module's path -> (number, parameter)."""
        table: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, name in enumerate(self.parameters):
            module, _, leaf = name.rpartition(".")
            table[module].append((number, leaf))
        return dict(table)

    def token_rows(self, path: str) -> tuple[int, ...]:
        """The row numbers of trainable_token_indices for an embedding; a plain list is for the input embedding."""
        found = set(endings(path, deepest(self.tokens))) & set(self.tokens)
        if found:
            return next(rows for name, rows in self.tokens.items() if name in found)
        return self.tokens.get("", next(iter(self.tokens.values()), ()))


def read_config(file: Path) -> PeftConfig:
    """Read and check adapter_config.json.

    Raises:
        FormatError: missing, not JSON, or a value of the wrong kind.
        UnsupportedError: a refused variant.
    """
    if not os.path.lexists(file):
        raise FormatError(f"{file}: missing; without it alpha is unknown; put PEFT's config beside the weights")
    raw, where = load_object(file, most=MOST_CONFIG), str(file)
    refuse_variants(raw, where)
    values.check_selection(raw, where)
    flags = {key: values.flag(raw.get(key), f"{where}: {key}") for key in _FLAGS}
    found = PeftConfig(
        r=values.rank(_given(raw, "r"), f"{where}: r"),
        alpha=values.number(_given(raw, "lora_alpha"), f"{where}: lora_alpha"),
        rslora=flags["use_rslora"],
        rank_pattern=pattern(raw.get("rank_pattern"), f"{where}: rank_pattern", values.rank),
        alpha_pattern=pattern(raw.get("alpha_pattern"), f"{where}: alpha_pattern", values.number),
        modules_to_save=values.strings(raw.get("modules_to_save"), f"{where}: modules_to_save"),
        tied=flags["ensure_weight_tying"],
        fan_in_fan_out=flags["fan_in_fan_out"],
        dora=flags["use_dora"],
        parameters=values.strings(raw.get("target_parameters"), f"{where}: target_parameters"),
        tokens=_token_indices(raw.get("trainable_token_indices"), file),
        raw=raw,
        where=where,
    )
    _ = found.ranks, found.alphas  # what is not a regular expression is found now
    return found


def refuse_variants(raw: dict[str, Any], where: str) -> None:
    """Raise UnsupportedError for every variant whose factors mean something else than scale · B·A."""
    kind = str(raw.get("peft_type") or "LORA").upper().rpartition(".")[2]
    if kind in _NO_DELTA:
        raise UnsupportedError(f"{where}: peft_type {kind} has no weight update to merge (it changes the inputs)")
    if kind != "LORA":
        raise UnsupportedError(f"{where}: peft_type {kind} is not LORA, and lorasurgery does not merge it")
    for key, name in _REFUSED_KEYS.items():
        if raw.get(key):
            raise UnsupportedError(f"{where}: {key} is set: {name} is not merged by lorasurgery")
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_UNCONVERTED):
        raise UnsupportedError(
            f"{where}: init_lora_weights is {raw['init_lora_weights']!r}: the factors belong to a base that the "
            "initialisation has changed; save the converted form (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def pattern(value: Any, what: str, kind: Callable[[Any, str], float]) -> dict[str, float]:
    """An object of numbers by module pattern; null is none.

    Args:
        kind: Holds each number against what it must be.

    Raises:
        FormatError: something else.
    """
    value = value or {}
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {type(value).__name__}; expected an object of module patterns")
    return {name: kind(item, f"{what}[{name!r}]") for name, item in value.items()}


def _given(raw: dict[str, Any], key: str) -> Any:
    return 8 if raw.get(key) is None else raw[key]


def _token_indices(value: Any, file: Path) -> dict[str, tuple[int, ...]]:
    """A list of row numbers, or one for each embedding by name."""
    found = value if isinstance(value, dict) else {"": value or []}
    for rows in found.values():
        if not isinstance(rows, list) or not all(
            isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in rows
        ):
            raise FormatError(f"{file}: trainable_token_indices is {value!r}; expected row numbers")
    return {name: tuple(rows) for name, rows in found.items() if rows}
