"""adapter_config.json and what else is JSON: values of the wrong kind, size or depth, each with the line it gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile_files import ADAPTER, CONFIG, METADATA, Files, bytes_of, data_of, header_of
from hostile_line import refused, within
from hostile_mutate import nested

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.adapters.peft.config import PeftConfig
from lorasurgery.checkpoint import json_text
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.inspect import inspect
from lorasurgery.report import Spectrum

CONFIG_NAME = "adapter_config.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("good") / "good")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank huge": ({"r": 10**300}, "have rank 2 but"),
    "rank beyond floats": ({"r": 10**400}, "expected a finite number"),
    "rank negative": ({"r": -2}, "at least 1"),
    "rank zero": ({"r": 0}, "at least 1"),
    "rank a fraction": ({"r": 2.5}, "at least 1"),
    "rank infinite": ({"r": float("inf")}, "expected a finite number"),
    "rank a boolean": ({"r": True}, "expected a finite number"),
    "rank in quotes": ({"r": "2"}, "expected a finite number"),
    "rank a list": ({"r": [2]}, "expected a finite number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "expected a finite number"),
    "alpha a boolean": ({"lora_alpha": False}, "expected a finite number"),
    "alpha in quotes": ({"lora_alpha": "16"}, "expected a finite number"),
    "rank_pattern of zero": ({"rank_pattern": {"q_proj": 0}}, "at least 1"),
    "rank_pattern a list": ({"rank_pattern": [1]}, "expected an object"),
    "rank_pattern of lists": ({"rank_pattern": {"q_proj": [2]}}, "expected a finite number"),
    "alpha_pattern of NaN": ({"alpha_pattern": {"q_proj": float("nan")}}, "expected a finite number"),
    "flag in quotes": ({"use_rslora": "false"}, "expected true or false"),
    "flag an object": ({"use_dora": {}}, "expected true or false"),
    "dora without magnitudes": ({"use_dora": True}, "the adapter is incomplete"),
    "targets a number": ({"target_modules": 7}, "expected a list of module names"),
    "targets of numbers": ({"target_modules": [7]}, "expected a list of module names"),
    "layers in words": ({"layers_to_transform": "all"}, "expected numbers of layers"),
    "layers of words": ({"layers_to_transform": ["1"]}, "expected numbers of layers"),
    "saved an object": ({"modules_to_save": {"a": 1}}, "expected a list of module names"),
    "tokens negative": ({"trainable_token_indices": [-1]}, "expected row numbers"),
    "tokens in words": ({"trainable_token_indices": {"a": "b"}}, "expected row numbers"),
    "another kind": ({"peft_type": ["LORA"]}, "is not LORA"),
    "nested deeply": ({"task_type": nested(70)}, "nested too deeply"),
    "half a character": ({"base_model_name_or_path": "\ud800"}, "half of a character"),
    "an unknown pattern": ({"alpha_pattern": {"(": 8}}, "not a regular expression"),
    "a pattern repeated without end": ({"alpha_pattern": {"a{99999999999999}": 8}}, "not a regular expression"),
    "a pattern that refers back": ({"alpha_pattern": {r"(.)\1": 8}}, "not matched here"),
    "a pattern of groups": ({"alpha_pattern": {"(" * 400 + ")" * 400: 8}}, "nested too deeply"),
    "a pattern of 200 KB": ({"alpha_pattern": {"q" * 200_000 + "*": 8}}, "more than any real one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_in_one_line(case: str, files: Files, tmp_path: Path) -> None:
    """Every value of a wrong kind is named with its file, before anything is written."""
    change, says = WRONG[case]
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    (adapter / CONFIG_NAME).write_text(json.dumps(ADAPTER | change))
    for words in (["inspect", adapter], ["merge", files.base, adapter, "-o", tmp_path / "out"]):
        line = refused(words, tmp_path)
        assert says in line
        assert str(adapter) in line


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"), "cut": (b'{"r": 8', "not JSON"), "a list": (b"[1]", "expected a JSON object"),
    "null": (b"null", "expected a JSON object"), "not UTF-8": (b'{"r": "\xff"}', "not JSON"),
    "lists for ever": (b"[" * 200_000, "nested too deeply"), "objects for ever": (b'{"a":' * 200_000, "nested too deeply"),
    "endless digits": (b'{"r": ' + b"9" * 100_000 + b"}", "not JSON"), "a NUL": (b'{"r": 8}\0', "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_json(case: str, files: Files, tmp_path: Path) -> None:
    """adapter_config.json, config.json and an index that are no JSON object are refused in one line each."""
    raw, says = TEXTS[case]
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    (adapter / CONFIG_NAME).write_bytes(raw)
    assert says in refused(["inspect", adapter], tmp_path)
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    for name in ("config.json", "model.safetensors.index.json"):
        if raw or name != "config.json":  # an empty config.json is as good as none
            (base / name).write_bytes(raw)
            line = refused(["inspect", base], tmp_path)
            assert says in line
            assert name in line


@pytest.mark.parametrize("change", [{"model_type": ["llama"]}, {"architectures": 3}, {"architectures": [1]}])
def test_configs_of_models(change: dict[str, Any], files: Files, tmp_path: Path) -> None:
    """Words in config.json that decide what tensors mean must be words."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    (base / "config.json").write_text(json.dumps(CONFIG | change))
    assert next(iter(change)) in refused(["merge", base, files.adapter, "-o", tmp_path / "out"], tmp_path)


def test_a_file_that_is_too_large_is_not_read(files: Files, tmp_path: Path) -> None:
    """A config of gigabytes (of holes) is refused by its size."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    with (adapter / CONFIG_NAME).open("r+b") as file:
        file.truncate(5 * 10**9)
    assert f"more than {json_text.MOST_CONFIG:,}" in refused(["inspect", adapter], tmp_path)


IN_HEADERS: dict[str, tuple[Any, str]] = {
    "alpha infinite": (METADATA | {"unet.lora_alpha": float("inf")}, "expected a finite number"),
    "alpha beyond floats": (METADATA | {"unet.lora_alpha": 10**400}, "expected a finite number"),
    "alpha null": (METADATA | {"unet.lora_alpha": None}, "expected a finite number"),
    "pattern a list": (METADATA | {"unet.alpha_pattern": [8]}, "expected an object"),
    "pattern unknown": (METADATA | {"unet.alpha_pattern": {"(": 8}}, "not a regular expression"),
    "flag in quotes": (METADATA | {"unet.use_rslora": "no"}, "expected true or false"),
    "no object": ([], "expected a JSON object"),
    "nested": ({"unet.r": nested(70)}, "nested too deeply"),
}


@pytest.mark.parametrize("case", IN_HEADERS)
def test_configs_in_headers(case: str, files: Files, tmp_path: Path) -> None:
    """diffusers keeps a config in the header: the same holds for it."""
    said, says = IN_HEADERS[case]
    source, path = files.loose / "diffusers.safetensors", tmp_path / "lora.safetensors"
    header = header_of(source) | {"__metadata__": {"lora_adapter_metadata": json.dumps(said)}}
    path.write_bytes(bytes_of(header, data_of(source)))
    line = refused(["inspect", path], tmp_path)
    assert says in line
    assert "lora.safetensors" in line


def test_a_hundred_thousand_patterns_take_seconds_of_the_processor(files: Files, tmp_path: Path) -> None:
    """rank_pattern of 10⁵ names, target_modules and modules_to_save as long: read and checked in no time."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    names = [f"model.layers.{i}.mlp.experts.{i}.up_proj" for i in range(100_000)]
    many = {"rank_pattern": dict.fromkeys(names, 2), "modules_to_save": names,
            "target_modules": [*names, *ADAPTER["target_modules"]], "target_parameters": names}  # fmt: skip
    (adapter / CONFIG_NAME).write_text(json.dumps(ADAPTER | many))
    with within():
        assert len(open_adapter(adapter).deltas) == 6


def test_real_scales_are_what_they_were() -> None:
    """Patterns in the order of the config: the first that means a module wins, as in PEFT."""
    config = PeftConfig(r=8, alpha=16, rank_pattern={r".*\.layers\.1\..*": 2, "layers.1.q_proj": 4, "q_proj": 1})
    assert config.scaling("m.layers.1.q_proj", 2) == (16, 8)
    assert config.scaling("m.layers.2.q_proj", 1) == (16, 16)
    assert config.scaling("m.layers.2.v_proj", 8) == (16, 2)


@pytest.mark.parametrize("alpha", [1e-320, 1e-200, 5e-324, -1e300])
def test_scales_beyond_all_measure(alpha: float, files: Files, tmp_path: Path) -> None:
    """An alpha whose square is nothing, or more than any number, gives spectra all the same, or one line."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    (adapter / CONFIG_NAME).write_text(json.dumps(ADAPTER | {"lora_alpha": alpha, "alpha_pattern": {}}))
    try:
        report = inspect(adapter, spectrum=True, device="cpu")
    except SurgeryError as problem:
        assert str(adapter) in str(problem)
        return
    spectra = [m for m in report.modules if isinstance(m, Spectrum)]
    assert all(1 <= (m.stable_rank or 0) <= 2 for m in spectra if m.singular_values)
    assert "nan" not in report.summary
