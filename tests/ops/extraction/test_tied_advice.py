"""The way out that extract prints for layers that share a tensor, taken: PEFT then merges the tuned model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import architectures
import pytest
import torch
from peft import PeftModel

from lorasurgery import ExtractOptions, RankChoice, extract
from lorasurgery.ops.extraction.options import Selection


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ProphetNetForCausalLM", "T5Gemma2ForConditionalGeneration"])
def test_the_printed_full_is_taken_and_merges_rightly(name: str, tmp_path: Path) -> None:
    """Also where the file calls the module otherwise than the model in memory does, and where three layers share it."""
    model = architectures.model_of(architectures.Architecture(name))
    model.save_pretrained(tmp_path / "base")
    architectures.tune(model, linear_only=False)
    model.save_pretrained(tmp_path / "tuned")
    choice = RankChoice(rank=16)
    first = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", ExtractOptions(choice), device="cpu")
    told = re.findall(r"full=\['auto', '([^']+)'\] stores", "\n".join(first.warnings))
    assert told
    options = ExtractOptions(choice, Selection(full=("auto", *told)))
    second = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", options, device="cpu")
    assert not [w for w in second.warnings if "one tensor" in w]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "b")
        merged = found.merge_and_unload().state_dict()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-4)
