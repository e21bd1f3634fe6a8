"""Writing PEFT's adapter folders: keys, the smallest exact target_modules, and adapter_config.json, new or derived."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.fused import parameter_names
from lorasurgery.adapters.peft.patterns import Selection
from lorasurgery.adapters.peft.read import PREFIX

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
        names = exact_targets(set(self.ranks) - self.parameters, self.paths)
        return names if names or self.parameters else NO_TARGETS


def rank_fields(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """r and lora_alpha by the commonest values, and a pattern for each module that has others.

    PEFT takes the first pattern that matches a path's end (0.21.2, other.get_pattern_key) and sorts patterns when it
    saves, so a path that another one ends in is anchored.

    >>> rank_fields({"a.q": 4, "b.q": 4, "b.v": 2}, {"a.q": 4.0, "b.q": 4.0, "b.v": 2.0})["rank_pattern"]
    {'b.v': 2}
    >>> rank_fields({"out": 2, "a.out": 4, "b.out": 4}, {"out": 2.0, "a.out": 2.0, "b.out": 2.0})["rank_pattern"]
    {'^out': 2}
    """
    r = _commonest(ranks.values(), 8)
    alpha = _commonest(alphas.values(), float(r))
    ends = {path[i + 1 :] for path in ranks for i, letter in enumerate(path) if letter == "."}
    keys = {path: f"^{path}" if path in ends else path for path in sorted(ranks)}
    return {
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {key: ranks[path] for path, key in keys.items() if ranks[path] != r},
        "alpha_pattern": {key: _whole(alphas[path]) for path, key in keys.items() if alphas[path] != alpha},
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


def exact_suffixes(chosen: set[str], paths: set[str]) -> list[str]:
    """The fewest names that mean exactly the chosen modules: an ending where all of its modules are chosen.

    PEFT matches target_modules by path or by ".name" ending.
    A name of digits alone goes with its parent's, for `0` would also mean the activations and dropouts of other
    sequences, which have no tensors and so may not be among the paths.

    >>> exact_suffixes({"a.q", "b.q"}, {"a", "a.q", "b", "b.q", "b.k"})
    ['q']
    >>> exact_suffixes({"a.q"}, {"a", "a.q", "b", "b.q"})
    ['a.q']
    >>> exact_suffixes({"a.to_out.0", "b.to_out.0"}, {"a.to_out.0", "b.to_out.0", "b.ff.2"})
    ['to_out.0']
    """
    mine: dict[str, set[str]] = defaultdict(set)
    for path in chosen:
        mine[_ending(path)].add(path)
    known = {prefix for path in paths | chosen for prefix in _prefixes(path)}
    wide = _also_meant(set(mine), known - chosen)
    wide |= _without_child({e for e in mine if e.rpartition(".")[2].isdigit()}, known)
    return sorted(name for ending, own in mine.items() for name in (own if ending in wide else {ending}))


def exact_targets(chosen: set[str], paths: set[str]) -> list[str] | str:
    """target_modules for exactly these modules: names, or an expression where a whole path ends another's.

    >>> exact_targets({"proj_out", "blocks.0.q"}, {"proj_out", "blocks.0.proj_out", "blocks.0.q"})
    '(?:.*[.])?q|proj_out'
    """
    names = exact_suffixes(chosen, paths)
    known = {prefix for path in paths for prefix in _prefixes(path)}
    caught = _also_meant(set(names), known - chosen)
    if not caught:
        return names
    endings = [f"(?:.*[.])?{name.replace('.', '[.]')}" for name in names if name not in caught]
    return "|".join(endings + [path.replace(".", "[.]") for path in sorted(caught)])


def _ending(path: str) -> str:
    """The last part of a path, with as many before it as it takes to begin with a word.

    >>> _ending("blocks.0.attn.to_q"), _ending("blocks.0.net.0.2")
    ('to_q', 'net.0.2')
    """
    parts = path.split(".")
    start = len(parts) - 1
    while start and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def _also_meant(endings: set[str], others: set[str]) -> set[str]:
    """The endings by which PEFT would also find one of the other paths."""
    depths = {e.count(".") + 1 for e in endings}
    found = set()
    for other in others:
        parts = other.split(".")
        found |= {".".join(parts[-n:]) for n in depths if n <= len(parts)}
    return found & endings


def _without_child(endings: set[str], known: set[str]) -> set[str]:
    """The endings whose parent has a namesake without such a child on disk; there it may be a layer without tensors."""
    parents: dict[str, set[str]] = defaultdict(set)
    for ending in endings:
        parents[ending.rpartition(".")[0]].add(ending.rpartition(".")[2])
    found = set()
    for path in known:
        own = _ending(path)
        for child in parents.get(own, ()):
            if f"{path}.{child}" not in known:
                found.add(f"{own}.{child}")
    return found


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda v: (counts[v], v)) if counts else default


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


# What PEFT selects modules by; kept together or not at all, for each restricts the others.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_BIAS = ("none", "lora_only", "all")


def derived_config(
    sources: Sequence[Adapter], ranks: dict[str, int], alphas: dict[str, float], *, bias: bool, dora: bool = False
) -> dict[str, Any]:
    """The config for factors of these ranks and alphas, scale alpha/r, that came out of the sources.

    Args:
        sources: At least one; the first one's task, base model and other fields go along.
        ranks: By full module path, of every module in the file.
        alphas: By full module path, of every module in the file.
        bias: Whether the factors have biases of their own (lora_bias).
        dora: Whether they have magnitudes.
    """
    configs = [a.config for a in sources]
    wrapped = {path: d.parameter for a in sources for path, d in a.deltas.items() if d.parameter}
    known = {path for a in sources for path in a.deltas if path not in wrapped}
    selections = [(Selection(a.config, a.path), a) for a in sources]
    told = all(chosen.means(path) for chosen, a in selections for path in a.deltas if path in known)
    saved = sorted({m for c in configs for m in c.get("modules_to_save") or []})
    kinds = [c.get("bias") for c in configs]
    return {
        **configs[0],
        **rank_fields(
            {wrapped.get(path, path): r for path, r in ranks.items()},
            {wrapped.get(path, path): alpha for path, alpha in alphas.items()},
        ),
        **_selection(configs, set(ranks) - set(wrapped), known if told else set()),
        **_parameters(configs, {wrapped[path] for path in ranks if path in wrapped}, set(wrapped.values())),
        **({"target_modules": []} if ranks and set(ranks) <= set(wrapped) else {}),
        "bias": max((k for k in kinds if k in _BIAS), key=_BIAS.index, default="none"),
        "ensure_weight_tying": any(a.tied for a in sources),
        "fan_in_fan_out": any(a.fan_in_fan_out for a in sources),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": bias,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "use_dora": dora,
        "use_rslora": False,
    }


def _parameters(configs: Sequence[dict[str, Any]], chosen: set[str], known: set[str]) -> dict[str, Any]:
    """target_parameters: the sources' own words where they still mean exactly the chosen ones, else full paths."""
    if not known:
        return {}
    words = [sorted(c.get("target_parameters") or []) for c in configs]
    same = chosen == known and all(w == words[0] for w in words)
    return {"target_parameters": words[0] if same else sorted(chosen)}


def _selection(configs: Sequence[dict[str, Any]], chosen: set[str], known: set[str]) -> dict[str, Any]:
    """The sources' own names where they still mean exactly the chosen modules, else every full path.

    Always a list: some servers don't take a regular expression.
    """
    words = [{key: c.get(key) for key in _SELECTION} for c in configs]
    lists = [w["target_modules"] for w in words if isinstance(w["target_modules"], list)]
    if chosen == known and len(lists) == len(words) and all(lists):
        if all(w == words[0] for w in words):
            return words[0]
        if not any(w[k] for w in words for k in _SELECTION[1:]):
            chosen = {name for names in lists for name in names}
    return {**dict.fromkeys(_SELECTION), "target_modules": sorted(chosen) or NO_TARGETS}
