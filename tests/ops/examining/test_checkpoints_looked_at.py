"""inspect and diff on checkpoints, against torch in float64 and against what was put into the files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.diff import diff
from lorasurgery.ops.inspect import inspect
from lorasurgery.report import Change, Stored

Tensors = dict[str, torch.Tensor]


def write(path: Path, tensors: Tensors) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def changes(a: Path, b: Path) -> dict[str, Change]:
    return {m.name: m for m in diff(a, b).modules if isinstance(m, Change)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in shards and a tuned model in one file."""
    root = tmp_path_factory.mktemp("pair")
    models.make("llama").save_pretrained(root / "base", max_shard_size="20KB")
    models.save(models.perturb(models.make("llama")), root / "tuned")
    return root / "base", root / "tuned"


def test_norms_are_those_of_float64(pair: tuple[Path, Path]) -> None:
    """‖ΔW‖, ‖W‖, the largest change and the share of elements, tensor by tensor and in sum, over shards and files."""
    base: Tensors = {}
    for file in pair[0].glob("*.safetensors"):
        base |= load_file(file)
    tuned, found = load_file(pair[1] / "model.safetensors"), changes(*pair)
    assert found.keys() == {n.removesuffix(".weight") for n in base}
    square = 0.0
    for name, weight in base.items():
        delta, m = tuned[name].double() - weight.double(), found[name.removesuffix(".weight")]
        assert m.state == ("changed" if delta.any() else "equal")
        if m.state == "changed":
            assert m.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
            assert m.norm == pytest.approx(float(weight.double().norm()), rel=1e-6)
            assert m.relative == pytest.approx(float(delta.norm() / weight.double().norm()), rel=1e-6)
            assert m.largest == pytest.approx(float(delta.abs().max()), rel=1e-6)
            assert m.share == pytest.approx(float((delta != 0).double().mean()))
        square += float(delta.norm()) ** 2
    t = diff(*pair).totals
    assert t["delta_norm"] == pytest.approx(math.sqrt(square), rel=1e-6)
    by_layer = {row["layer"]: row["delta_norm"] ** 2 for row in t["by_layer"]}
    assert by_layer.keys() == {"model.layers.0", "model.layers.1"}
    assert sum(row["delta_norm"] ** 2 for row in t["by_kind"]) == pytest.approx(square, rel=1e-6)


def test_a_checkpoint_equals_itself(pair: tuple[Path, Path]) -> None:
    """Nothing differs, no norm is computed, and the summary says so in a word."""
    report = diff(pair[0], pair[0])
    assert report.summary == f"all {report.totals['tensors']} tensors are equal"
    assert report.totals["delta_norm"] == 0


@given(st.integers(1, 3_000_000), st.integers(0, 2**32 - 1))
def test_one_changed_element_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int
) -> None:
    """Blocks leave no gap and count nothing twice: one element of any vector is told with its exact change."""
    root = tmp_path_factory.mktemp("one")
    place = seed % size
    old = torch.zeros(size)
    new = old.clone()
    new[place] = 0.5
    m = changes(write(root / "a", {"w.weight": old}), write(root / "b", {"w.weight": new}))["w"]
    assert (m.delta_norm, m.largest, m.share, m.norm, m.relative) == (0.5, 0.5, 1 / size, 0.0, None)
    shutil.rmtree(root)


def test_names_shapes_and_dtypes_that_differ(tmp_path: Path) -> None:
    """Only here, only there, reshaped, cast without a change, cast with one, integers, and a prefix on all names."""
    w = torch.randn(4, 4).bfloat16().float()
    a: Tensors = {"model.a.weight": w, "model.b.weight": w.clone(), "model.c.weight": w.clone(),
                  "model.d.weight": w + 1e-3, "model.i": torch.arange(4), "model.j": torch.arange(4),
                  "model.gone.weight": w.clone()}  # fmt: skip
    b: Tensors = {"a.weight": w.bfloat16(), "b.weight": w.clone(), "c.weight": torch.randn(5, 4), "d.weight": w.half(),
                  "i": torch.arange(4), "j": torch.tensor([0, 1, 2, 9]), "new.weight": w.clone()}  # fmt: skip
    found = changes(write(tmp_path / "a", a), write(tmp_path / "b", b))
    states = {name: m.state for name, m in found.items()}
    assert states == {
        "model.a": "equal", "model.b": "equal", "model.c": "reshaped", "model.d": "changed", "model.i": "equal",
        "model.j": "changed", "model.gone": "only_a", "new": "only_b",
    }  # fmt: skip
    assert found["model.a"].dtypes == ["F32", "BF16"]
    assert (found["model.j"].share, found["model.j"].delta_norm) == (0.25, None)
    totals = diff(tmp_path / "a", tmp_path / "b").totals
    assert [totals[k] for k in ("equal", "changed", "reshaped", "only_a", "only_b")] == [3, 2, 1, 1, 1]


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    """A not-a-number is a difference and a warning that names the tensor; the sums stay finite; so does the JSON."""
    good = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    bad = {"a.weight": torch.full((2, 2), float("nan")), "b.weight": torch.zeros(2, 2)}
    report = diff(write(tmp_path / "a", good), write(tmp_path / "b", bad))
    assert "not finite (a)" in report.warnings[0]
    assert (report.totals["delta_norm"], report.totals["norm"], report.totals["relative"]) == (2.0, 2.0, 1.0)
    assert "largest" not in report.modules[0].to_dict()
    json.dumps(report.to_dict(), allow_nan=False)


def test_two_of_a_kind_are_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter beside a checkpoint, and checkpoints that share no name, are errors with a next move."""
    models.peft_adapter("llama", tmp_path / "a", r=2, target_modules=["q_proj"])
    with pytest.raises(UsageError, match="merge the adapter first"):
        diff(pair[0], tmp_path / "a")
    with pytest.raises(MismatchError, match="no tensor of one has a name"):
        diff(pair[0], write(tmp_path / "b", {"other.weight": torch.ones(1)}))


def test_what_a_checkpoint_is(pair: tuple[Path, Path]) -> None:
    """Counts, bytes, dtypes, layers and files are those of the model; every tensor is listed with its shard."""
    model = models.make("llama")
    report = inspect(pair[0])
    t = report.totals
    assert t["what"] == "checkpoint"
    assert t["parameters"] == sum(p.numel() for p in model.parameters())
    assert t["bytes"] == sum(p.numel() * 4 for p in model.parameters()) == sum(t["dtypes"].values())
    assert (t["layout"], t["files"]) == ("sharded folder", len(list(pair[0].glob("*.safetensors"))))
    assert t["layers"] == {"model.layers": 2}
    assert t["architecture"] == "LlamaForCausalLM"
    assert sum(row["bytes"] for row in t["by_kind"]) == t["bytes"]
    assert t["odd"] == []
    index = json.loads((pair[0] / "model.safetensors.index.json").read_text())["weight_map"]
    listed = {m.name: m.file for m in report.modules if isinstance(m, Stored)}
    assert listed == {name.removesuffix(".weight"): file for name, file in index.items()}


def test_a_tied_model_is_told(tmp_path: Path) -> None:
    """A head that is not on the disk counts once, and the summary says that it is tied."""
    model = models.make("gpt2")
    models.save(model, tmp_path / "m")
    report = inspect(tmp_path / "m")
    assert report.totals["tied"]
    assert report.totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert "tied" in report.summary


ODD = {
    "no elements": lambda t, c, f: t.update({"empty.weight": torch.zeros(0, 4)}),
    "are not F32": lambda t, c, f: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].half()}),
    "only with their scales": lambda t, c, f: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn), "lm_head.weight_scale": torch.ones(1)}),
    "stored as integers": lambda t, c, f: t.update({"x.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    "a vocabulary of 99": lambda t, c, f: c.update(vocab_size=99),
    "says 7 layers": lambda t, c, f: c.update(num_hidden_layers=7),
    "says bfloat16": lambda t, c, f: c.update(dtype="bfloat16"),
    "will not be used": lambda t, c, f: c.update(tie_word_embeddings=True),
    "pickle files": lambda t, c, f: (f / "pytorch_model.bin").write_bytes(b"x"),
    "interrupted run": lambda t, c, f: (f / ".model.safetensors.lorasurgery-partial").write_bytes(b"x"),
    "no config.json": lambda t, c, f: c.clear(),
}  # fmt: skip


@pytest.mark.parametrize("says", ODD)
def test_odd_checkpoints(says: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Each thing that is allowed but seldom meant is said, and only that."""
    tensors = load_file(pair[1] / "model.safetensors")
    config = json.loads((pair[1] / "config.json").read_text())
    tmp_path.joinpath("m").mkdir()
    ODD[says](tensors, config, tmp_path / "m")
    write(tmp_path / "m", tensors)
    if config:
        (tmp_path / "m/config.json").write_text(json.dumps(config))
    odd = inspect(tmp_path / "m").totals["odd"]
    assert len(odd) == 1, odd
    assert says in odd[0]


def test_odd_indexes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An index that leaves tensors out, or counts other bytes, is told."""
    folder = shutil.copytree(pair[0], tmp_path / "m")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["metadata"]["total_size"] = 5
    del index["weight_map"]["model.norm.weight"]
    file.write_text(json.dumps(index))
    odd = inspect(folder).totals["odd"]
    assert any("not in the index (model.norm.weight)" in s for s in odd)
    assert any("the index says 5 bytes" in s for s in odd)


def test_an_adapter_beside_its_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """--base gives the shares of parameters and bytes, and an adapter that does not fit is an error."""
    models.peft_adapter("llama", tmp_path / "a", r=2, target_modules=["q_proj"], lora_alpha=0)
    t = inspect(tmp_path / "a", base=pair[0]).totals
    assert t["parameter_share"] == t["parameters"] / inspect(pair[0]).totals["parameters"]
    assert t["matched"] == t["modules"]
    assert any("alpha is 0" in s for s in t["odd"])
    models.peft_adapter("gpt2", tmp_path / "g", r=2, target_modules=["c_attn"])
    with pytest.raises(MismatchError, match="2 of 2 modules match no tensor"):
        inspect(tmp_path / "g", base=pair[0])


def test_adapters_alone_have_spectra(pair: tuple[Path, Path]) -> None:
    """--spectrum and --base on a checkpoint are wrong usage."""
    with pytest.raises(UsageError, match="spectrum=True belongs to adapters"):
        inspect(pair[0], spectrum=True)
    with pytest.raises(UsageError, match="base belongs to adapters"):
        inspect(pair[0], base=pair[1])
