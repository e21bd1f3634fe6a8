"""What is asked of a model's class: kinds of layers as PEFT sees them, and nothing for configs that no model has."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
from torch import nn

from lorasurgery.adapters.model_names.library import Installed, installed_model
from lorasurgery.adapters.model_names.skeleton import skeleton_from
from lorasurgery.clients.host import Host
from lorasurgery.clients.layer_kinds import told_by_name

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 10**13}, {"architectures": ["os"]}, {"architectures": ["nothing"]},
     {"architectures": [7]}, {"architectures": []}, {"hidden_size": "wide"}, {"_class_name": "os"},
     {"text_config": {"num_layers": 10**8}}, {"hidden_size": -4}, {"num_labels": 20_000_000}, {"depths": [2000] * 4},
     {"num_hidden_layers": 1000, "num_experts": 1000}, {"rope_theta": {"__float__": "x"}},
     {"rope_theta": {"__float__": [1]}}],
    ids=str,
)  # fmt: skip
def test_a_config_that_no_model_has_is_not_built(change: dict[str, Any]) -> None:
    """Somebody else's config can neither name other code nor take the machine's memory: nothing is known."""
    assert installed_model(LLAMA | change) is None


@pytest.mark.parametrize(
    ("taken", "refused"),
    [({"depths": [500] * 4}, {"depths": [500] * 3 + [501]}), ({"max_window_layers": 2000}, {"max_window_layers": 2001}),
     ({"max_window_layers": 50, "num_experts": 2000}, {"max_window_layers": 51, "num_experts": 2000}),
     ({"num_labels": 100_000}, {"num_labels": 100_001})],
    ids=str,
)  # fmt: skip
def test_the_largest_numbers_that_are_built(taken: dict[str, Any], refused: dict[str, Any]) -> None:
    """2,000 layers, 100,000 experts in all layers together, 100,000 labels: a model that has just these is known."""
    assert installed_model(LLAMA | taken) is not None
    assert installed_model(LLAMA | refused) is None


def test_no_weights_are_made() -> None:
    """A model of 70 billion parameters is known by names alone."""
    model = installed_model(LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                     "num_attention_heads": 64, "vocab_size": 128256})  # fmt: skip
    assert model is not None
    assert len(model.skeleton.names) == 3 + 80 * 9


class Odd(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something that no B·A beside the weight would follow."""
        return super().forward(x) ** 2


def test_kinds_are_those_that_peft_has_layers_for() -> None:
    """Subclasses of a forward of their own, grouped convolutions and modules at two paths are none of them."""
    twice = nn.Linear(2, 2)
    model = nn.ModuleDict({
        "linear": nn.Linear(2, 2), "odd": Odd(2, 2), "table": nn.Embedding(2, 2), "conv": nn.Conv2d(2, 2, 1),
        "grouped": nn.Conv1d(4, 4, 1, groups=4), "turned": nn.ConvTranspose1d(2, 2, 1), "here": twice, "there": twice,
    })  # fmt: skip
    kinds = {path: module.kind for path, module in skeleton_from(model, "test").modules.items() if path}
    assert kinds == {"linear": "linear", "odd": "other", "table": "embedding", "conv": "conv", "grouped": "other",
                     "turned": "other", "here": "other", "there": "other"}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "MambaForCausalLM", "CLIPForImageClassification", "Gemma4ForCausalLM", "GPT2LMHeadModel",
             "CTRLLMHeadModel", "CanineForSequenceClassification", "ViTForImageClassification"],
)  # fmt: skip
def test_our_own_table_tells_the_kinds_that_the_class_tells(name: str) -> None:
    """Without the library, names and the table of exceptions say of every matrix what the class says."""
    model = architectures.model_of(architectures.Architecture(name))
    config = {"model_type": model.config.model_type}
    asked = Host(config, frozenset(), Installed(skeleton_from(model, "test"), lambda n: n))
    alone = Host(config, frozenset())
    matrices = [
        n.removesuffix(".weight") for n, t in model.state_dict().items() if n.endswith(".weight") and t.ndim == 2
    ]
    assert matrices
    for path in matrices:
        assert (alone.kind(path) or told_by_name(path, config["model_type"])) == asked.kind(path), path
