"""Memory: no command takes more than three times the largest tensor in float32, its adapter and 256 MB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.errors import UsageError
from lorasurgery.ops.extract import extract
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging import in_place as in_place_work
from lorasurgery.ops.merging import stream

WIDE, TALL = 6144, 10240
LARGEST = 4 * WIDE * TALL  # 252 MB in float32
MEASURE = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of four large matrices, and two adapters."""
    path, generator = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    (path / "config.json").write_text("{}")
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
    base = {f"{n}.weight": (0.02 * torch.randn(TALL, WIDE, generator=generator)).bfloat16() for n in names}
    up, down = torch.randn(TALL, 24, generator=generator), torch.randn(24, WIDE, generator=generator)
    tuned = {n: (w.float() + 1e-4 * up @ down).bfloat16() for n, w in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (path / name).mkdir()
        save_file(tensors, path / name / "model.safetensors", {"format": "pt"})
    for k in (0, 1):
        (path / f"adapter{k}").mkdir()
        factors = {}
        for n in names:
            factors[f"base_model.model.{n}.lora_A.weight"] = 0.1 * torch.randn(32, WIDE, generator=generator)
            factors[f"base_model.model.{n}.lora_B.weight"] = 0.1 * torch.randn(TALL, 32, generator=generator)
        save_file(factors, path / f"adapter{k}/adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": ["up_proj"]}
        (path / f"adapter{k}/adapter_config.json").write_text(json.dumps(config))
    merge(path / "base", [path / "adapter0"], path / "merged", undo=True)
    return path


def peak(*command: str, holds: bool = True) -> int:
    """The peak resident memory of a process, in bytes; where a check does not hold, its status is 1."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, sys.executable, *command], capture_output=True, text=True
    )
    size, status = done.stderr.split()[-2:]
    assert status == str(int(not holds)), done.stderr
    return int(size)


COMMANDS = {
    "extract": "extract base tuned --rank 32",
    "extract one": "extract base tuned --rank 32 --target layers.0.mlp.up_proj",
    "merge": "merge base adapter0 adapter1",
    "merge to float32": "merge base adapter0 --dtype float32",
    "unmerge": "unmerge base adapter0",
    "rerank": "rerank adapter0 --rank 16",
    "blend": "blend adapter0 adapter1",
    "blend ties": "blend adapter0 adapter1 --method ties --density 0.3 --rank 16",
    "convert": "convert adapter0 --to peft --portable",
    "inspect": "inspect adapter0 --spectrum",
    "inspect checkpoint": "inspect base",
    "diff": "diff base tuned",
    "diff adapters": "diff adapter0 adapter1",
    "plan": "plan base --rank 8",
    "check": "check adapter0 --base base",
    "merge --undo": "merge base adapter0 --undo",
    "unmerge, exact": "unmerge merged adapter0",
    "merge --in-place": "merge merged adapter1 --in-place",
    "switch": "switch merged --to adapter1",
    "verify": "verify merged --against base --adapter adapter1",
}
INSIDE = ("merge --in-place", "switch")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_memory_of_every_command(name: str, folder: Path, tmp_path: Path) -> None:
    """Peak over the interpreter with torch: under 3 times the largest touched tensor in float32 + adapters + 256 MB."""
    words = [
        str(folder / w) if w.startswith(("base", "tuned", "adapter", "merged")) else w for w in COMMANDS[name].split()
    ]
    if name in INSIDE:
        words[1] = str(shutil.copytree(folder / "merged", tmp_path / "merged"))
    elif words[0] in ("extract", "merge", "unmerge", "rerank", "blend", "convert"):
        words += ["-o", str(tmp_path / "out")]
    over = peak("-m", "lorasurgery", *words, "-q", holds=name != "verify") - peak("-c", "import torch")
    adapters = sum((folder / f"adapter{k}/adapter_model.safetensors").stat().st_size for k in (0, 1))
    print(f"{name}: {over / 1e6:.0f} MB over torch, allowed {(3 * LARGEST + adapters) / 1e6 + 256:.0f} MB")
    assert over < 3 * LARGEST + adapters + 256e6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("extract", 100), ("merge", 64), ("unmerge", 64)])
def test_memory_limit(name: str, limit: int, folder: Path, tmp_path: Path) -> None:
    """--memory-limit far below one tensor: the process keeps to it, and the bytes are the same."""
    words = [str(folder / w) if w.startswith(("base", "tuned", "adapter")) else w for w in COMMANDS[name].split()]
    plain, tight = str(tmp_path / "plain"), str(tmp_path / "tight")
    subprocess.run([sys.executable, "-m", "lorasurgery", *words, "-q", "-o", plain], check=True)
    command = ["-m", "lorasurgery", *words, "-q", "-o", tight, "--memory-limit", f"{limit}MB"]
    over = peak(*command) - peak("-c", "import torch")
    adapters = sum((folder / f"adapter{k}/adapter_model.safetensors").stat().st_size for k in (0, 1))
    print(f"{name}: {over / 1e6:.0f} MB over torch with --memory-limit {limit}MB")
    assert over < limit * 1e6 + adapters + 128e6 < LARGEST + 256e6
    for file in Path(plain).glob("*.safetensors"):
        assert file.read_bytes() == (Path(tight) / file.name).read_bytes()


def test_limited_extraction_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference read again for every pass gives the factors of one that is held, tall and wide, bytes alike."""
    from lorasurgery.engine import runtime

    monkeypatch.setattr(runtime, "LEAST_MEMORY", 1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.up_proj.weight": (4096, 300), "a.down_proj.weight": (300, 4096), "a.norm.weight": (300,)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    tuned = {n: w + 1e-3 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    pair = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    extract(*pair, tmp_path / "plain")
    extract(*pair, tmp_path / "tight", memory_limit=1_000_000)
    plain, tight = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "tight"))
    assert plain.keys() == tight.keys()
    assert all(torch.equal(plain[n], tight[n]) for n in plain)


@pytest.mark.parametrize("in_place", [False, True])
def test_half_of_the_limit_is_for_weights_on_their_way(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read, computed and written at the same time leaves the other half to what the work itself needs."""
    rooms = []

    class Noted(Pipeline):
        def __init__(self, room: int, *threads: Any) -> None:
            rooms.append(room)
            super().__init__(room, *threads)

    monkeypatch.setattr(stream, "Pipeline", Noted)
    monkeypatch.setattr(in_place_work, "Pipeline", Noted)
    save_file({"q_proj.weight": torch.eye(8)}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    factors = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    named = {f"base_model.model.q_proj.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(named, tmp_path / "adapter/adapter_model.safetensors")
    out = None if in_place else tmp_path / "out.safetensors"
    merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], out, in_place=in_place, memory_limit=64_000_000)
    assert rooms
    assert max(rooms) <= 32_000_000


def test_limits_that_are_refused(tmp_path: Path) -> None:
    """Too little to work in is wrong usage, said before anything is read."""
    with pytest.raises(UsageError, match="64MB"):
        merge(tmp_path, [tmp_path], tmp_path / "out", memory_limit=1000)
