"""merge beyond parity: layout, bytes, dtypes, what is refused, and a kill in the middle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import undo_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.errors import FormatError, MismatchError, SurgeryError, UnsupportedError, UsageError
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging import in_place, stream
from lorasurgery.ops.merging import tensor_jobs as jobs
from lorasurgery.ops.merging.recipe import Recipe
from lorasurgery.ops.unmerge import unmerge


def llama(tmp: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Path]:
    """(base, adapter) of a tiny Llama."""
    base = models.save(models.make("llama", dtype), tmp / "base")
    models.peft_adapter("llama", tmp / "adapter", **({"r": 4, "target_modules": ["q_proj"]} | config))
    return base, tmp / "adapter"


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_weight_zero_changes_no_byte(tmp_path: Path) -> None:
    """An adapter at weight 0 gives the base's own file, byte for byte, header included."""
    base, adapter = llama(tmp_path)
    merge(base, [adapter], tmp_path / "merged", weights=[0.0])
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_bytes_read_are_those_of_base_and_adapter(tmp_path: Path) -> None:
    """The report counts the tensors of both, each once, and little beside them."""
    base, adapter = llama(tmp_path)
    report = merge(base, [adapter], tmp_path / "merged")
    files = [base / "model.safetensors", adapter / "adapter_model.safetensors"]
    tensors = sum(t.nbytes for file in files for t in load_file(file).values())
    assert tensors <= report.bytes_read <= sum(file.stat().st_size for file in files)


def test_layout_files_and_metadata_are_kept(tmp_path: Path) -> None:
    """Shards, index and all other files come along; untouched shards are the same bytes; no weights in disguise do."""
    base, adapter = llama(tmp_path)
    shards = tmp_path / "shards"
    models.load("llama", base).save_pretrained(shards, max_shard_size="10KB")
    (shards / "1_Pooling").mkdir()
    (shards / "1_Pooling/config.json").write_text("{}")
    (shards / "vocab.txt").write_text("a\nb\n")
    (shards / "pytorch_model.bin").write_bytes(b"old pickle")
    merge(shards, [adapter], tmp_path / "merged")
    ours = {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(shards)) for p in shards.rglob("*") if p.is_file()} - {"pytorch_model.bin"}
    assert ours == theirs | {"lorasurgery.json"}
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert (
        json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())["weight_map"] == index["weight_map"]
    )
    touched = {f for n, f in index["weight_map"].items() if "q_proj" in n}
    for file in set(index["weight_map"].values()) - touched:
        assert (tmp_path / "merged" / file).read_bytes() == (shards / file).read_bytes()


def test_max_shard_size_splits_anew(tmp_path: Path) -> None:
    """--max-shard-size deals the tensors into numbered shards that transformers loads to the same weights."""
    base, adapter = llama(tmp_path)
    merge(base, [adapter], tmp_path / "one")
    merge(base, [adapter], tmp_path / "many", max_shard_size=20_000)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    torch.testing.assert_close(
        models.outputs(models.load("llama", tmp_path / "many")), models.outputs(models.load("llama", tmp_path / "one")),
        rtol=0, atol=0,
    )  # fmt: skip


def test_a_single_file_in_and_out(tmp_path: Path) -> None:
    """A checkpoint that is one .safetensors file merges into one .safetensors file."""
    base, adapter = llama(tmp_path)
    merge(base, [adapter], tmp_path / "folder")
    merge(base / "model.safetensors", [adapter], tmp_path / "single.safetensors")
    one, two = load_file(tmp_path / "single.safetensors"), load_file(tmp_path / "folder/model.safetensors")
    assert all(torch.equal(one[n], t) for n, t in two.items())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_dtype_of_what_is_written(dtype: str, tmp_path: Path) -> None:
    """--dtype casts every floating tensor once from float32, and config.json says so."""
    base, adapter = llama(tmp_path, torch.bfloat16)
    merge(base, [adapter], tmp_path / "wide", dtype="F32")
    merge(base, [adapter], tmp_path / "merged", dtype=dtype)
    wide, found = (load_file(tmp_path / d / "model.safetensors") for d in ("wide", "merged"))
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), wide[name].to(tensor.dtype).float())
    assert len({t.dtype for t in found.values()}) == 1
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(tensor.dtype).removeprefix(
        "torch."
    )


def test_low_retention_warns_with_the_way_out(tmp_path: Path) -> None:
    """A tiny update in bfloat16 is lost to rounding: the report has the figures and the warning names --dtype."""
    base, _ = llama(tmp_path, torch.bfloat16)
    models.peft_adapter("llama", tmp_path / "tiny", std=0.002, r=4, target_modules=["q_proj"])
    with pytest.raises(SurgeryError, match=r"would keep 4\d\.\d% of the update.*dtype='float32'.*allow_loss=True"):
        merge(base, [tmp_path / "tiny"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    report = merge(base, [tmp_path / "tiny"], tmp_path / "merged", allow_loss=True)
    assert report.totals["retention"] < 0.5
    assert any("dtype='float32'" in w for w in report.warnings)
    assert all(m.retention is not None and m.noise is not None for m in report.modules)
    wide = merge(base, [tmp_path / "tiny"], tmp_path / "wide", dtype="F32")
    assert wide.totals["retention"] == pytest.approx(1, abs=1e-3)
    assert not wide.warnings


def test_eight_bit_weights(tmp_path: Path) -> None:
    """A cast to e4m3 keeps nothing of a 1% update: merge stops, and --dtype bfloat16 is the way out."""
    base, _ = llama(tmp_path)
    weights = load_file(base / "model.safetensors")
    narrow = {k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in weights.items()}
    save_file(narrow, base / "model.safetensors", {"format": "pt"})
    models.peft_adapter("llama", tmp_path / "tiny", std=0.001, r=4, target_modules=["q_proj"])
    with pytest.raises(SurgeryError, match="dtype='bfloat16'"):
        merge(base, [tmp_path / "tiny"], tmp_path / "merged")
    report = merge(base, [tmp_path / "tiny"], tmp_path / "wide", dtype="F32")
    assert report.totals["retention"] == pytest.approx(1, abs=1e-3)
    assert merge(base, [tmp_path / "tiny"], tmp_path / "loss", allow_loss=True).totals["retention"] < 0.5


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_names_never_pass_in_silence(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to a key's name: an error that names something, and no output; never a copy of the base."""
    root = tmp_path / "shared"
    if not root.exists():
        llama(root)
    weights = load_file(root / "adapter/adapter_model.safetensors")
    key = data.draw(st.sampled_from(sorted(weights)))
    place = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(["", "x", ".", "_", "0", "lora_A", key[place] * 2]))
    changed = key[:place] + letter + key[place + 1 :]
    if changed in weights:
        return
    bad = tmp_path / "bad"
    bad.mkdir(exist_ok=True)
    save_file({changed if k == key else k: v for k, v in weights.items()}, bad / "adapter_model.safetensors")
    (bad / "adapter_config.json").write_text((root / "adapter/adapter_config.json").read_text())
    if _stripped(changed) == _stripped(key):
        return  # the same module by a prefix that people do use, or another adapter's name in the key
    said = r"lora_[AB] is missing; the adapter is incomplete|is a kind of LoRA tensor that lorasurgery does not know"
    with pytest.raises(SurgeryError, match=said):
        merge(root / "base", [bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _stripped(key: str) -> str:
    """The module and side that a key means, whatever adapter name stands in it."""
    name = re.sub(r"\.(lora_[AB])\..*weight$", r".\1", key.removeprefix("base_model.model."))
    return name.removeprefix("model.")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_base_in_float64_is_merged_in_float64(rounding: str, tmp_path: Path) -> None:
    """W + Δ of float64 weights is that of numpy in float64, far nearer than float32 could be, and nothing is drawn."""
    base, adapter = llama(tmp_path, torch.float64, lora_alpha=8)
    report = merge(base, [adapter], tmp_path / "merged", rounding=rounding)
    old, new = (load_file(p / "model.safetensors") for p in (base, tmp_path / "merged"))
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in (n for n in old if "q_proj" in n):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = (factors[f"{key}{side}.weight"].double().numpy() for side in "AB")
        truth = old[name].numpy() + 8 / 4 * (b @ a)
        assert new[name].dtype == torch.float64
        assert abs(new[name].numpy() - truth).max() < 1e-15
    assert report.totals["retention"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merging_to_float64(dtype: torch.dtype, rounding: str, tmp_path: Path) -> None:
    """A narrower base written as float64 holds the sum in float32 as it is: a wider dtype has nothing to round."""
    base, adapter = llama(tmp_path, dtype)
    report = merge(base, [adapter], tmp_path / "wide", dtype="F64", rounding=rounding)
    merge(base, [adapter], tmp_path / "plain", dtype="F32")
    wide, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("wide", "plain"))
    assert all(wide[name].dtype == torch.float64 for name in plain)
    assert all(torch.equal(wide[name], plain[name].double()) for name in plain)
    assert report.totals["retention"] == pytest.approx(1, abs=1e-5)


def test_stochastic_rounding_is_seeded(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another seed others; the mean is nearer than rounding to nearest."""
    base, _ = llama(tmp_path, torch.bfloat16)
    models.peft_adapter("llama", tmp_path / "tiny", std=0.002, r=4, target_modules=["q_proj"])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge(base, [tmp_path / "tiny"], tmp_path / name, rounding="stochastic", seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_replaced_tensors_at_other_weights(tmp_path: Path) -> None:
    """A replaced tensor at weight w is W + w·(R − W): half way at 0.5, the base at 0."""
    base, adapter = llama(tmp_path, modules_to_save=["norm"])
    merge(base, [adapter], tmp_path / "half", weights=[0.5])
    before, half = (load_file(p / "model.safetensors") for p in (base, tmp_path / "half"))
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    torch.testing.assert_close(half["model.norm.weight"], (before["model.norm.weight"] + saved) / 2)


def test_two_adapters_that_replace_differently(tmp_path: Path) -> None:
    """Equal replacements pass; different ones are an error that names both adapters."""
    base, one = llama(tmp_path, modules_to_save=["norm"])
    merge(base, [one, one], tmp_path / "twice")
    weights = load_file(one / "adapter_model.safetensors")
    two = tmp_path / "two"
    two.mkdir()
    weights["base_model.model.model.norm.weight"] += 1
    save_file(weights, two / "adapter_model.safetensors")
    (two / "adapter_config.json").write_text((one / "adapter_config.json").read_text())
    with pytest.raises(MismatchError, match="both replace"):
        merge(base, [one, two], tmp_path / "merged")


def test_a_key_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    """The field's commonest bug: names that don't match must not be 'applied' in silence."""
    base, adapter = llama(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("q_proj", "q_porj"): v for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"modules match(es)? no tensor in .*q_porj.*nearest: .*q_proj"):
        merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"peft_type": "IA3"}, "IA3"), ({"peft_type": "PREFIX_TUNING"}, "no weight update"),
     ({"peft_type": "PROMPT_TUNING"}, "no weight update"),
     *(({"init_lora_weights": init}, init) for init in ("pissa", "olora", "corda", "loftq", "lora_ga")), ({"layer_replication": [[0, 2]]}, "layer_replication"),
     ({"use_qalora": True}, "QALoRA"), ({"alora_invocation_tokens": [1]}, "aLoRA"), ({"arrow_config": {"top_k": 1}}, "Arrow"),
     ({"kasa_config": {"a": 1}}, "KaSA")],
    ids=str,
)  # fmt: skip
def test_variants_are_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """What changes the meaning of the factors and isn't understood is refused by its name, never ignored."""
    base, adapter = llama(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedError, match=said):
        merge(base, [adapter], tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [("q_proj.lora_diag", (4,), "KaSA"), ("q_proj.lora_E", (4, 1), "AdaLoRA"), ("q_proj.lora_Z.weight", (4, 4), "does not know")],
)  # fmt: skip
def test_tensors_of_variants_are_refused_by_name(key: str, shape: tuple[int, ...], said: str, tmp_path: Path) -> None:
    """The tensors tell as well as the config: none is passed over."""
    base, adapter = llama(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{key}"
    weights[stem] = torch.zeros(shape)
    if "lora_A" in key:
        weights[stem.replace("lora_A", "lora_B")] = torch.zeros(8, 4)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=said):
        merge(base, [adapter], tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "name"),
    [("lora_unet_x.oft_blocks", "OFT"), ("lora_unet_x.on_input", "IA3"), ("lora_unet_x.a1.weight", "GLoRA")],
)
def test_what_is_no_sum_is_refused_by_name(key: str, name: str, tmp_path: Path) -> None:
    """OFT, IA3 and GLoRA files are named for what they are."""
    base, _ = llama(tmp_path)
    save_file({key: torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedError, match=name):
        merge(base, [tmp_path / "other.safetensors"], tmp_path / "merged")


def test_quantized_and_scaled_weights_are_refused(tmp_path: Path) -> None:
    """An int8 weight, or an fp8 weight with a scale beside it, can't take an update."""
    base, adapter = llama(tmp_path)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for change in ({f"{name}.weight": torch.zeros(32, 32, dtype=torch.int8)}, {f"{name}.weight_scale": torch.ones(1)}):
        save_file(weights | change, base / "model.safetensors")
        with pytest.raises(UnsupportedError, match="dequantize"):
            merge(base, [adapter], tmp_path / "merged")


def test_wrong_base_is_said_with_both_shapes(tmp_path: Path) -> None:
    """An adapter of another size is refused from headers, with both shapes."""
    base, adapter = llama(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    cut = {k: v[:, :16].clone() if "lora_A" in k else v for k, v in weights.items()}
    save_file(cut, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"32×16 .* is 32×32"):
        merge(base, [adapter], tmp_path / "merged")


@pytest.mark.parametrize(("weights", "said"), [
    ([float("nan")], "weight nan is not a finite number"), ([float("inf")], "weight inf is not a finite number"),
    ([1.0, 2.0], "2 weights for 1 adapters"),
])  # fmt: skip
def test_senseless_weights(weights: list[float], said: str, tmp_path: Path) -> None:
    """NaN, infinite or surplus weights are wrong usage."""
    with pytest.raises(UsageError, match=said):
        merge(tmp_path, [tmp_path], tmp_path / "o", weights=weights)


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    """A NaN in the base stops the merge with the tensor's name, and nothing is left behind."""
    base, adapter = llama(tmp_path)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(SurgeryError, match=r"layers.0.self_attn.q_proj.weight: .*not finite"):
        merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_unmerge_refuses_a_stranger_as_base(tmp_path: Path) -> None:
    """--base must be the model that was merged into; a tensor nobody explains is named."""
    base, adapter = llama(tmp_path)
    merge(base, [adapter], tmp_path / "merged")
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MismatchError, match="up_proj"):
        unmerge(tmp_path / "merged", [adapter], tmp_path / "restored", base=base)


def test_config_of_the_adapter_may_be_minimal_but_not_missing(tmp_path: Path) -> None:
    """Only peft_type is required; defaults are PEFT's (r 8, alpha 8). Without the file alpha is unknown."""
    base, adapter = llama(tmp_path, r=8)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    merge(base, [adapter], tmp_path / "merged")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        merge(base, [adapter], tmp_path / "again")


def test_kill_in_the_middle_leaves_nothing_finished(tmp_path: Path) -> None:
    """kill -9 during a merge: no file in the output looks finished, inputs are untouched, --overwrite then succeeds."""
    base, adapter = llama(tmp_path)
    weights = load_file(base / "model.safetensors")
    weights |= {f"more.{i}.weight": torch.zeros(1024, 1024) for i in range(300)}  # 1.2 GB: seconds to write
    save_file(weights, base / "model.safetensors")
    before = hashes(base) | hashes(adapter)
    out = tmp_path / "merged"
    command = [sys.executable, "-m", "lorasurgery", "merge", str(base), str(adapter), "-o", str(out)]
    command += ["--max-shard-size", "100MB", "-q"]
    process = subprocess.Popen(command)
    while len(list(out.glob(".*-partial"))) < 4 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    left = [p.name for p in out.iterdir() if p.name != ".lorasurgery-lock"]
    assert left, "killed too early to prove anything"
    assert all(n.endswith(".lorasurgery-partial") for n in left)
    assert hashes(base) | hashes(adapter) == before
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "holds only the remains of an interrupted run; --resume goes on with it" in again.stderr
    subprocess.run([*command, "--overwrite"], check=True)
    assert not list(out.glob(".*"))
    assert (out / "model.safetensors.index.json").exists()


def test_a_file_is_opened_by_its_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed waits with its file closed, or a merge would hold as many open as there are shards."""
    base = undo_world.llama(tmp_path / "base", torch.float32)
    lora = undo_world.adapter(base, tmp_path / "lora", 4, 0.1)
    writing, opened = threading.local(), []

    def flagged(work: Callable[[Any], None]) -> Callable[[Any], None]:
        def write(job: Any) -> None:
            writing.now = True
            work(job)
            writing.now = False

        return write

    for kind in (jobs.CopyJob, jobs.WholeJob, jobs.StretchJob, jobs.RowsJob):
        monkeypatch.setattr(kind, "write", flagged(kind.write))
    plain = TensorFile.open

    def opening(file: TensorFile) -> None:
        opened.append(getattr(writing, "now", False))
        plain(file)

    monkeypatch.setattr(TensorFile, "open", opening)
    merge(base, [lora], tmp_path / "merged", max_shard_size=1 << 18)
    assert len(opened) > 4
    assert all(opened)


@pytest.mark.parametrize("inside", [False, True], ids=["new", "in place"])
def test_a_run_leaves_its_recipe_as_it_was(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a recipe says is settled when the run begins, its undo record included; nobody can set it again."""
    module, name = (in_place, "run_in_place") if inside else (stream, "run")
    base, adapter = llama(tmp_path)
    real, seen = getattr(module, name), list[str]()

    def run(recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        seen.append(repr(recipe))
        real(recipe, *args, **kwargs)
        seen.append(repr(recipe))
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.seed = 1  # type: ignore[misc]

    monkeypatch.setattr(module, name, run)
    merge(base, [adapter], None if inside else tmp_path / "merged", in_place=inside, undo=True, allow_loss=True)
    unmerge(base if inside else tmp_path / "merged", [adapter], None if inside else tmp_path / "back", in_place=inside)
    assert len(seen) == 4
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert "q_proj" in seen[0]
