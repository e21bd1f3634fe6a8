"""apply_lora and training: the same losses as PEFT from the same factors, and nothing but factors is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_nn_load import LINEAR
from torch import nn

from lorasurgery.errors import UnsupportedError, UsageError
from lorasurgery.nn import apply_lora, load_adapter, print_trainable_parameters, save_adapter, trainable_parameters
from lorasurgery.nn.modules import layers_of

Optimizer = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Optimizer, dict[str, float]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.03}),
    "sgd": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}),
}


def losses(model: nn.Module, optimizer: str, steps: int = 6) -> list[float]:
    """Steps towards a random target for one batch, dropout off; the loss before each."""
    make, options = OPTIMIZERS[optimizer]
    steering = make([p for p in model.parameters() if p.requires_grad], **options)
    tokens, found = torch.arange(4, 20).reshape(2, 8), []
    for _ in range(steps):
        out = model(input_ids=tokens)
        scores = out.logits if "logits" in out else out.last_hidden_state
        target = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7))
        loss = (scores.float() - target).square().mean()
        steering.zero_grad()
        loss.backward()
        steering.step()
        found.append(loss.item())
    return found


def twins(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PeftModel]:
    """The same model with a new LoRA here and in PEFT, from the same factors."""
    model = apply_lora(models.make(family, dtype), LINEAR[family], r=4, alpha=16)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR[family], init_lora_weights="gaussian")
    reference = get_peft_model(models.make(family, dtype), config).eval()
    for path, layer in layers_of(model).items():
        theirs = reference.base_model.model.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.lora_A["default"].detach().clone()
    return model, reference


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_the_same_losses_as_peft(family: str, optimizer: str) -> None:
    """Six steps from the same A and B = 0: every loss is PEFT's, and the factors at the end are."""
    model, reference = twins(family)
    ours, theirs = losses(model, optimizer), losses(reference, optimizer)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert min(ours) < 0.99 * ours[0], "something must have been learnt"
    for path, layer in layers_of(model).items():
        other = reference.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_B["default"], other.lora_B["default"].weight, rtol=1e-4, atol=1e-5)


def test_the_same_losses_in_bfloat16() -> None:
    """A bfloat16 model with factors in float32 trains as PEFT's does."""
    model, reference = twins("llama", torch.bfloat16)
    assert losses(model, "adamw") == pytest.approx(losses(reference, "adamw"), rel=1e-3)


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    """An adapter with modules stored whole, loaded to be trained: PEFT's losses with is_trainable, and it saves."""
    models.peft_adapter("bert", tmp_path / "one", r=4, target_modules=["query"], modules_to_save=["LayerNorm"])
    reference = PeftModel.from_pretrained(models.make("bert"), tmp_path / "one", is_trainable=True).eval()
    model = load_adapter(models.make("bert"), tmp_path / "one", trainable=True)
    assert losses(model, "sgd") == pytest.approx(losses(reference, "sgd"), rel=1e-5)
    save_adapter(model, tmp_path / "two")
    again = PeftModel.from_pretrained(models.make("bert"), tmp_path / "two").eval()
    torch.testing.assert_close(models.outputs(again), models.outputs(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_model_starts_unchanged(family: str) -> None:
    """apply_lora gives the model back, with the very outputs it had, in the mode it was in."""
    model = models.make(family)
    assert apply_lora(model, "all-linear", r=2) is model
    assert torch.equal(models.outputs(model), models.outputs(models.make(family)))
    assert not any(m.training for m in layers_of(model).values())


def test_only_factors_are_trained() -> None:
    """Everything of the model's own is frozen and gets no gradient."""
    model = apply_lora(models.make("llama"), "q_proj")
    losses(model, "sgd", steps=1)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (".lora_" in name), name


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "k_proj"], 4),
        (r"model\.layers\.0\..*", 7),
        ("attention", 8),
        ("mlp", 6),
        ("all-linear", 14),
    ],
)
def test_target_modules_are_what_target_takes(patterns: str | list[str], count: int) -> None:
    """A suffix, several, a regular expression on the whole path, or a preset; the head is not in all-linear."""
    assert len(layers_of(apply_lora(models.make("llama"), patterns))) == count


def test_what_apply_lora_refuses() -> None:
    """Patterns that mean nothing (with the nearest), none at all, and layers whose weights are read directly."""
    model = models.make("llama")
    with pytest.raises(UsageError, match="target_modules q_porj: matches no module; nearest: q_proj"):
        apply_lora(model, "q_porj")
    with pytest.raises(UsageError, match="embed_tokens: matches no module"):
        apply_lora(model, "embed_tokens")
    with pytest.raises(UsageError, match="empty"):
        apply_lora(model, [])
    with pytest.raises(UsageError, match="r is 0"):
        apply_lora(model, "q_proj", r=0)
    assert not layers_of(model)
    assert all(p.requires_grad for p in model.parameters())
    for path in ("self_attn.out_proj", "linear1"):
        with pytest.raises(UnsupportedError, match="without calling the layer"):
            apply_lora(nn.TransformerEncoderLayer(8, 2, 8), path)


def test_two_adapters_for_training(tmp_path: Path) -> None:
    """A second adapter has a name of its own, on the same layers or others, and waits for set_adapter."""
    model = apply_lora(models.make("llama"), "q_proj", r=2, name="one")
    apply_lora(model, ["q_proj", "v_proj"], r=3, name="two")
    layers = layers_of(model)
    assert len(layers) == 4
    assert all(layer.active == {"one": 1.0} for layer in layers.values())
    assert sorted(layers["model.layers.0.self_attn.q_proj"].adapters) == ["one", "two"]


def test_the_state_comes_back(tmp_path: Path) -> None:
    """The state_dict of a trained model loads into a fresh one with the same layers."""
    model = apply_lora(models.make("llama"), "q_proj", r=2)
    losses(model, "sgd", steps=2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = apply_lora(models.make("llama"), "q_proj", r=2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(models.outputs(fresh), models.outputs(model))


def test_it_counts_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    """print_trainable_parameters prints the line that PEFT prints."""
    model, reference = twins("qwen2-tied")
    print_trainable_parameters(model)
    reference.print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert trainable_parameters(model) == reference.get_nb_trainable_parameters()
    print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
