"""adapter_config.json of an adapter made from others: what their configs share, with ranks and scales made true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.peft_write import NO_TARGETS, rank_fields
from lorasurgery.adapters.selection import Selection

# What PEFT selects modules by; kept together or not at all, for each restricts the others.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_BIAS = ("none", "lora_only", "all")


def derived_config(
    sources: Sequence[Adapter], ranks: dict[str, int], alphas: dict[str, float], *, bias: bool, dora: bool = False
) -> dict[str, Any]:
    """The config for factors of these ranks and alphas, scale alpha/r, that came out of the sources.

    Args:
        sources: At least one; the first one's task, base model and other fields go along.
        ranks, alphas: By full module path, of every module in the file.
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
