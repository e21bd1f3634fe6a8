"""Extraction over the classes of transformers: whatever it writes, PEFT has the tuned model, or the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import Architecture, every
from sweep import Row, Worker, row_of

# One class for each way in which architectures have differed from what names alone tell.
KINDS = {
    "plain": Architecture("llama", "LlamaForCausalLM"),
    "linear layers only": Architecture("llama", "LlamaForCausalLM", linear_only=True),
    "a container with a bias": Architecture("bert", "BertForMaskedLM"),
    "a head of several layers": Architecture("roberta", "RobertaForSequenceClassification"),
    "a layer before the head": Architecture("distilbert", "DistilBertForSequenceClassification"),
    "Conv1D, tied": Architecture("gpt2", "GPT2LMHeadModel"),
    "Conv1D, linear layers only": Architecture("gpt2", "GPT2LMHeadModel", linear_only=True),
    "layers that PEFT passes by": Architecture("mamba", "MambaForCausalLM"),
    "scalars": Architecture("apertus", "ApertusForCausalLM"),
    "statistics and counters": Architecture("mobilenet_v1", "MobileNetV1ForImageClassification"),
    "an embedding of three names": Architecture("t5", "T5ForConditionalGeneration"),
    "an embedding of four names": Architecture("bart", "BartForConditionalGeneration"),
    "a tied projection of its own name": Architecture("whisper", "WhisperForConditionalGeneration"),
    "an embedding for each layer": Architecture("gemma3n_text", "Gemma3nForCausalLM"),
    "experts": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "experts stored (in, out), with biases": Architecture("gpt_oss", "GptOssForCausalLM"),
    "shared experts": Architecture("deepseek_v2", "DeepseekV2ForCausalLM"),
    "a head called output": Architecture("git", "GitForCausalLM"),
    "a module at two paths": Architecture("prophetnet", "ProphetNetForConditionalGeneration"),
    "other names on disk": Architecture("llava", "LlavaForConditionalGeneration"),
    "other prefixes on disk": Architecture("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "keys that PEFT renames": Architecture("laguna", "LagunaForCausalLM"),
    "a new head": Architecture("llama", "LlamaForSequenceClassification", base="LlamaForCausalLM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """Our merge is the tuned model; PEFT's is too, merged and run, or the report and `check` both say it is not."""
    row = row_of(KINDS[kind], tmp_path)
    assert not row.unbuilt
    assert not row.breaches, row


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process beside this one, so that a class that hangs or eats memory stops nothing."""
    worker = Worker()
    yield worker
    worker.close()


def held(row: Row) -> None:
    """Assert the law of `test_every_kind`, for a class that can be tried at all."""
    if row.unbuilt:
        pytest.skip(row.unbuilt)
    assert not row.breaches, row


@pytest.mark.slow
@pytest.mark.parametrize("one", every(), ids=lambda one: f"{one.type}-{one}")
def test_every_class(one: Architecture, worker: Worker) -> None:
    """The same of each class, all of its weights moved."""
    held(worker.row(one))


@pytest.mark.slow
@pytest.mark.parametrize("one", every()[::4], ids=lambda one: f"{one.type}-{one}")
def test_every_fourth_class_with_linear_layers_moved(one: Architecture, worker: Worker) -> None:
    """The same where only linear layers moved, as after a LoRA that was merged."""
    held(worker.row(Architecture(one.type, one.name, one.task, linear_only=True)))


def test_what_hangs_is_bounded_and_what_dies_is_a_row() -> None:
    """A worker gives up at its limit, says so, and tries the next class in a new process."""
    worker = Worker(limit=0.05)
    one = KINDS["plain"]
    assert "not done after" in worker.row(one).breaches[0]
    worker.limit = 120
    assert not worker.row(one).breaches
    worker.close()
