"""verify: what is whole holds, whoever made it; what is not is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from click.testing import CliRunner
from long_runs import world
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorasurgery.cli.main import main
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging.undo.record import read_undo_record
from lorasurgery.ops.verify import verify
from lorasurgery.report import Checked

FIRST, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the two merged."""
    folder = tmp_path_factory.mktemp("world")
    world(folder)
    merge(folder / "base", [folder / "adapter"], folder / "merged")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_what_peft_merged_is_equal_to_rounding(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's merge_and_unload, saved by transformers, is the base plus the adapter; half of it is not."""
    base = models.save(models.make(family, dtype), tmp_path / "base")
    kind = {"gpt2": ["c_attn"], "t5": ["q", "v"]}.get(family, ["q_proj", "up_proj"])
    models.peft_adapter(family, tmp_path / "adapter", r=4, target_modules=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(models.load(family, base, torch.float32), tmp_path / "adapter")
        peft.merge_and_unload().to(dtype).save_pretrained(tmp_path / "merged")
    held = verify(tmp_path / "merged", against=base, adapters=[tmp_path / "adapter"])
    assert held.totals["equal"] == "rounding"
    assert held.totals["holds"]
    half = verify(tmp_path / "merged", against=base, adapters=[tmp_path / "adapter"], weights=[0.5])
    assert half.totals["equal"] == "no"
    assert not half.totals["holds"]
    assert {m.state for m in half.modules} == {"differs"}  # type: ignore[attr-defined]


def one_value(folder: Path) -> None:
    tensors = load_file(folder / FIRST)
    tensors[NAME][3, 5] += 1
    save_file(tensors, folder / FIRST, {"format": "pt"})


def an_untouched_value(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 1.0078125  # the next value after 1
    save_file(tensors, file, {"format": "pt"})


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / FIRST)
    tensors[NAME][3, 5] = torch.nan
    tensors[NAME][4, 5] = torch.inf
    save_file(tensors, folder / FIRST, {"format": "pt"})


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "model-00004-of-00003.safetensors")


def wrong_total(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 5}}))


def forgotten(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][NAME]
    (folder / INDEX).write_text(json.dumps(index))


def too_few_layers(folder: Path) -> None:
    _config(folder, num_hidden_layers=9)


def too_few_rows(folder: Path) -> None:
    _config(folder, vocab_size=301)


def _config(folder: Path, **words: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | words))


BROKEN: dict[Callable[[Path], None], str] = {
    not_finite: f"{FIRST}: {NAME}: 2 values are NaN or infinite",
    stray_shard: "model-00004-of-00003.safetensors: lies beside the shards, but the index does not name it",
    wrong_total: f"{INDEX}: says 5 bytes of tensors but the files hold",
    forgotten: f"{INDEX}: does not list {NAME}, which the files hold",
    too_few_layers: "config.json: num_hidden_layers is 9 but the files hold 6",
    too_few_rows: "config.json: vocab_size is 301 but model.embed_tokens.weight has 300 rows",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda f: f.__name__)
def test_what_is_broken_is_named(spoil: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    """Each flaw is one sentence, alone; the exit status is 1."""
    shutil.copytree(made / "base", tmp_path / "base")
    spoil(tmp_path / "base")
    report = verify(tmp_path / "base")
    assert not report.totals["holds"]
    (sentence,) = report.totals["findings"]
    assert BROKEN[spoil] in sentence
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "base")])
    assert done.exit_code == 1
    assert BROKEN[spoil] in done.output
    quiet = CliRunner().invoke(main, ["verify", str(tmp_path / "base"), "-q"])
    assert (quiet.exit_code, quiet.output) == (1, "")


@pytest.mark.parametrize("spoil", [one_value, an_untouched_value], ids=lambda f: f.__name__)
def test_a_single_value_is_found(spoil: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    """One value of a touched tensor, or one step in a tensor that nobody touched: not equal, and named."""
    shutil.copytree(made / "merged", tmp_path / "merged")
    assert verify(tmp_path / "merged", against=made / "base", adapters=[made / "adapter"]).totals["holds"]
    spoil(tmp_path / "merged")
    report = verify(tmp_path / "merged", against=made / "base", adapters=[made / "adapter"])
    assert report.totals["equal"] == "no"
    (line,) = [m for m in report.modules if m.state == "differs"]  # type: ignore[attr-defined]
    assert line.name == (NAME if spoil is one_value else "model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_how_many_values_differ(dtype: torch.dtype, tmp_path: Path) -> None:
    """The share is of the tensor's values, touched or not, and the steps are those of the value furthest away."""
    base = models.save(models.make("llama", dtype), tmp_path / "base")
    models.peft_adapter("llama", tmp_path / "adapter", r=4, target_modules=["q_proj"])
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    values = weights[name].view(-1)
    for moved, steps, state in (
        (1, 1, "rounding"),
        (3, 1, "rounding"),
        (7, 64, "differs"),
        (values.numel(), 64, "differs"),
    ):
        changed = weights | {name: stepped(values, moved, steps).view(weights[name].shape)}
        save_file(changed, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
        report = verify(tmp_path / "merged", against=base, adapters=[tmp_path / "adapter"])
        (line,) = report.modules
        assert isinstance(line, Checked)
        assert (line.name, line.state, line.share) == (name, state, moved / values.numel())
        assert line.steps == (0 if dtype == torch.float64 else steps)
        assert report.totals["equal"] == ("rounding" if state == "rounding" else "no")


def stepped(values: torch.Tensor, count: int, steps: int) -> torch.Tensor:
    """The largest values, so many of them, each some steps further from 0 than before; of float64 a share of 1e-13 a step."""
    chosen = values.abs().argsort(descending=True)[:count]
    found = values.clone()
    if values.dtype == torch.float64:
        found[chosen] *= 1 + 1e-13 * steps
    else:
        bits = found.view({4: torch.int32, 2: torch.int16}[values.element_size()])
        bits[chosen] += steps
    return found


def test_a_changed_record_is_found(made: Path, tmp_path: Path) -> None:
    """A merged checkpoint that was changed since can't be undone, and verify says so before anybody tries."""
    merge(made / "base", [made / "adapter"], tmp_path / "m", undo=True)
    assert verify(tmp_path / "m").totals["findings"] == []
    one_value(tmp_path / "m")
    (sentence,) = verify(tmp_path / "m").totals["findings"]
    assert sentence == f"0001.safetensors: {NAME} was changed since adapter was merged, so the merge can't be undone"


def test_a_forged_record_is_not_believed(made: Path, tmp_path: Path) -> None:
    """Weights that are not base + adapter stay so, however well a record speaks of them."""
    merge(made / "base", [made / "adapter"], tmp_path / "m", undo=True)
    assert verify(tmp_path / "m", against=made / "base", adapters=[made / "adapter"]).totals["equal"] == "bits"
    one_value(tmp_path / "m")
    record = tmp_path / "m/lorasurgery-undo/0001.safetensors"
    old, tensors = read_undo_record(record), load_file(record)
    about = json.loads(bytes(tensors["about"].tolist()))
    for stretch, raw in zip(old.tensors[NAME].stretches, about["tensors"][NAME]["stretches"], strict=True):
        found = bytes(load_file(tmp_path / "m" / FIRST)[NAME].reshape(-1).view(torch.uint8).tolist())
        raw[5] = hashlib.sha256(found[stretch.start : stretch.start + stretch.size]).hexdigest()
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file(tensors, record)
    assert verify(tmp_path / "m").totals["findings"] == []  # it does fit the weights
    report = verify(tmp_path / "m", against=made / "base", adapters=[made / "adapter"])
    assert report.totals["equal"] == "no"
    assert not report.totals["holds"]


def test_a_tensor_too_many_hides_no_other(tmp_path: Path) -> None:
    """What is compared does not end with the first tensor that has nothing to be compared with."""
    save_file({"b.weight": torch.ones(2, 2), "c.weight": torch.ones(2)}, tmp_path / "base.safetensors")
    changed = {"a.weight": torch.ones(2), "b.weight": torch.eye(2), "c.weight": torch.ones(2)}
    save_file(changed, tmp_path / "model.safetensors")
    report = verify(tmp_path / "model.safetensors", against=tmp_path / "base.safetensors")
    states = {m.name: m.state for m in report.modules if isinstance(m, Checked)}
    assert states == {"a.weight": "extra", "b.weight": "differs"}


def test_adapters(made: Path, tmp_path: Path) -> None:
    """An adapter is read through; a value that is not finite, a tensor without meaning and a scale of 0 are named."""
    report = verify(made / "adapter", against=made / "base")
    assert report.totals["holds"]
    assert report.totals["matched"] == 24
    shutil.copytree(made / "adapter", tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    found = verify(tmp_path / "a").totals["findings"]
    assert any("1 values are NaN" in sentence for sentence in found)
    assert any("the scale is 0" in sentence for sentence in found)


def test_without_adapters_every_byte_counts(made: Path) -> None:
    """A checkpoint is equal to itself to the bit, and a merged one is not its base."""
    assert verify(made / "base", against=made / "base").totals["equal"] == "bits"
    assert verify(made / "merged", against=made / "base").totals["equal"] == "no"


def test_adapters_need_a_base() -> None:
    """--adapter without --against is wrong usage."""
    done = CliRunner().invoke(main, ["verify", "x", "--adapter", "y"])
    assert done.exit_code == 2
    assert "--adapter: needs --against BASE" in done.stderr
