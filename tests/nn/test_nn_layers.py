"""LoRALinear and its kin by themselves: the formula, what is frozen, what code around them still sees."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasurgery.errors import SurgeryError, UnsupportedError, UsageError
from lorasurgery.lowrank import LowRank
from lorasurgery.nn import AdaptedModule, LoRAEmbedding, LoRALinear

MAKERS = {
    "linear": lambda: nn.Linear(12, 7),
    "no-bias": lambda: nn.Linear(12, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 12),
}


def filled(original: nn.Module, r: int = 3, alpha: float = 5) -> LoRALinear:
    """A layer whose B is not zero."""
    layer = LoRALinear(original, r, alpha)
    nn.init.normal_(layer.lora_B["default"])
    return layer


@pytest.mark.parametrize("kind", MAKERS)
def test_it_starts_unchanged(kind: str) -> None:
    """A new layer's output is the original's, bit for bit."""
    original, x = MAKERS[kind](), torch.randn(2, 5, 12)
    assert torch.equal(LoRALinear(original, r=4, alpha=16)(x), original(x))


def test_a_is_gaussian_and_b_is_zero() -> None:
    """A has mean 0 and standard deviation 1/r, as PEFT's "gaussian"; B is zero; the scale is α/r."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(2000, 30), r=4, alpha=6)
    a = layer.lora_A["default"].detach()
    assert a.shape == (4, 2000)
    assert abs(float(a.std()) - 0.25) < 0.01
    assert abs(float(a.mean())) < 0.01
    assert layer.lora_B["default"].abs().sum() == 0
    assert layer.scaling == {"default": 1.5}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_formula(kind: str) -> None:
    """h = Wx + b + (α/r)·B(Ax), against numpy-like arithmetic in float64."""
    layer, x = filled(MAKERS[kind]().double()), torch.randn(5, 12, dtype=torch.float64)
    w, a, b = layer.weight, layer.lora_A["default"], layer.lora_B["default"]
    w = w if kind != "conv1d" else w.T
    expected = torch.einsum("oi,ni->no", w + 5 / 3 * torch.einsum("or,ri->oi", b, a), x)
    expected = expected + (0 if layer.bias is None else layer.bias)
    assert a.dtype == torch.float64
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_as_peft(dtype: torch.dtype) -> None:
    """Factors in float32 (float64 for float64), the result in the layer's dtype: PEFT's output to the bit."""
    torch.manual_seed(0)
    original, x = nn.Linear(12, 7).to(dtype), torch.randn(3, 12).to(dtype)
    layer = filled(original, r=3, alpha=5)
    reference = PeftLinear(original, "default", config=LoraConfig(), r=3, lora_alpha=5)
    held = layer.lora_A["default"].dtype
    assert held == (torch.float64 if dtype == torch.float64 else torch.float32)
    for side in ("lora_A", "lora_B"):
        theirs = getattr(reference, side)["default"].to(held)  # PeftModel casts so: autocast_adapter_dtype
        theirs.weight.data = getattr(layer, side)["default"].data
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, reference(x))


def test_embedding_formula() -> None:
    """An embedding's rows are W + (α/r)·(BA)ᵀ; scaled and shifted tables keep what their forward does."""

    class Scaled(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            """As Gemma's scaled table and OPT's shifted one, both at once."""
            return 3 * super().forward(tokens + 2)

    original, tokens = Scaled(10, 6).double(), torch.tensor([[0, 7, 7]])
    layer = LoRAEmbedding(original)
    a, b = torch.randn(2, 10, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    layer.add("default", LowRank(b, a, 0.7))
    assert torch.equal(layer(tokens), original(tokens)), "held, but not active"
    layer.active = {"default": 1.0}
    table = original.weight + 0.7 * (b @ a).T
    torch.testing.assert_close(layer(tokens), 3 * table[tokens + 2])


def test_only_factors_learn() -> None:
    """The original is frozen; a backward pass leaves gradients on A and B alone."""
    layer = filled(nn.Linear(12, 7))
    layer(torch.randn(3, 12)).square().sum().backward()
    learning = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert learning == {"lora_A.default", "lora_B.default"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == learning


def test_the_original_can_be_seen_through_it() -> None:
    """Code that asks a layer for weight, bias, sizes, or anything else of its own still finds it."""
    layer = LoRALinear(nn.Linear(12, 7))
    assert layer.weight is layer.original.weight
    assert layer.bias is layer.original.bias
    assert (layer.in_features, layer.out_features) == (12, 7)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.nonsense
    assert not hasattr(LoRALinear(nn.Linear(2, 2, bias=False)), "kernel_size")
    norm = AdaptedModule(nn.LayerNorm(3))
    norm.add_whole("a", "weight", torch.zeros(3))
    norm.active = {"a": 1.0}
    assert norm.weight.tolist() == [0, 0, 0], "a tensor stored whole is what stands in for it"
    assert norm.original.weight.tolist() == [1, 1, 1]


def test_copies_and_pickles() -> None:
    """deepcopy, pickle and torch.save of the state_dict give the same layer back, merged or not."""
    layer, x = filled(nn.Linear(12, 7)), torch.randn(3, 12)
    before = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = LoRALinear(nn.Linear(12, 7), r=3, alpha=5)
    fresh.load_state_dict(torch.load(file))
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.merged
        other.unmerge()
        assert torch.equal(other(x), before)
    assert torch.equal(fresh(x), before)
    nn.init.zeros_(copy.deepcopy(fresh).lora_B["default"])
    assert torch.equal(fresh(x), before), "a copy shares nothing"


def test_statistics_of_a_replaced_norm_are_kept_in_training() -> None:
    """BatchNorm's buffers can be replaced too; training moves the adapter's, and the original's not."""
    layer = AdaptedModule(nn.BatchNorm1d(3))
    for leaf in ("weight", "running_mean", "num_batches_tracked"):
        layer.add_whole("a", leaf, getattr(layer.original, leaf) + 1, trainable=True)
    layer.active = {"a": 1.0}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["whole.a.weight"]
    layer.train()(torch.randn(8, 3) + 5)
    assert layer.whole_of("a")["num_batches_tracked"] == 2
    assert layer.original.num_batches_tracked == 0
    assert layer.original.running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: LoRALinear(nn.Conv2d(3, 3, 1)), UnsupportedError, "Conv2d takes no factors"),
        (lambda: LoRALinear(nn.Embedding(3, 3)), UnsupportedError, "Embedding is not a linear layer"),
        (lambda: LoRAEmbedding(nn.Embedding(3, 3, max_norm=1.0)), UnsupportedError, "max_norm"),
        (lambda: LoRALinear(nn.Linear(3, 3), r=-1), UsageError, "r is -1"),
        (lambda: LoRALinear(nn.Linear(3, 3), r=2.5), UsageError, "r is 2.5"),
        (lambda: LoRALinear(nn.Linear(3, 3), alpha=float("nan")), UsageError, "alpha is nan"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make, kind: type[SurgeryError], words: str) -> None:
    """Layers of other kinds, and ranks and alphas without meaning, are refused in one line."""
    with pytest.raises(kind, match=words):
        make()
