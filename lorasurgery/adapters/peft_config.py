"""adapter_config.json: what PEFT's LoRA configuration means for files, and what of it is refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    tied: bool = False
    fan_in_fan_out: bool = False
    dora: bool = False
    parameters: tuple[str, ...] = ()
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def scaling(self, path: str, rank: int, where: str = "adapter_config.json") -> tuple[float, float]:
        """Give (alpha, scale) of the module at `path`, whose factors have `rank` (LoRA section 4.1; rsLoRA 2023).

        Raises:
            MismatchError: the config says another rank than the tensors have.
        """
        r = first_match(self.rank_pattern, path, self.r)
        if r != rank:
            raise MismatchError(f"{where}: {path}: the factors have rank {rank} but adapter_config.json says {r}")
        alpha = float(first_match(self.alpha_pattern, path, self.alpha))
        return alpha, alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def is_parameter(self, path: str) -> bool:
        """Whether factors at this path belong to parameters inside a module (target_parameters), such as experts."""
        module = path.split(".base_layer")[0]
        return any(f".{module}".endswith(f".{p.rpartition('.')[0]}") for p in self.parameters)

    def parameter(self, path: str, rows: int, where: str) -> tuple[str, int, int]:
        """(path, rank, experts) of the wrapped parameter whose lora_A has rank·experts rows.

        The keys do not name the parameter: PEFT wraps a module's parameters one inside the other in the order in which
        the module has them, so the first lies under the most `base_layer`s.
        """
        module, inside = path.split(".base_layer")[0], path.count(".base_layer")
        mine = [p for p in self.parameters if f".{module}".endswith(f".{p.rpartition('.')[0]}")]
        leaves = list(dict.fromkeys(p.rpartition(".")[2] for p in mine))
        leaves.sort(key=lambda leaf: leaf.startswith("down"))  # every family has gate_up_proj before down_proj
        if inside >= len(leaves):
            raise FormatError(f"{where}: {path} wraps more parameters than adapter_config.json names ({len(leaves)})")
        found = f"{module}.{leaves[len(leaves) - 1 - inside]}"
        rank = int(first_match(self.rank_pattern, found, self.r))
        if rank < 1 or rows % rank:
            raise MismatchError(f"{where}: {path}: lora_A has {rows} rows, which is no multiple of rank {rank}")
        return found, rank, rows // rank

    def token_rows(self, path: str) -> tuple[int, ...]:
        """The row numbers of trainable_token_indices for an embedding; a plain list is for the input embedding."""
        for name, rows in self.tokens.items():
            if path == name or path.endswith("." + name):
                return rows
        return self.tokens.get("", next(iter(self.tokens.values()), ()))


def first_match(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of the path wins.

    >>> first_match({r"layers\\.1\\..*": 4, "q_proj": 2}, "m.layers.1.q_proj", 8)
    4
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def read_config(file: Path) -> PeftConfig:
    """Read and check adapter_config.json.

    Raises:
        FormatError: missing, not JSON, or a value of the wrong kind. UnsupportedError: a refused variant.
    """
    raw = _load(file)
    refuse_variants(raw, str(file))
    r = _number(raw, "r", 8, file)
    if r != int(r) or r < 1:
        raise FormatError(f"{file}: r is {raw['r']!r}; expected a whole number of at least 1")
    return PeftConfig(
        r=int(r),
        alpha=_number(raw, "lora_alpha", 8, file),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=_pattern(raw, "rank_pattern", file),
        alpha_pattern=_pattern(raw, "alpha_pattern", file),
        modules_to_save=_strings(raw, "modules_to_save", file),
        tied=bool(raw.get("ensure_weight_tying")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        dora=bool(raw.get("use_dora")),
        parameters=_strings(raw, "target_parameters", file),
        tokens=_token_indices(raw.get("trainable_token_indices"), file),
        raw=raw,
    )


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


def _load(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{file}: missing; without it alpha is unknown; put PEFT's config beside the weights"
        ) from None
    except (ValueError, RecursionError, OSError) as problem:
        raise FormatError(f"{file}: not readable as JSON ({_one_line(problem)})") from None
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _one_line(problem: BaseException) -> str:
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def _number(raw: dict[str, Any], key: str, default: float, file: Path) -> float:
    value = raw.get(key)
    return default if value is None else _check_number(value, key, file)


def _check_number(value: Any, key: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{file}: {key} is {value!r}; expected a finite number")
    return value


def _pattern(raw: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    pattern = raw.get(key) or {}
    if not isinstance(pattern, dict):
        raise FormatError(f"{file}: {key} is {type(pattern).__name__}; expected an object of module patterns")
    for name, value in pattern.items():
        _check_number(value, f"{key}[{name!r}]", file)
        try:
            re.compile(name)
        except re.error as problem:
            raise FormatError(f"{file}: {key} key {name!r} is no regular expression ({problem})") from None
    return pattern


def _strings(raw: dict[str, Any], key: str, file: Path) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{file}: {key} is {value!r}; expected a list of module names")
    return tuple(value)


def _token_indices(value: Any, file: Path) -> dict[str, tuple[int, ...]]:
    """A list of row numbers, or one for each embedding by name."""
    found = value if isinstance(value, dict) else {"": value or []}
    for rows in found.values():
        if not isinstance(rows, list) or not all(
            isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in rows
        ):
            raise FormatError(f"{file}: trainable_token_indices is {value!r}; expected row numbers")
    return {name: tuple(rows) for name, rows in found.items() if rows}
