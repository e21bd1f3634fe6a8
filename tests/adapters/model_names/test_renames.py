"""Names in memory come out of names on disk, for tiny models of families that no other test merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo

from lorasurgery.adapters.model_names.fused import expert_place
from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.adapters.model_names.renames import memory_name, model_types
from lorasurgery.checkpoint.reader import Checkpoint

CAUSAL = (
    "afmoe axk1 cohere2_moe deepseek_v32 exaone_moe flex_olmo flint glm4_moe_lite glm_moe_dsa granitemoeshared hy_v4 "
    "kimi_linear kolibri1 longcat_flash mellum mimo_v2_flash olmo_hybrid qwen3_5_moe_text qwen4_exp_text solar_open"
).split()
BODIES = ["lfm3_vl_vision", "timesfm2_5", "dinov3_vit"]
# One convolution in memory, three on disk: nothing that a LoRA is made for.
PACKED = ("conv1d.weight",)


@pytest.mark.parametrize(
    ("kind", "maker"), [*((k, zoo.causal) for k in CAUSAL), *((k, zoo.body) for k in BODIES)], ids=[*CAUSAL, *BODIES]
)
def test_every_parameter_is_told(
    kind: str, maker: Callable[..., Callable[[], torch.nn.Module]], tmp_path: Path
) -> None:
    """Each parameter is one tensor on disk or the experts' matrices; and each matrix is found by its name in memory."""
    model = maker(kind)()
    model.save_pretrained(tmp_path)
    base = Checkpoint.open(tmp_path)
    types = model_types(base.config)
    told = set()
    for name, info in base.tensors.items():
        memory = memory_name(name, types)
        place = expert_place(memory, info.shape, base.config)
        told.add(place.parameter if place else memory)
    parameters = {k: tuple(p.shape) for k, p in model.named_parameters() if not k.endswith(PACKED)}
    assert parameters.keys() <= told
    names = BaseNames(base.tensors, base.config, "base")
    for key, shape in parameters.items():
        if len(shape) == 2 and key.endswith(".weight"):
            assert names.find(key.removesuffix(".weight"), shapes=(shape,)), key
