"""convert: the same ΔW under other names, bit for bit there and back, and to the oracles' own loaders."""

from __future__ import annotations

import json
from pathlib import Path

import images
import loose
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.merge import merge

KINDS = ["sd1", "sdxl", "flux"]


def updates(path: Path) -> dict[str, Tensor]:
    """Every module's ΔW in float32, by the name that the file gives it."""
    adapter = open_adapter(path)
    return {p: adapter.load_update(d).to(torch.float32).dense() for p, d in adapter.deltas.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the modules and every bit of their updates are the same."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind's diffusers folder, and its single file."""
    root = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        images.save_pipeline(images.quiet(images.pipeline, kind), root / kind)
        images.single_file(kind, root / f"{kind}.safetensors")
    return root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui"])
def test_there_and_back(kind: str, single: bool, to: str, bases: Path, tmp_path: Path) -> None:
    """kohya → another format → kohya keeps names, alphas' meaning and every bit of every ΔW."""
    base = bases / (f"{kind}.safetensors" if single else kind)
    text = not (single and kind == "flux")  # Flux's single file is the transformer alone
    source = loose.kohya(kind, tmp_path / "in.safetensors", text=text)
    convert(source, tmp_path / "there", ConvertOptions(to), base=base)
    report = convert(tmp_path / "there", tmp_path / "back.safetensors", ConvertOptions("kohya"), base=base)
    assert report.totals["error"] == 0
    assert same(updates(tmp_path / "back.safetensors"), updates(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["peft", "diffusers", "comfyui", "kohya"])
def test_merges_alike(kind: str, to: str, bases: Path, tmp_path: Path) -> None:
    """Merged into the folder, the converted adapter gives the weights that the original gives."""
    source = loose.kohya(kind, tmp_path / "in.safetensors")
    convert(source, tmp_path / "there", ConvertOptions(to), base=bases / kind)
    for name, adapter in (("one", source), ("two", tmp_path / "there")):
        merge(bases / kind, [adapter], tmp_path / name)
    files = [f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*.safetensors")]
    for file in files:
        one, two, old = (load_file(root / file) for root in (tmp_path / "one", tmp_path / "two", bases / kind))
        assert all(torch.allclose(one[k], two[k], atol=1e-7, rtol=1e-6) for k in one)
        assert "vae" in file.parts or any(not torch.equal(one[k], old[k]) for k in one) or kind == "flux"
