"""Run inside an environment that has vLLM: its own reading of adapter folders, one JSON line for each.

    python serve_vllm.py MAX_LORA_RANK FOLDER...

A line is {"error": …} when vLLM raises, else {"updates": {module: file}}, the update vLLM would add, beside the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}


def read(folder: Path, max_lora_rank: int) -> dict[str, str]:
    """vLLM's worker_manager._load_adapter, without the model: the helper, its validation, the tensors."""
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=max_lora_rank))  # type: ignore[arg-type]
    # `cpu:0`, for memory on `cpu` is pinned, which needs an accelerator
    model = LoRAModel.from_local_checkpoint(str(folder), EXPECTED, helper, device="cpu:0", dtype=torch.float32)
    updates = {}
    for name, lora in model.loras.items():
        scaling = getattr(lora, "scaling", 1.0)
        updates[name] = (lora.lora_b @ lora.lora_a * scaling).contiguous()
    file = folder.parent / f"{folder.name}-vllm.safetensors"
    save_file(updates, file)
    return {"updates": str(file)}


for argument in sys.argv[2:]:
    try:
        found = read(Path(argument), int(sys.argv[1]))
    except Exception as problem:  # whatever vLLM raises is its verdict
        found = {"error": f"{type(problem).__name__}: {problem}"[:300]}
    print(json.dumps(found))
