"""Folders of adapters: each is done, a bad one is named and doesn't stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import loose
import models
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lorasurgery.cli.main import main
from lorasurgery.errors import OutputError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import rerank
from lorasurgery.ops.check import check
from lorasurgery.ops.factors.folders import find_adapters, run_each
from lorasurgery.ops.inspect import inspect
from lorasurgery.report import Report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two PEFT folders, a kohya file, a checkpoint, a broken file, notes and a hidden folder."""
    root = tmp_path / "loras"
    root.mkdir()
    for i in (1, 2):
        models.peft_adapter("llama", root / f"a{i}", seed=i, r=4, target_modules=["q_proj", "v_proj"])
    save_file(loose.factors("lora_unet_mid_block_proj", (8, 8)), root / "style.safetensors")
    save_file({"model.weight": torch.ones(2, 2)}, root / "checkpoint.safetensors")
    (root / "broken.safetensors").write_bytes(b"no header at all")
    (root / "notes").mkdir()
    (root / ".cache").mkdir()
    (root / "README.md").write_text("mine")
    return root


def test_what_is_found(folder: Path) -> None:
    """Adapters of every kind, and files that can't be read; nothing in what is an adapter itself or no folder."""
    assert [p.name for p in find_adapters(folder)] == ["a1", "a2", "broken.safetensors", "style.safetensors"]
    assert find_adapters(folder / "a1") == find_adapters(folder / "style.safetensors") == []
    assert find_adapters(folder / "notes") == find_adapters(folder / "nowhere") == []


def test_rerank_mirrors_the_names(folder: Path, tmp_path: Path) -> None:
    """Each output is what the command writes for the one adapter; the bad one is in the report and no more."""
    out = tmp_path / "out"
    report = rerank(folder, out, RankChoice(rank=2))
    assert sorted(p.name for p in out.iterdir()) == ["a1", "a2", "style.safetensors"]
    assert report.totals == {"adapters": 4, "failed": 1}
    assert [bool(r.error) for r in report.adapters or []] == [False, False, True, False]
    for name in ("a1", "style.safetensors"):
        rerank(folder / name, tmp_path / "one" / name if name == "a1" else tmp_path / name, RankChoice(rank=2))
    same = load_file(tmp_path / "one" / "a1" / "adapter_model.safetensors")
    found = load_file(out / "a1" / "adapter_model.safetensors")
    assert found.keys() == same.keys() and all(torch.equal(found[k], same[k]) for k in same)
    assert (out / "style.safetensors").read_bytes() == (tmp_path / "style.safetensors").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        rerank(folder, out)
    with pytest.raises(OutputError, match="lies inside"):
        rerank(folder, folder / "out")


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    """--dry-run makes not even the folder."""
    rerank(folder, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    """Status 1, the bad one's line last and alone on stderr; --json is one object with a list under `adapters`."""
    result = CliRunner().invoke(main, ["rerank", str(folder), "-o", str(tmp_path / "out"), "--rank", "2", "-q"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "broken.safetensors: claims a header of 7306071583668334446 bytes" in result.stderr
    assert [line.startswith("lorasurgery: ") and "broken" in line for line in result.stderr.splitlines()] == [True]
    result = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [a["totals"]["format"] for a in found["adapters"] if "error" not in a] == ["peft", "peft", "kohya"]
    (folder / "broken.safetensors").unlink()
    for command, status in (["inspect"], 0), (["check", "--for", "peft"], 1), (["check", "--for", "comfyui"], 1):
        assert CliRunner().invoke(main, [*command, str(folder)]).exit_code == status


def test_check_and_inspect(folder: Path) -> None:
    """check serves when all are served; inspect's totals are each adapter's own."""
    (folder / "broken.safetensors").unlink()
    report = check(folder, "peft")
    assert [r.totals["serves"] for r in report.adapters or []] == [True, True, False]
    assert report.totals["serves"] is False
    (folder / "style.safetensors").unlink()
    assert check(folder, "peft").totals["serves"] is True
    assert [r.totals["modules"] for r in inspect(folder, spectrum=True).adapters or []] == [4, 4]


def test_one_name_for_two(folder: Path, tmp_path: Path) -> None:
    """Two adapters that would be written to one place, and options without meaning, end the run before it starts."""
    save_file(loose.factors("lora_unet_mid_block_proj", (8, 8)), folder / "a1.safetensors")
    with pytest.raises(UsageError, match="rename one"):
        run_each(
            "convert", folder, find_adapters(folder), lambda *_: Report("convert", [], ""), tmp_path / "o", loose=True
        )
    with pytest.raises(UsageError, match="dtype: an adapter is written as float32, bfloat16 or float16"):
        rerank(folder, tmp_path / "out", RankChoice(rank=2), dtype="F64")
    assert not (tmp_path / "o").exists()
