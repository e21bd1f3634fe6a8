"""Where a model's names in memory differ from its names on disk: transformers 5 renames some families when it loads.

A rule only proposes a name; it counts when the checkpoint has that tensor, in that shape. Facts: transformers 5.23,
conversion_mapping.py, and what each family's save_pretrained wrote.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lorasurgery.adapters.rename_tables import TO_MEMORY, Rules


@dataclass(frozen=True)
class Family:
    """Substitutions that lead from memory to disk, all applied one after the other, and back.

    Args:
        model_types: config.json's model_type of the models whose disk names are these; back only goes for them.
    """

    to_disk: Rules
    to_memory: Rules = ()
    model_types: frozenset[str] = frozenset()


_VL_TYPES = (
    "llava llava_next llava_next_video llava_onevision vipllava paligemma gemma3 mllama aya_vision got_ocr2 internvl "
    "mistral3 aria"
)
_VIT_TYPES = "vit deit beit vit_mae vit_msn vivit ijepa audio-spectrogram-transformer"
_TOWERS = "vision_tower|vision_model|multi_modal_projector"
_VL_DISK: Rules = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (rf"^model\.({_TOWERS})\b", r"\1"),
)
_VL_MEMORY: Rules = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (rf"^({_TOWERS})\b", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),  # of older files
)
_QKV_DISK: Rules = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_QKV_MEMORY: Rules = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)

# What old files of any family call a LayerNorm's weight and bias.
_LEGACY: Rules = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

FAMILIES = (
    Family(_VL_DISK, _VL_MEMORY, frozenset(_VL_TYPES.split())),
    # older files of the same models keep the tower's own prefix
    Family((*_VL_DISK, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))),
    Family(
        ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        ((r"^model\.(?!language_model\.|visual\.)", "model.language_model."), (r"^visual\.", "model.visual.")),
        frozenset(("qwen2_vl", "qwen2_5_vl")),
    ),
    Family(
        (
            (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
            *_QKV_DISK,
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        ),
        (
            (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
            *_QKV_MEMORY,
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
        ),
        frozenset(_VIT_TYPES.split()),
    ),
    Family(_QKV_DISK, _QKV_MEMORY, frozenset(("dinov2", "dinov2_with_registers"))),
    Family(
        ((r"\.mlp\.gate\.", ".block_sparse_moe.gate."), (r"\.mlp\.experts\b", ".block_sparse_moe.experts")),
        ((r"\.block_sparse_moe\.", ".mlp."),),
        frozenset(("mixtral", "minimax", "minimax_m2")),
    ),
    Family(((r"^lm_head\.", "embed_out."),), ((r"^embed_out\.", "lm_head."),), frozenset(("gpt_neox",))),
)


def model_types(config: dict[str, Any]) -> frozenset[str]:
    """config.json's model_type, and its text model's.

    >>> sorted(model_types({"model_type": "aria", "text_config": {"model_type": "aria_text"}}))
    ['aria', 'aria_text']
    """
    text = config.get("text_config")
    found = (c.get("model_type") for c in (config, text if isinstance(text, dict) else {}))
    return frozenset(kind for kind in found if isinstance(kind, str))


def disk_names(name: str) -> Iterator[str]:
    """The names a tensor may have on disk, given its name in memory.

    >>> list(disk_names("model.language_model.layers.0.mlp.up_proj.weight"))[:2]
    ['language_model.model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.up_proj.weight']
    """
    seen = {name}
    for family in FAMILIES:
        found = _apply(family.to_disk, name)
        if found not in seen:
            seen.add(found)
            yield found


def memory_name(name: str, model_types: Collection[str]) -> str:
    """A tensor's name in memory, for models whose files are named differently; others keep their name.

    >>> memory_name("vit.encoder.layer.0.output.dense.weight", ["vit"])
    'vit.layers.0.mlp.fc2.weight'
    >>> memory_name("model.layers.0.block_sparse_moe.gate.weight", ["phimoe"])
    'model.layers.0.mlp.router.weight'
    >>> memory_name("h.0.mlp.c_fc.weight", ["gpt2"])
    'h.0.mlp.c_fc.weight'

    Args:
        model_types: What config.json says of the whole and of its text model.
    """
    for family in FAMILIES:
        if not family.model_types.isdisjoint(model_types):
            name = _apply(family.to_memory, name)
    for kind in sorted(model_types):
        name = _apply(TO_MEMORY.get(kind, ()), name)
    return _apply(_LEGACY, name)


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
