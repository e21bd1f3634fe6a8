"""Shared fixtures, and what makes every test offline, quiet and repeatable."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import HealthCheck, settings

collect_ignore = ["serve_vllm.py"]  # a script for another environment, which has vLLM

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # two workers on two cores; and the bits don't depend on the machine's cores


@pytest.fixture(autouse=True)
def _libraries_may_warn() -> None:
    """Warnings of our own are errors; those of the oracles (PEFT, transformers) are their own affair."""
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|huggingface_hub)(\..*)?")
    warnings.filterwarnings("ignore", message=r".*(is_gradient_checkpointing|fan_in_fan_out|tie_word_embeddings).*")
