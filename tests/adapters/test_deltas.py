"""Each kind of update that a file can hold: its class is found, and it is the matrix that its definition says."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.deltas import AttentionOutput, Delta, Embedding, Experts, Lora
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.magnitude import LycorisMagnitude, Magnitude, PeftMagnitude
from lorasurgery.adapters.single_file.products import Difference, Hadamard, Kronecker, Tucker
from lorasurgery.lowrank import LowRank

Matrix = Callable[[dict[str, Tensor]], Tensor]
ONE_FILE = "lora_unet_mid_block_attentions_0_proj_in"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"],
          "target_parameters": ["mlp.experts.down_proj"]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file with one module.

    Args:
        tensors: Shapes by the ending of the key. matrix: ΔW of them, without the scale.
        stem: What stands before the endings; a PEFT folder's where it begins with `base_model.`.
        scale: alpha/r, of alpha 1 and rank 2 where the kind has any.
    """

    cls: type[Delta]
    tensors: dict[str, tuple[int, ...]]
    matrix: Matrix
    stem: str = ONE_FILE
    kind: str = "linear"
    scale: float = 0.5


def factors(down: str, up: str) -> Matrix:
    return lambda t: t[up].flatten(1) @ t[down].flatten(1)


def tucker(t: dict[str, Tensor]) -> Tensor:
    return torch.einsum("om,mnkl,ni->oikl", t["lora_up.weight"], t["lora_mid.weight"], t["lora_down.weight"]).flatten(1)


def hadamard(t: dict[str, Tensor]) -> Tensor:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def kronecker(t: dict[str, Tensor]) -> Tensor:
    return torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])


LORA = {"lora_A.weight": (2, 9), "lora_B.weight": (6, 2)}
PRODUCT = factors("lora_A.weight", "lora_B.weight")
CASES = [
    Case(Lora, LORA, PRODUCT, "base_model.model.model.layers.0.self_attn.q_proj"),
    Case(Lora, {"lora_A.weight": (2, 4, 3, 3), "lora_B.weight": (6, 2, 1, 1)}, PRODUCT, "base_model.model.conv", "conv"),
    Case(AttentionOutput, LORA, PRODUCT, "base_model.model.attn.base_layer.out_proj", scale=1.0),
    Case(Embedding, {"lora_embedding_A": (2, 9), "lora_embedding_B": (6, 2)},
         factors("lora_embedding_A", "lora_embedding_B"), "base_model.model.model.embed_tokens", "embedding"),
    Case(Experts, {"lora_A.weight": (6, 9), "lora_B.weight": (6, 6)}, PRODUCT, "base_model.model.mlp.experts", "experts"),
    Case(Lora, {"lora_down.weight": (2, 9), "lora_up.weight": (6, 2), "alpha": ()},
         factors("lora_down.weight", "lora_up.weight")),
    Case(Tucker, {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "lora_mid.weight": (2, 2, 3, 3), "alpha": ()},
         tucker, kind="conv"),
    Case(Hadamard, {"hada_w1_a": (6, 2), "hada_w1_b": (2, 9), "hada_w2_a": (6, 2), "hada_w2_b": (2, 9), "alpha": ()},
         hadamard),
    Case(Kronecker, {"lokr_w1": (2, 3), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3), "alpha": ()}, kronecker),
    Case(Difference, {"diff": (6, 4, 3, 3)}, lambda t: t["diff"].flatten(1), kind="conv", scale=1.0),
    Case(Difference, {"diff": (9, 6)}, lambda t: t["diff"], scale=1.0),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.cls.__name__}, {c.kind}")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(case: Case, path: Path) -> tuple[Adapter, Delta, dict[str, Tensor]]:
    """The case's file, opened; its only update; the tensors by ending."""
    made = {e: noise(*s, seed=i) if s else torch.tensor(1.0) for i, (e, s) in enumerate(case.tensors.items())}
    peft = case.stem.startswith("base_model.")
    file = path / ("adapter_model.safetensors" if peft else "lora.safetensors")
    save_file({f"{case.stem}.{ending}": t for ending, t in made.items()}, file)
    if peft:
        (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    adapter = open_adapter(path)
    (delta,) = adapter.deltas.values()
    return adapter, delta, made


def kinds(cls: type[Delta] = Delta) -> Iterator[type[Delta]]:
    if not inspect.isabstract(cls):
        yield cls
    for inner in cls.__subclasses__():
        if getattr(sys.modules[inner.__module__], inner.__name__) is inner:  # not one that slots made a second time
            yield from kinds(inner)


def test_every_kind_is_tried() -> None:
    """A class that a file can hold has a case here; one form has one title."""
    assert set(kinds()) == {case.cls for case in CASES}
    assert len({(cls.form, cls.title) for cls in kinds()}) == len({cls.form for cls in kinds()})


@each_case
def test_what_the_product_is(case: Case, tmp_path: Path) -> None:
    """The exact factors and the cheapest form are both ΔW as its definition has it in float64, of the shape it states."""
    adapter, delta, made = write(case, tmp_path)
    expected = case.scale * case.matrix({ending: t.double() for ending, t in made.items()})
    assert (type(delta), delta.kind, delta.scale) == (case.cls, case.kind, case.scale)
    assert delta.shape == expected.shape
    for found in (adapter.load(delta), adapter.load_update(delta)):
        assert (found.dense() - expected).norm() <= 1e-6 * expected.norm()
        assert found.shape == expected.shape
    assert adapter.load(delta).rank == (delta.rows if delta.stores_factors else delta.directions)
    assert isinstance(adapter.load_update(delta), LowRank) or not delta.is_thin


@each_case
def test_which_tensors_it_is(case: Case, tmp_path: Path) -> None:
    """All of the file but alpha; under a prefix, each name and the path have it, and nothing else changes."""
    adapter, delta, _ = write(case, tmp_path)
    assert {*delta.names, f"{case.stem}.alpha"} >= set(adapter.weights.tensors) >= set(delta.names)
    inner = delta.prefixed("unet.")
    assert inner.names == tuple(f"unet.{name}" for name in delta.names)
    assert inner.path == f"unet.{delta.path}"
    assert inner.parameter == (f"unet.{delta.parameter}" if delta.parameter else "")
    assert (type(inner), inner.shape, inner.scale) == (type(delta), delta.shape, delta.scale)


@each_case
def test_where_it_fits(case: Case, tmp_path: Path) -> None:
    """A convolution's weight has its kernel, an embedding's is the transpose, a linear layer's may be either."""
    _, delta, _ = write(case, tmp_path)
    flipped = delta.shape[::-1]
    expected = {"conv": ((6, 4, 3, 3),), "embedding": (flipped,)}
    assert delta.stored_shapes == expected.get(case.kind, (delta.shape, flipped))
    assert delta.is_across == (case.kind == "embedding")
    assert math.prod(delta.weight_shape) == math.prod(delta.shape)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """lora_A holds one expert after the other, lora_B one rank after the other; what has no experts says so."""
    case = next(c for c in CASES if c.cls is Experts)
    adapter, delta, made = write(case, tmp_path)
    assert (delta.experts, delta.rank, delta.rows, delta.parameter) == (3, 2, 6, "mlp.experts.down_proj")
    down, up = made["lora_A.weight"].reshape(3, 2, 9), made["lora_B.weight"].reshape(6, 2, 3)
    for e in range(3):
        torch.testing.assert_close(adapter.load_expert(delta, e).dense(), 0.5 * up[:, :, e] @ down[e])
    (tmp_path / "plain").mkdir()
    adapter, delta, _ = write(CASES[0], tmp_path / "plain")
    with pytest.raises(IndexError, match="has no expert 0"):
        adapter.load_expert(delta, 0)


# DoRA

NORMS: list[tuple[str, tuple[int, ...], type[Magnitude], bool]] = [
    ("lora_magnitude_vector", (6,), PeftMagnitude, False),
    ("dora_scale", (6, 1), LycorisMagnitude, False),
    ("dora_scale", (1, 6), LycorisMagnitude, True),
]


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
@pytest.mark.parametrize(("ending", "shape", "cls", "by_input"), NORMS)
def test_dora(ending: str, shape: tuple[int, ...], cls: type, by_input: bool, strength: float, tmp_path: Path) -> None:
    """Of a square layer, whose norms could run along either axis: their shape says which, their family what strength is."""
    lora = {"lora_down.weight": (2, 6), "lora_up.weight": (6, 2), ending: shape}
    adapter, delta, made = write(Case(Lora, lora, PRODUCT), tmp_path)
    magnitude = delta.magnitude
    assert magnitude is not None
    assert (type(magnitude), magnitude.shape, magnitude.by_input) == (cls, shape, by_input)
    assert magnitude.is_by_row(transposed=False) == (cls is PeftMagnitude)
    assert not magnitude.is_by_row(transposed=True)
    weight, update = noise(6, 6, seed=9), adapter.load(delta)
    norms = magnitude.load(adapter.weights)
    found = magnitude.decompose(weight, update, norms, strength, kernel=(6,), transposed=False)
    value = weight + update.dense()
    ratio = made[ending].reshape(1, 6) if by_input else made[ending].reshape(6, 1)
    ratio = ratio / value.norm(dim=0 if by_input else 1, keepdim=True)
    lycoris = value * (strength * (ratio - 1) + 1)
    expected = lycoris if cls is LycorisMagnitude else weight + strength * (value * ratio - weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ending", "shape", "cls", "by_input"), NORMS)
def test_norms_of_some_rows(ending: str, shape: tuple[int, ...], cls: type, by_input: bool, tmp_path: Path) -> None:
    """Rows of the update have their own norms; a norm for each input is for all of them."""
    lora = {"lora_down.weight": (2, 6), "lora_up.weight": (6, 2), ending: shape}
    adapter, delta, made = write(Case(Lora, lora, PRODUCT), tmp_path)
    assert delta.magnitude is not None
    for rows in (slice(1, 3), [4, 0]):
        found = delta.magnitude.load(adapter.weights, rows)
        assert torch.equal(found, made[ending] if by_input else made[ending][rows])
    assert delta.prefixed("unet.").magnitude == cls(f"unet.{ONE_FILE}.{ending}", shape, by_input)
