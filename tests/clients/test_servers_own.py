"""The servers' own code on adapters: vLLM's is run in an environment of its own, SGLang's config is loaded from its wheel.

Slow: it downloads both wheels (380 MB) once, into .bench/. `make test-slow TESTS=tests/clients/test_servers_own.py`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".bench" / "servers"
VLLM, SGLANG = "vllm==0.33.0", "sglang==0.5.23"
# What vllm.lora imports; torch, transformers and the rest come from this environment, so that no second torch is needed.
NEEDED = ("aiohttp apache-tvm-ffi cachetools cbor2 fastapi llguidance msgspec openai openai-harmony opentelemetry-api "
          "partial-json-parser prometheus_client py-cpuinfo pybase64 pyzmq uvloop xgrammar").split()  # fmt: skip
WITH_DEPENDENCIES = {"aiohttp", "fastapi", "openai", "opentelemetry-api"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The python of an environment with vLLM's wheel and no second torch."""
    python = HOME / "vllm" / "bin" / "python"
    if not (HOME / "vllm" / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME / "vllm")], check=True)
        ours = next(p for p in sys.path if p.endswith("site-packages"))
        site = next((HOME / "vllm" / "lib").glob("python3*/site-packages"))
        (site / "ours.pth").write_text(ours)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", VLLM, *(n for n in NEEDED if n not in WITH_DEPENDENCIES)], check=True)
        subprocess.run([*pip, *WITH_DEPENDENCIES], check=True)
        (HOME / "vllm" / "ready").touch()
    return python


def verdicts(python: Path, folders: list[Path], max_lora_rank: int = 16) -> list[dict[str, str]]:
    """What vLLM's own code says of adapter folders."""
    script = Path(__file__).parents[1] / "serve_vllm.py"
    done = subprocess.run([str(python), "-W", "ignore", str(script), str(max_lora_rank), *map(str, folders)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(folders), done.stderr[-2000:]
    return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "ranks": {"rank_pattern": {"q_proj": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 2}}, "dora": {"use_dora": True}, "rank 24": {"r": 24}, "rank 16": {"r": 16},
    "norm saved": {"modules_to_save": ["norm"]}, "biases": {"bias": "all"}, "expression": {"target_modules": ".*_proj"},
    "gaussian": {"init_lora_weights": "gaussian"}, "head": {"target_modules": [*LINEAR, "lm_head"]},
    "q alone": {"target_modules": ["q_proj"]}, "unused rank": {"r": 64, "rank_pattern": dict.fromkeys(LINEAR, 4)},
}  # fmt: skip
RENAMED = {
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "named": lambda k: k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
}
CHANGED = {"unknown init": {"init_lora_weights": "mystery"}, "no targets": {"target_modules": None}}


def folders(root: Path) -> dict[str, Path]:
    """Every case as a PEFT folder, and what `convert --portable` makes of those it can say."""
    found = {}
    for name, config in CASES.items():
        found[name] = root / name
        models.peft_adapter("llama", root / name, **({"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | config))
    for name in (*RENAMED, *CHANGED):
        found[name] = root / name
        models.peft_adapter("llama", root / name, r=4, lora_alpha=8, target_modules=LINEAR)
        file, config = root / name / "adapter_model.safetensors", root / name / "adapter_config.json"
        if name in RENAMED:
            save_file({RENAMED[name](k): v for k, v in load_file(file).items()}, file)
        else:
            words = {k: v for k, v in (json.loads(config.read_text()) | CHANGED[name]).items() if v is not None}
            config.write_text(json.dumps(words))
    for name, path in list(found.items()):
        if name not in ("dora", "norm saved", "biases"):
            convert(path, root / f"{name} portable", ConvertOptions("peft", portable=True))
            found[f"{name} portable"] = root / f"{name} portable"
    return found


def test_vllm(vllm: Path, tmp_path: Path) -> None:
    """check says `rejected` exactly when vLLM raises; what it takes is the update that PEFT computes; --portable serves."""
    cases = folders(tmp_path)
    for name, path, said in zip(cases, cases.values(), verdicts(vllm, list(cases.values())), strict=True):
        rejected = [f for f in check(path, "vllm").totals["findings"] if f["verdict"] == "rejected"]
        print(f"{name}: {said.get('error', 'taken')[:90]}")
        assert bool(rejected) == ("error" in said), (name, rejected, said)
        if "portable" in name and not name.startswith(("rank 24", "unused")):
            assert check(path, "vllm").totals["serves"], name
        if "error" not in said and not name.startswith("no prefix"):
            ours = models.peft_deltas("llama", path)
            theirs = {k: v.double() for k, v in load_file(said["updates"]).items()}
            assert models.relative(theirs, ours) < 1e-6, name


def sglang_config() -> ModuleType:
    """SGLang's lora_config.py, out of its wheel: it imports no more than huggingface_hub."""
    file = HOME / "sglang" / "lora_config.py"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(file.parent), SGLANG]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(file.parent.glob("*.whl"))) as wheel:
            file.write_bytes(wheel.read("sglang/srt/lora/lora_config.py"))
    spec = importlib.util.spec_from_file_location("sglang_lora_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sglang(tmp_path: Path) -> None:
    """By SGLang's own config and its one scale lora_alpha/r, what check takes is PEFT's update, of one rank."""
    config = sglang_config().LoRAConfig
    for name, path in folders(tmp_path).items():
        found = check(path, "sglang").totals["findings"]
        if name == "no targets":
            with pytest.raises(KeyError, match="target_modules"):
                config(str(path))
            continue
        theirs = config(str(path))
        assert bool(theirs.use_dora) == any(f["what"] == "DoRA" for f in found)
        if not found:
            weights = load_file(path / "adapter_model.safetensors")
            assert {v.shape[0] for k, v in weights.items() if "lora_A" in k} == {theirs.r}
            assert isinstance(theirs.target_modules, list)
            if not name.startswith(("no prefix", "named")) and name != "unknown init":
                for module, delta in models.peft_deltas("llama", path).items():
                    down, up = (weights[f"base_model.model.{module}.lora_{s}.weight"].double() for s in "AB")
                    assert torch.allclose(up @ down * (theirs.lora_alpha / theirs.r), delta, atol=1e-6), name
