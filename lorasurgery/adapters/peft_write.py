"""Writing PEFT's adapter folders: keys, the smallest exact target_modules, and adapter_config.json."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.fused import parameter_names
from lorasurgery.adapters.peft import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

# What PEFT accepts when only full modules were saved (peft.utils.constants.DUMMY_TARGET_MODULES).
NO_TARGETS = "dummy-target-modules"


@dataclass
class PeftLayout:
    """What an adapter folder will say, collected module by module.

    Args:
        ranks: module path (or parameter's path) -> rank, of every module with factors.
        alphas: module path -> alpha.
        paths: Every module path of the model, so that target_modules can name exactly the right ones.
        leaves: Every parameter's path, likewise for target_parameters.
        parameters: Those of `ranks` that PEFT must be told of as parameters (fused experts).
        saved: modules_to_save: names that mean just the modules stored whole.
        bias: `none`, `lora_only` or `all`, by which biases the file holds.
        tied: The same update is stored for all modules that share one tensor (ensure_weight_tying).
    """

    paths: set[str]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    leaves: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    bias: str = "none"
    rslora: bool = False
    tied: bool = False
    fan_in_fan_out: bool = False
    base_model: str = ""
    revision: str | None = None
    task: str | None = None

    def add(self, path: str, rank: int, alpha: float, *, parameter: bool = False) -> None:
        """Note a module, or a parameter, with factors."""
        self.ranks[path], self.alphas[path] = rank, alpha
        if parameter:
            self.parameters.add(path)

    def config(self) -> dict[str, Any]:
        """adapter_config.json, with patterns only for modules that differ from the commonest rank and alpha."""
        return {
            **rank_fields(self.ranks, self.alphas),
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model,
            "bias": self.bias,
            "ensure_weight_tying": self.tied,
            "exclude_modules": None,
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "modules_to_save": self.saved or None,
            "peft_type": "LORA",
            "revision": self.revision,
            "target_modules": self._modules(),
            **({"target_parameters": parameter_names(self.parameters, self.leaves)} if self.parameters else {}),
            "task_type": self.task,
            "use_dora": False,
            "use_rslora": self.rslora,
        }

    def _modules(self) -> list[str] | str:
        names = target_names(set(self.ranks) - self.parameters, self.paths)
        return names if names or self.parameters else NO_TARGETS


def rank_fields(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """r and lora_alpha by the commonest values, and patterns with full paths, which cannot overlap, for the others.

    >>> rank_fields({"a.q": 4, "b.q": 4, "b.v": 2}, {"a.q": 4.0, "b.q": 4.0, "b.v": 2.0})["rank_pattern"]
    {'b.v': 2}
    """
    r = _commonest(ranks.values(), 8)
    alpha = _commonest(alphas.values(), float(r))
    return {
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {p: k for p, k in sorted(ranks.items()) if k != r},
        "alpha_pattern": {p: _whole(a) for p, a in sorted(alphas.items()) if a != alpha},
    }


def factor_keys(path: str, kind: str) -> tuple[str, str]:
    """The two tensor names (lora_A, lora_B) of a module in the file.

    >>> factor_keys("h.wte", "embedding")[0]
    'base_model.model.h.wte.lora_embedding_A'
    """
    if kind == "embedding":
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def with_kernel(down: Tensor, up: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as PEFT holds them: a convolution's have its kernel, and one of ones.

    >>> import torch
    >>> [t.shape for t in with_kernel(torch.zeros(2, 27), torch.zeros(8, 2), (3, 3))]
    [torch.Size([2, 3, 3, 3]), torch.Size([8, 2, 1, 1])]
    """
    if not kernel:
        return down, up
    return down.reshape(down.shape[0], -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))


def target_names(chosen: set[str], paths: Iterable[str]) -> list[str] | str:
    """target_modules that mean exactly the chosen modules: names, or a regular expression where no names can.

    A module at the top may have a name that others end in, and PEFT would take those for it too.

    >>> target_names({"output", "l.q"}, {"output", "l", "l.q", "l.output"})
    '(?:.*\\.)?q|output'
    """
    names = exact_suffixes(chosen, paths)
    others = {prefix for path in paths for prefix in _prefixes(path)} - chosen
    caught = {n for n in names if any(p.endswith(f".{n}") for p in others)}
    if not caught:
        return names
    return "|".join([rf"(?:.*\.)?{re.escape(n)}" for n in names if n not in caught] + sorted(map(re.escape, caught)))


def exact_suffixes(chosen: set[str], paths: Iterable[str]) -> list[str]:
    """The fewest names that mean exactly the chosen modules: a leaf where all of its modules are chosen.

    PEFT matches target_modules by path or by ".name" ending.

    >>> exact_suffixes({"a.q", "b.q"}, {"a", "a.q", "b", "b.q", "b.k"})
    ['q']
    >>> exact_suffixes({"a.q"}, {"a", "a.q", "b", "b.q"})
    ['a.q']
    """
    mine: dict[str, set[str]] = defaultdict(set)
    for path in chosen:
        mine[path.rpartition(".")[2]].add(path)
    wide = {p.rpartition(".")[2] for p in {prefix for path in paths for prefix in _prefixes(path)} - chosen}
    return sorted(name for leaf, own in mine.items() for name in (own if leaf in wide else {leaf}))


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda v: (counts[v], v)) if counts else default


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
