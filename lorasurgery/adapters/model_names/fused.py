"""Experts that a model holds as one parameter in memory, and what PEFT asks of adapters for such models.

transformers 5 stacks the experts of most families when it loads them: a matrix for each expert on disk is a slice of
`experts.gate_up_proj` or `experts.down_proj` in memory, which PEFT reaches by `target_parameters`. Facts:
transformers 5.23 (conversion_mapping.py, `use_experts_implementation`), peft 0.21.2 (its weight conversion).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorasurgery.adapters.model_names.renames import model_types

# For these PEFT 0.21.2 takes any target module that ends in the leaves below for a matrix of transformers 4's experts
# and targets gate_up_proj and down_proj instead, a dense layer's or a shared expert's matrix too.
_CONVERTED = frozenset((
    "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe "
    "glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open"
).split())  # fmt: skip
# Families with a matrix for each expert on disk and one parameter in memory.
_STACKED = _CONVERTED | frozenset((
    "axk1 axk2 bailing_hybrid deepseek_ocr2 deepseek_v4 flint glm4v_moe_text glm5_next glm5_next_text hy_v3 jamba "
    "kimi_k25 kimi_linear kolibri1 laguna lfm2_moe mimo_v2_flash minimax minimax_m2 mistral_large4_text mixtral "
    "nemotron_h phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen4_exp_text"
).split())  # fmt: skip
# Parameters stored (experts, in, out) that PEFT turns: `is_transposed` of the experts' module, or of the conversion.
_TRANSPOSED = frozenset(("gpt_oss", "openai_privacy_filter", "aria", "aria_text"))
_TURNED_ON_DISK = frozenset(("qwen3_vl_moe", "qwen3_vl_moe_text"))
_CONVERTED_LEAVES = ("gate_proj", "up_proj", "down_proj", "gate")

# leaf on disk -> (leaf in memory, which part of its rows, of how many)
_LEAVES = {
    "gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2), "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2), "w3": ("gate_up_proj", 1, 2), "w2": ("down_proj", 0, 1),
}  # fmt: skip
_UNGATED = {"up_proj": ("up_proj", 0, 1), "down_proj": ("down_proj", 0, 1)}
_MATRIX = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<leaf>\w+)\.weight")
_STACK = re.compile(r".+\.experts\.(gate_up_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class ExpertPlace:
    """Where a tensor lies in a fused parameter: `part` of `parts` runs of rows of one expert, or of all (None).

    Args:
        parameter: The parameter's path in memory, e.g. `model.layers.0.mlp.experts.gate_up_proj`.
    """

    parameter: str
    expert: int | None
    part: int = 0
    parts: int = 1


def expert_place(memory: str, shape: tuple[int, ...], config: dict[str, Any]) -> ExpertPlace | None:
    """Which fused parameter a tensor is part of, by its name in memory but for the stacking; None for other tensors.

    >>> expert_place("model.layers.0.mlp.experts.3.up_proj.weight", (8, 4), {"model_type": "qwen3_moe"})
    ExpertPlace(parameter='model.layers.0.mlp.experts.gate_up_proj', expert=3, part=1, parts=2)
    >>> expert_place("model.layers.0.mlp.experts.3.up_proj.weight", (8, 4), {"model_type": "unknown"})
    """
    if len(shape) == 3 and _STACK.fullmatch(memory):
        return ExpertPlace(memory, None)
    match, types = _MATRIX.fullmatch(memory), model_types(config)
    if match is None or len(shape) != 2 or not types & _STACKED:
        return None
    leaves = _UNGATED if "nemotron_h" in types else _LEAVES
    if match["leaf"] not in leaves:
        return None
    leaf, part, parts = leaves[match["leaf"]]
    return ExpertPlace(f"{match['module']}.{leaf}", int(match["expert"]), part, parts)


def is_turned(parameter: str, shape: tuple[int, ...], config: dict[str, Any]) -> bool:
    """Whether a three-dimensional tensor on disk is the transpose, expert by expert, of what PEFT calls (out, in).

    >>> is_turned("model.layers.0.mlp.experts.down_proj", (4, 8, 8), {"model_type": "gpt_oss"})
    True
    """
    types = model_types(config)
    if types & _TURNED_ON_DISK:  # turned on loading, unless the shapes say that it need not be
        text = config.get("text_config")
        hidden = (text if isinstance(text, dict) else config).get("hidden_size")
        return shape[1] != shape[2] and (shape[2] if parameter.endswith("down_proj") else shape[1]) == hidden
    return bool(types & _TRANSPOSED)


def wants_parameter(path: str, config: dict[str, Any]) -> bool:
    """Whether PEFT must be told of a linear layer as a parameter (`….weight`), because it mistakes its name.

    >>> wants_parameter("model.layers.0.mlp.shared_experts.up_proj", {"model_type": "deepseek_v3"})
    True
    """
    return config.get("model_type") in _CONVERTED and path.rpartition(".")[2] in _CONVERTED_LEAVES


def parameter_names(chosen: set[str], parameters: set[str]) -> list[str]:
    """The fewest names that mean exactly the chosen parameters: what follows the layer's number, else full paths.

    >>> parameter_names({"l.0.mlp.experts.down_proj", "l.1.mlp.experts.down_proj"},
    ...                 {"l.0.mlp.experts.down_proj", "l.1.mlp.experts.down_proj", "l.1.mlp.down_proj"})
    ['mlp.experts.down_proj']
    """
    names: set[str] = set()
    for path in chosen:
        ending = re.split(r"\.\d+\.", path)[-1]
        meant = {p for p in parameters if p.endswith(f".{ending}")}
        names.add(ending if meant and meant <= chosen else path)
    return sorted(names)
