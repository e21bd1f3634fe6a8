"""Which families' experts are one parameter in memory: transformers' and PEFT's own tables, asked live."""

from __future__ import annotations

import pytest
from peft.utils import transformers_weight_conversion as peft_tables
from transformers import conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lorasurgery.adapters.model_names.fused import expert_place, wants_parameter

# Named otherwise on disk (block_sparse_moe and w1, w2, w3; fc1, fc2, fc3): what PEFT can't be told is said in a warning.
OTHER_NAMES = {"minimax_m3_vl", "dots3_note_vision_encoder"}


def merges_experts(kind: str) -> bool:
    found = conversion_mapping.get_checkpoint_conversion_mapping(kind) or []
    return any(type(op).__name__ == "MergeModulelist" for c in found for op in getattr(c, "operations", None) or [])


@pytest.mark.parametrize("kind", sorted(k for k in CONFIG_MAPPING_NAMES if merges_experts(k) and k not in OTHER_NAMES))
def test_a_matrix_for_each_expert_is_a_slice_of_a_parameter(kind: str) -> None:
    """Every model type whose experts transformers stacks when it loads them is known to be one of these."""
    assert any(
        expert_place(f"model.layers.0.mlp.experts.3.{leaf}.weight", (8, 4), {"model_type": kind})
        for leaf in ("up_proj", "w1")
    )


def test_names_that_peft_takes_for_experts() -> None:
    """wants_parameter knows the model types whose gate, up and down projections PEFT takes for its experts'."""
    mapping, bases = peft_tables._MODEL_TO_CONVERSION_PATTERN, peft_tables._MOE_TARGET_MODULE_MAPPING
    types = {kind for kind, base in mapping.items() if "up_proj" in bases.get(base, {})} & set(CONFIG_MAPPING_NAMES)
    path = "model.layers.0.mlp.shared_experts.up_proj"
    assert types == {kind for kind in CONFIG_MAPPING_NAMES if wants_parameter(path, {"model_type": kind})}
