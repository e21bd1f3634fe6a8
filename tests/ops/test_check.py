"""check: each server's rules, and that the command it names mends what it found; PEFT itself is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.merge import merge

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
    ("llama.cpp", {"modules_to_save": ["norm"]}, ["skipped"]),
    ("llama.cpp", {"modules_to_save": ["lm_head"]}, ["it exits"]),
    ("llama.cpp", {"bias": "all"}, []),
    ("peft", {"target_modules": ".*self_attn.[qv]_proj"}, []),
    ("peft", {"layers_to_transform": [1]}, []),
    ("diffusers", {}, ["a PEFT folder"]),
    ("comfyui", {}, ["a PEFT folder"]),
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
    if found and all("--portable -o" in f["mend"] for f in found):
        convert(path, tmp_path / "mended", ConvertOptions("peft", portable=True))
        assert check(tmp_path / "mended", server).totals["serves"]


def test_what_the_summary_says(tmp_path: Path) -> None:
    """Served or not, and how much of it the base has where one is given; of what is amiss each verdict and its mend."""
    path, other = adapter(tmp_path / "adapter"), adapter(tmp_path / "other", r=24)
    base = models.save(models.make("llama"), tmp_path / "base")
    assert check(path, "vllm").summary == "vllm serves it as it is"
    assert check(path, "vllm", base=base).summary == "vllm serves it as it is; all of it matches the base (8 tensors)"
    found = check(other, "vllm", base=base)
    (one,) = found.totals["findings"]
    assert found.summary.splitlines() == [
        "vllm would not serve it as it is meant; all of it matches the base (8 tensors):",
        f"  {one['verdict']}: {one['what']}",
        f"    start vLLM with max_lora_rank=32, or rerank({str(other)!r}, out=OUT, rank=16)",
    ]
    assert one["mend"] == f"start vLLM with --max-lora-rank 32, or lorasurgery rerank {other} -o OUT --rank 16"
    assert check(other, "vllm").summary.startswith("vllm would not serve it as it is meant:\n  ")


def test_vllm_ranks(tmp_path: Path) -> None:
    """Any rank up to the limit serves, r and rank_pattern counting as well; the nearest setting that would do is named."""
    path = adapter(tmp_path / "adapter", r=20)
    assert "--max-lora-rank 32" in check(path, "vllm").totals["findings"][0]["mend"]
    assert check(path, "vllm", max_lora_rank=32).totals["serves"]
    unused = adapter(tmp_path / "unused", r=64, rank_pattern=dict.fromkeys(ALL, 4))
    assert "rank 64" in check(unused, "vllm").totals["findings"][0]["what"]


@pytest.mark.parametrize(("init", "serves"), [("gaussian", True), ("eva", True), ("something", False)])
def test_vllm_inits(init: str, serves: bool, tmp_path: Path) -> None:
    """vLLM takes the inits that leave the base alone, and no word it doesn't know; --portable mends it."""
    path = adapter(tmp_path / "adapter")
    rewrite(path, {"init_lora_weights": init})
    assert check(path, "vllm").totals["serves"] == serves
    convert(path, tmp_path / "mended", ConvertOptions("peft", portable=True))
    assert check(tmp_path / "mended", "vllm").totals["serves"]


def rewrite(path: Path, config: dict[str, Any], rename: Callable[[str], str] = str) -> None:
    """Change an adapter's config and its keys."""
    file, words = path / "adapter_model.safetensors", path / "adapter_config.json"
    save_file({rename(k): v for k, v in load_file(file).items()}, file)
    words.write_text(json.dumps(json.loads(words.read_text()) | config))


PEFT_CASES: dict[str, tuple[dict[str, Any], Callable[[str], str]]] = {
    "as it is": ({}, str),
    "no prefix": ({}, lambda k: k.removeprefix("base_model.model.")),
    "compiled": ({}, lambda k: k.replace("base_model.model.", "base_model.model._orig_mod.")),
    "adapter's name": ({}, lambda k: k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")),
    "another's name": ({}, lambda k: k.replace("lora_A", "lora_A.style").replace("lora_B", "lora_B.style")),
    "fewer targets": ({"target_modules": ["q_proj", "v_proj"]}, str),
    "targets by expression": ({"target_modules": r".*\.(q|k|v|o)_proj"}, str),
    "expression too narrow": ({"target_modules": r".*\.0\..*_proj"}, str),
    "excluded": ({"exclude_modules": ["k_proj"]}, str),
    "other layers": ({"layers_to_transform": [1]}, str),
    "all layers": ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, str),
    "all linear": ({"target_modules": "all-linear"}, str),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_loads(case: str, tmp_path: Path) -> None:
    """check says that PEFT serves an adapter exactly when PEFT's merged model is ours; --portable mends the others."""
    path = adapter(tmp_path / "adapter")
    base = models.save(models.make("llama"), tmp_path / "base")
    config, rename = PEFT_CASES[case]
    rewrite(path, config, rename)
    merge(base, [path], tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")

    def served(folder: Path) -> bool:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
        state = model.state_dict()
        return all(torch.allclose(state[k], v, atol=1e-6) for k, v in ours.items() if k in state)

    assert check(path, "peft").totals["serves"] == served(path), case
    convert(path, tmp_path / "mended", ConvertOptions("peft", portable=True))
    assert check(tmp_path / "mended", "peft").totals["serves"]
    assert served(tmp_path / "mended")


def test_inits_that_peft_does_not_know(tmp_path: Path) -> None:
    """PEFT stops at a word for an init that it doesn't know; --portable writes true."""
    path = adapter(tmp_path / "adapter")
    rewrite(path, {"init_lora_weights": "mystery"})
    assert "mystery" in check(path, "peft").totals["findings"][0]["what"]
    with pytest.raises(ValueError, match="mystery"):
        models.peft_deltas("llama", path)
    convert(path, tmp_path / "mended", ConvertOptions("peft", portable=True))
    assert check(tmp_path / "mended", "peft").totals["serves"]
    assert models.peft_deltas("llama", tmp_path / "mended")


def test_words_that_sglang_knows(tmp_path: Path) -> None:
    """all-linear is not an expression to SGLang, which has it for a word of its own."""
    path = adapter(tmp_path / "adapter")
    rewrite(path, {"target_modules": "all-linear"})
    assert check(path, "sglang").totals["serves"]


def test_names_in_keys(tmp_path: Path) -> None:
    """vLLM and llama.cpp's converter know no keys with the adapter's name; --portable takes it off."""
    path = adapter(tmp_path / "adapter")
    rewrite(path, {}, PEFT_CASES["adapter's name"][1])
    convert(path, tmp_path / "mended", ConvertOptions("peft", portable=True))
    for server in ("vllm", "llama.cpp"):
        assert [f["verdict"] for f in check(path, server).totals["findings"]] == ["rejected"]
        assert check(tmp_path / "mended", server).totals["serves"]


def test_a_tied_head_in_llama_cpp(tmp_path: Path) -> None:
    """The converter raises for a head that the base shares with its embedding, which only the base tells."""
    path = adapter(tmp_path / "adapter", target_modules=[*ALL, "lm_head"])
    for tie in (True, False):
        base = models.save(models.make("qwen2-tied" if tie else "llama"), tmp_path / f"base{tie}")
        assert check(path, "llama.cpp", base=base).totals["serves"] == (not tie)
    assert check(path, "llama.cpp").totals["serves"]


def test_the_base_is_matched(tmp_path: Path) -> None:
    """With --base every tensor must find its place."""
    path = adapter(tmp_path / "adapter")
    base = models.save(models.make("llama"), tmp_path / "base")
    assert check(path, "peft", base=base).totals["matched"] == 8
    other = models.save(models.make("gpt2"), tmp_path / "other")
    with pytest.raises(MismatchError, match="8 of 8 modules match no tensor"):
        check(path, "peft", base=other)
    with pytest.raises(UsageError, match="server ollama: expected one of peft"):
        check(path, "ollama")
