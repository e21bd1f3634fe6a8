"""check: each server's rules, and that the command it names mends what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.torch import load_file, save_file

from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.check import check
from lorasurgery.ops.rerank import rerank

ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapter(root: Path, **config: Any) -> Path:
    models.peft_adapter("llama", root, **({"r": 4, "lora_alpha": 8, "target_modules": ALL} | config))
    return root


CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("peft", {"use_dora": True, "use_rslora": True, "bias": "all"}, []),
    ("vllm", {}, []),
    ("vllm", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, []),
    ("vllm", {"use_dora": True}, ["DoRA"]),
    ("vllm", {"r": 24}, ["rank 24 is above"]),
    ("vllm", {"modules_to_save": ["norm"]}, ["stored whole"]),
    ("vllm", {"bias": "all"}, ["biases"]),
    ("sglang", {}, []),
    ("sglang", {"use_rslora": True}, ["use_rslora"]),
    ("sglang", {"rank_pattern": {"q_proj": 2}}, ["ranks differ"]),
    ("sglang", {"alpha_pattern": {"q_proj": 2}}, ["alphas differ"]),
    ("sglang", {"target_modules": ".*_proj"}, ["regular expression"]),
    ("sglang", {"target_modules": ["q_proj"]}, ["without v_proj"]),
    ("sglang", {"modules_to_save": ["norm"]}, ["not looked at"]),
    ("llama.cpp", {"rank_pattern": {"q_proj": 2}}, []),
    ("llama.cpp", {"use_rslora": True}, ["use_rslora"]),
    ("llama.cpp", {"alpha_pattern": {"q_proj": 2}}, ["alphas differ"]),
    ("llama.cpp", {"use_dora": True}, ["DoRA"]),
    ("llama.cpp", {"modules_to_save": ["norm"]}, ["converter exits"]),
]


@pytest.mark.parametrize(("server", "config", "said"), CASES, ids=str)
def test_rules(server: str, config: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    """What is found is what the server's source says, no more and no less; a rerank that is named mends it."""
    path = adapter(tmp_path / "adapter", **config)
    report = check(path, server)
    found = report.totals["findings"]
    assert len(found) == len(said)
    assert all(word in f["what"] for word, f in zip(said, found, strict=True))
    assert report.totals["serves"] == (not said)
    if found and all("--uniform-rank" in f["mend"] for f in found):
        rerank(path, tmp_path / "mended", uniform_rank=True)
        assert check(tmp_path / "mended", server).totals["serves"]


def test_vllm_ranks(tmp_path: Path) -> None:
    """Any rank up to the limit serves; the nearest setting that would do is named."""
    path = adapter(tmp_path / "adapter", r=20)
    assert "--max-lora-rank 32" in check(path, "vllm").totals["findings"][0]["mend"]
    assert check(path, "vllm", max_lora_rank=32).totals["serves"]


def test_prefixes_and_init(tmp_path: Path) -> None:
    """Keys without PEFT's prefix serve the base model in vLLM; init strings are rejected."""
    path = adapter(tmp_path / "adapter")
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    save_file({k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "gaussian"}))
    assert [f["verdict"] for f in check(path, "vllm").totals["findings"]] == ["rejected", "dropped"]
    rerank(path, tmp_path / "mended", uniform_rank=True)
    assert check(tmp_path / "mended", "vllm").totals["serves"]


def test_the_base_is_matched(tmp_path: Path) -> None:
    """With --base every tensor must find its place."""
    path = adapter(tmp_path / "adapter")
    base = models.save(models.make("llama"), tmp_path / "base")
    assert check(path, "peft", base=base).totals["matched"] == 8
    other = models.save(models.make("gpt2"), tmp_path / "other")
    with pytest.raises(MismatchError, match="matches no tensor"):
        check(path, "peft", base=other)
    with pytest.raises(UsageError):
        check(path, "ollama")
