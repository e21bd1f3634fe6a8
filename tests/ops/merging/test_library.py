"""transformers' own renames serve as a last resort, and nothing else depends on that package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import test_families
import zoo

from lorasurgery.adapters.model_names.library import library_names
from lorasurgery.adapters.model_names.renames import FAMILIES, TO_MEMORY

# Families that the tool's own tables lack.
OTHERS = {
    "sapiens2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mistral_large4_text": ["q_proj", "o_proj", "kv_b_proj"],
}

_RUN = """
import sys
from lorasurgery.ops.merge import merge
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[5:]:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
try:
    merge(sys.argv[1], [sys.argv[2]], sys.argv[3], dry_run=sys.argv[4] == "dry")
except Exception as problem:
    print(type(problem).__name__, problem)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def run(tmp: Path, how: str, *blocked: str) -> list[str]:
    """Merge in a process of its own, in which some packages can't be imported; gives what it prints."""
    paths = [str(tmp / d) for d in ("base", "adapter", f"out-{how}")]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *paths, how, *blocked], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def files(name: str, tmp: Path, targets: list[str]) -> object:
    """A base and an adapter for it; gives the PEFT model."""
    zoo.make(name).save_pretrained(tmp / "base")
    extra = {"target_parameters": zoo.parameters(name)} if name in zoo.EXPERTS else {}
    return test_families.adapted(name, tmp / "adapter", target_modules=targets, **extra)


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_only_transformers_knows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter merges as merge_and_unload does; without the package it is an error, and nothing is written."""
    assert name not in TO_MEMORY
    assert not any(name in family.model_types for family in FAMILIES)
    monkeypatch.setitem(zoo.MAKERS, name, zoo.body(name))
    model = files(name, tmp_path, OTHERS[name])
    said = run(tmp_path, "real", "transformers")
    assert said[0].startswith("NoTensorError")
    assert "match no tensor" in said[0]
    assert not (tmp_path / "out-real").exists()
    test_families.check(name, model, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mixtral", "vit", "granitemoe", "gte"])
def test_known_families_need_no_transformers(name: str, tmp_path: Path) -> None:
    """With the package blocked they merge, and a plan imports neither it nor torch."""
    files(name, tmp_path, ["q_proj", "v_proj"])
    assert run(tmp_path, "dry", "transformers", "torch") == ["False False"]
    assert run(tmp_path, "dry") == ["False False"]
    assert run(tmp_path, "real", "transformers") == ["True False"]
    assert (tmp_path / "out-real/model.safetensors").exists()


def test_names_are_only_proposed() -> None:
    """The table leads from names in memory to those on disk; without a known type there is none."""
    config = {"model_type": "sapiens2", "architectures": ["Sapiens2Model"]}
    assert library_names(["blocks.0.attn.wq.weight"], config) == {
        "model.layer.0.attention.q_proj.weight": ["blocks.0.attn.wq.weight"]
    }
    assert library_names(["blocks.0.attn.wq.weight"], {"model_type": "nobody's"}) == {}
    assert library_names(["blocks.0.attn.wq.weight"], {}) == {}
