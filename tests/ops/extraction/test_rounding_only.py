"""extract of checkpoints in different dtypes: what rounding alone explains is left out and counted, nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from long_runs import hashes
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.engine import runtime
from lorasurgery.errors import MismatchError, SurgeryError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction import decompose as extraction
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.report import Report

LAYERS = 3
TRAINED = "self_attn"
OPTIONS = ExtractOptions(RankChoice(rank=4))
KEEP = ExtractOptions(RankChoice(rank=4), keep_rounding=True)
F32, F16, BF16, F64, F8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn
DTYPES = [
    (F16, F32),
    (F32, F16),
    (BF16, F32),
    (F32, BF16),
    (F16, BF16),
    (BF16, F16),
    (F8, BF16),
    (F32, F64),
    (F64, F16),
]


def weights() -> dict[str, Tensor]:
    """Matrices, norms and biases of a small model, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj.weight": (32, 32), "self_attn.q_proj.bias": (32,), "mlp.up_proj.weight": (64, 32),
              "mlp.up_proj.bias": (64,), "input_layernorm.weight": (32,)}  # fmt: skip
    found = {"model.embed_tokens.weight": torch.randn(96, 32, generator=generator, dtype=F64)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            found[f"model.layers.{layer}.{name}"] = torch.randn(shape, generator=generator, dtype=F64)
    return found


def moved(tensors: dict[str, Tensor], only: str = TRAINED) -> dict[str, Tensor]:
    """The same after training of what has `only` in its name."""
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.5 * torch.randn(t.shape, generator=generator) if only in n else t for n, t in tensors.items()}


def saved(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype = F32) -> Path:
    """A checkpoint in a folder of its own."""
    folder.mkdir()
    save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def keys(adapter: Path) -> set[str]:
    return set(load_file(adapter / "adapter_model.safetensors"))


def check(report: Report, adapter: Path) -> None:
    """What was trained is in the adapter; all others are counted as rounding, named, and not in it."""
    untrained = 3 * LAYERS + 1
    assert report.totals["rounding"] == untrained
    assert report.totals["unchanged"] == 0
    assert {m.name for m in report.modules} == {f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)}
    assert {m.name for m in report.full} == {f"model.layers.{i}.self_attn.q_proj.bias" for i in range(LAYERS)}
    assert all(TRAINED in key for key in keys(adapter))
    (warning,) = (w for w in report.warnings if "rounding" in w)
    assert warning.startswith(f"{untrained} tensors differ by no more than rounding to ")
    assert "model.embed_tokens.weight" in warning
    assert "keep_rounding=True" in warning


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_what_was_not_trained_is_left_out(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    """Of any two dtypes, either way round: matrices, vectors and embeddings alike."""
    base, tuned = saved(tmp_path / "base", weights(), dtypes[0]), saved(tmp_path / "tuned", moved(weights()), dtypes[1])
    check(extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu"), tmp_path / "out")


def test_keep_rounding(tmp_path: Path) -> None:
    """--keep-rounding takes everything that differs, and counts nothing as rounding."""
    base, tuned = saved(tmp_path / "base", weights(), F16), saved(tmp_path / "tuned", moved(weights()))
    report = extract(base, tuned, tmp_path / "out", KEEP, device="cpu")
    assert report.totals["rounding"] == 0
    assert len(report.modules) == 2 * LAYERS + 1
    assert len(report.full) == 3 * LAYERS
    assert not report.warnings


def test_the_rest_is_as_without_rounding(tmp_path: Path) -> None:
    """What is an update is written to the same bytes, whether or not the other tensors' rounding is kept."""
    base, tuned = saved(tmp_path / "base", weights(), F16), saved(tmp_path / "tuned", moved(weights()))
    for name, options in (("out", OPTIONS), ("kept", KEEP)):
        extract(base, tuned, tmp_path / name, options, device="cpu")
    ours, all_of_it = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "kept"))
    assert all(torch.equal(all_of_it[key], value) for key, value in ours.items())


def test_one_value_beyond_rounding_is_an_update(tmp_path: Path) -> None:
    """A matrix and a vector with one value off by two steps are updates, the vector with its other values too."""
    tensors, names = weights(), ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias")
    changed = {n: t.half() for n, t in tensors.items()}
    for name in names:
        changed[name].view(torch.int16).view(-1)[-1] += 2
    base = saved(tmp_path / "base", tensors)
    report = extract(base, saved(tmp_path / "tuned", changed, F16), tmp_path / "out", OPTIONS, device="cpu")
    assert [m.name for m in report.modules] + [m.name for m in report.full] == ["model.layers.1.mlp.up_proj", names[1]]
    assert report.totals["rounding"] == len(tensors) - 2
    (stored,) = (t for n, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if n.endswith(".bias"))
    assert torch.equal(stored, changed[names[1]])


def test_equal_values_are_unchanged(tmp_path: Path) -> None:
    """float16 written out as float32 differs in nothing, not even in rounding."""
    tensors = {n: t.half() for n, t in weights().items()}
    base, tuned = saved(tmp_path / "base", tensors, F16), saved(tmp_path / "tuned", moved(tensors), F32)
    report = extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu")
    assert (report.totals["unchanged"], report.totals["rounding"]) == (3 * LAYERS + 1, 0)


def test_the_same_dtype_is_never_rounding(tmp_path: Path) -> None:
    """One step in float16 on both sides is an update: nobody rounded there."""
    tensors = {n: t.half() for n, t in weights().items()}
    after = {n: (t.view(torch.int16) + 1).view(F16) for n, t in tensors.items()}
    base, tuned = saved(tmp_path / "base", tensors, F16), saved(tmp_path / "tuned", after, F16)
    report = extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu")
    assert report.totals["rounding"] == report.totals["unchanged"] == 0


def test_nothing_but_rounding(tmp_path: Path) -> None:
    """One model in two dtypes: there is nothing to extract, and the error says why and what takes it all the same."""
    base, tuned = saved(tmp_path / "base", weights(), BF16), saved(tmp_path / "tuned", weights())
    with pytest.raises(
        MismatchError, match="no more than rounding to bfloat16; nothing to extract; keep_rounding=True"
    ):
        extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu")
    assert not (tmp_path / "out").exists()
    assert len(extract(base, tuned, tmp_path / "out", KEEP, device="cpu").modules) == 2 * LAYERS + 1


def test_full_none_counts_rounding_apart(tmp_path: Path) -> None:
    """What rounding explains is not among the changed tensors that --full none leaves out."""
    base, tuned = saved(tmp_path / "base", weights(), F16), saved(tmp_path / "tuned", moved(weights()))
    options = ExtractOptions(RankChoice(rank=4), Selection(full=("none",)))
    report = extract(base, tuned, tmp_path / "out", options, device="cpu")
    assert (report.totals["left_out"], report.totals["rounding"]) == (LAYERS, 3 * LAYERS + 1)


def test_what_is_not_finite_stops(tmp_path: Path) -> None:
    """A weight beyond float16's range is infinite there: that is said, not left out as rounding."""
    tensors = weights()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    base, tuned = saved(tmp_path / "base", tensors, F16), saved(tmp_path / "tuned", moved(tensors))
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp\.up_proj\.weight: .*not finite"):
        extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu")


@pytest.mark.parametrize("only", [TRAINED, "nothing", "layers.1"])
def test_small_pairs_together(only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes small pairs: of a group that changed in part, in whole or not at all, the same are left out."""
    base, tuned = saved(tmp_path / "base", weights(), F16), saved(tmp_path / "tuned", moved(weights(), only))
    alone = outcome(base, tuned, tmp_path / "alone")
    monkeypatch.setattr(extraction, "BATCHED_DEVICES", ("cpu",))
    assert outcome(base, tuned, tmp_path / "together") == alone


def outcome(base: Path, tuned: Path, out: Path, **more: Any) -> Any:
    """What extract says of each tensor, without the last digits; the message where there is nothing to extract."""
    try:
        report = extract(base, tuned, out, OPTIONS, device="cpu", **more)
    except MismatchError as problem:
        return str(problem)
    counts = {k: report.totals[k] for k in ("rounding", "unchanged", "full", "left_out")}
    return counts, [(m.name, m.rank) for m in report.modules], [m.name for m in report.full], report.warnings, keys(out)


def test_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks under --memory-limit, a change in the last row still counts, and the adapter has the same bytes."""
    monkeypatch.setattr(runtime, "LEAST_MEMORY", 1)
    generator = torch.Generator().manual_seed(2)
    large = ("lm_head.weight", "model.layers.0.mlp.down_proj.weight")
    tensors = weights() | {name: torch.randn(3000, 400, generator=generator) for name in large}
    after = moved(tensors)
    after["lm_head.weight"] = after["lm_head.weight"].clone()
    after["lm_head.weight"][-1, -1] += 1
    base, tuned = saved(tmp_path / "base", tensors, BF16), saved(tmp_path / "tuned", after)
    plain = outcome(base, tuned, tmp_path / "plain")
    assert outcome(base, tuned, tmp_path / "tight", memory_limit=500_000) == plain
    assert plain[0]["rounding"] == 3 * LAYERS + 2
    assert ("lm_head", 4) in plain[1]
    assert hashes(tmp_path / "tight") == hashes(tmp_path / "plain")


def test_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with the journal of one that broke off counts and writes what one without a break does."""
    base, tuned = saved(tmp_path / "base", weights(), F16), saved(tmp_path / "tuned", moved(weights()))
    whole = outcome(base, tuned, tmp_path / "whole")
    plain, calls = extraction.packed, []

    def packed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(extraction, "packed", packed)
    monkeypatch.setattr("lorasurgery.checkpoint.journal.KEPT", 0)
    with pytest.raises(KeyboardInterrupt):
        extract(base, tuned, tmp_path / "out", OPTIONS, device="cpu")
    monkeypatch.setattr(extraction, "packed", plain)
    assert outcome(base, tuned, tmp_path / "out", resume=True) == whole
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("name, stacked", [("gpt_oss", True), ("mixtral", False)])
def test_experts(name: str, stacked: bool, tmp_path: Path) -> None:
    """Of experts, the matrix that was trained is factored and the others' rounding is zero; no tensor is passed over."""
    model = zoo.make(name)
    model.half().save_pretrained(tmp_path / "base")
    model.float()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # as before rounding, by a tenth of a step
        parameter.data *= 1 + 1e-4 * torch.rand(parameter.shape, generator=generator)
    (trained,) = (p for n, p in model.named_parameters() if n.endswith("layers.0.mlp.experts.down_proj"))
    trained.data[1] += 0.1 * torch.randn(trained.shape[1:], generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    before, after = (tensors_of(tmp_path / side) for side in ("base", "tuned"))
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", OPTIONS, device="cpu")
    assert len(report.modules) == 1
    assert not report.full
    counted = report.totals["rounding"] + report.totals["unchanged"]
    assert counted == len(before) - (0 if stacked else 1)  # a stack of which one expert changed counts as well
    equal = sum(torch.equal(before[n].float(), after[n]) for n in before)
    assert report.totals["unchanged"] == equal
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    (up,) = (t for n, t in written.items() if "lora_B" in n)
    experts = trained.shape[0]
    by_expert = up.view(up.shape[0], -1, experts).abs().sum((0, 1))
    assert by_expert.nonzero().flatten().tolist() == [1]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
