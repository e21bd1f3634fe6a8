"""Extraction over the classes of transformers: whatever it writes, PEFT has the tuned model, or the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from architectures import Architecture, every
from sweep import Row, Worker, row_of

# One class for each way in which architectures have differed from what names alone tell.
KINDS = {
    "plain": Architecture("LlamaForCausalLM"),
    "linear layers only": Architecture("LlamaForCausalLM", linear_only=True),
    "a container with a bias": Architecture("BertForMaskedLM"),
    "a head of several layers": Architecture("RobertaForSequenceClassification"),
    "a layer before the head": Architecture("DistilBertForSequenceClassification"),
    "Conv1D, tied": Architecture("GPT2LMHeadModel"),
    "Conv1D, linear layers only": Architecture("GPT2LMHeadModel", linear_only=True),
    "layers that PEFT passes by": Architecture("MambaForCausalLM"),
    "scalars": Architecture("ApertusForCausalLM"),
    "statistics and counters": Architecture("MobileNetV1ForImageClassification"),
    "an embedding of three names": Architecture("T5ForConditionalGeneration"),
    "an embedding of four names": Architecture("BartForConditionalGeneration"),
    "a tied projection of its own name": Architecture("WhisperForConditionalGeneration"),
    "an embedding for each layer": Architecture("Gemma3nForCausalLM"),
    "experts": Architecture("Qwen3MoeForCausalLM"),
    "experts stored (in, out), with biases": Architecture("GptOssForCausalLM"),
    "shared experts": Architecture("DeepseekV2ForCausalLM"),
    "a head called output": Architecture("GitForCausalLM"),
    "a module at two paths": Architecture("ProphetNetForConditionalGeneration"),
    "other names on disk": Architecture("LlavaForConditionalGeneration"),
    "other prefixes on disk": Architecture("Qwen2VLForConditionalGeneration"),
    "keys that PEFT renames": Architecture("LagunaForCausalLM"),
    "a new head": Architecture("LlamaForSequenceClassification", base="LlamaForCausalLM"),
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
@pytest.mark.parametrize("one", every(), ids=str)
def test_every_class(one: Architecture, worker: Worker) -> None:
    """The same of each class, all of its weights moved."""
    held(worker.row(one))


@pytest.mark.slow
@pytest.mark.parametrize("one", every()[::4], ids=str)
def test_every_fourth_class_with_linear_layers_moved(one: Architecture, worker: Worker) -> None:
    """The same where only linear layers moved, as after a LoRA that was merged."""
    held(worker.row(replace(one, linear_only=True)))


def test_silence_is_a_breach() -> None:
    """A row where PEFT merges another model breaks the law until both extract and `check` have said so."""
    silent = Row(KINDS["plain"], extracted=True, merged=True, loads=True, runs=True, merges=False)
    assert len(silent.breaches) == 2
    assert len(replace(silent, named=True).breaches) == 1
    assert not replace(silent, named=True, findings=["tied"]).breaches
    assert replace(silent, merges=True, runs=False).breaches
    assert not replace(silent, merges=True, runs=None).breaches


def test_what_hangs_is_bounded() -> None:
    """A worker gives up at its limit, says so, and tries the next class in a new process."""
    worker = Worker(limit=0.05)
    one = KINDS["plain"]
    assert "not done after" in worker.row(one).breaches[0]
    worker.limit = 1200
    assert not worker.row(one).breaches
    worker.close()


def test_the_page_lists_every_class() -> None:
    """docs/architectures.md has each class that transformers has now; its results are `make architectures`'s."""
    page = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text()
    assert not [str(one) for one in every() if f"`{one}`" not in page]
