"""Adapter names that match nothing end in one line that counts and names them; the base is never written as merged."""

from __future__ import annotations

import json
import string
from pathlib import Path

import models
import pytest
import torch
import zoo
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasurgery.cli.main import main
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.merge import merge

WEIGHTS = "adapter_model.safetensors"
MODULES = ["q_proj", "v_proj", "up_proj", "lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/: a tiny llama with every kind of module adapted and one stored whole."""
    tmp = tmp_path_factory.mktemp("unmatched")
    models.save(models.make("llama"), tmp / "base")
    models.peft_adapter("llama", tmp / "adapter", r=2, target_modules=MODULES, modules_to_save=["norm"])
    return tmp


def rewritten(files: Path, out: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The adapter with other tensors."""
    out.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in weights.items()}, out / WEIGHTS)
    (out / "adapter_config.json").write_text((files / "adapter/adapter_config.json").read_text())
    return out


def refused(base: Path, adapter: Path, out: Path) -> str:
    """The one line that the command line ends with; exit 1 and nothing written."""
    done = CliRunner().invoke(main, ["merge", str(base), str(adapter), "-o", str(out)])
    assert done.exit_code == 1, done.output
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def mutations(key: str) -> st.SearchStrategy[str]:
    """The key with one character dropped, doubled, swapped or replaced, another prefix, or a number out of range."""
    head, _, tail = key.partition(".lora_")
    if not tail:
        head, _, tail = key.rpartition(".")
    at = st.integers(0, len(head) - 2)
    letters = st.sampled_from(string.ascii_lowercase)
    changed = st.one_of(
        at.map(lambda i: head[:i] + head[i + 1 :]),
        at.map(lambda i: head[: i + 1] + head[i:]),
        at.map(lambda i: head[:i] + head[i + 1] + head[i] + head[i + 2 :]),
        st.tuples(at, letters).map(lambda t: head[: t[0]] + t[1] + head[t[0] + 1 :]),
        st.sampled_from(["base_model.", "base_model.model.modle.", "xmodel.", "unet.", "text_encoder."]).map(
            lambda p: head.replace("base_model.model.", p, 1)
        ),
        st.integers(2, 99).map(
            lambda n: head.replace(".layers.0.", f".layers.{n}.").replace(".layers.1.", f".layers.{n}.")
        ),
    )
    rest = (".lora_" if ".lora_" in key else ".") + tail
    return changed.map(lambda h: h + rest)


@given(data=st.data())
def test_a_changed_name_is_never_passed_over(files: Path, data: st.DataObject) -> None:
    """Both factors of one module renamed alike: an error, or the same merged model (a prefix that may be missing)."""
    weights = load_file(files / "adapter" / WEIGHTS)
    module = data.draw(st.sampled_from(sorted({k.partition(".lora_")[0] for k in weights})))
    mine = [k for k in weights if k.partition(".lora_")[0] == module]
    first = data.draw(mutations(mine[0]))
    renamed = first.partition(".lora_")[0]
    if renamed == module or any(k.partition(".lora_")[0] == renamed for k in weights):
        return
    changed = {(renamed + k[len(module) :] if k in mine else k): t for k, t in weights.items()}
    out = files / "merged"
    adapter = rewritten(files, files / "changed", changed)
    try:
        merge(files / "base", [adapter], out, overwrite=True)
    except SurgeryError as problem:
        assert "\n" not in str(problem)
    else:
        merge(files / "base", [files / "adapter"], files / "right", overwrite=True)
        found, right = (load_file(p / "model.safetensors") for p in (out, files / "right"))
        assert set(found) == set(right)
        assert all(torch.equal(found[k], right[k]) for k in right), (module, renamed)


@given(data=st.data())
def test_one_factor_renamed(files: Path, data: st.DataObject) -> None:
    """A factor without its partner is an incomplete adapter."""
    weights = load_file(files / "adapter" / WEIGHTS)
    key = data.draw(st.sampled_from(sorted(k for k in weights if ".lora_" in k)))
    changed = data.draw(mutations(key))
    if changed in weights or changed.partition(".lora_")[0].removeprefix("base_model.model.") == (
        key.partition(".lora_")[0].removeprefix("base_model.model.")
    ):
        return
    adapter = rewritten(files, files / "one", {(changed if k == key else k): t for k, t in weights.items()})
    with pytest.raises(SurgeryError, match=r"lora_(embedding_)?[AB] is missing; the adapter is incomplete"):
        merge(files / "base", [adapter], files / "no")
    assert not (files / "no").exists()


def test_half_of_the_modules_renamed(files: Path, tmp_path: Path) -> None:
    """The line says how many of how many, the first few, and the nearest names."""
    weights = load_file(files / "adapter" / WEIGHTS)
    changed = {k.replace("layers.1", "layers.7"): t for k, t in weights.items()}
    line = refused(files / "base", rewritten(files, tmp_path / "a", changed), tmp_path / "out")
    assert "5 of 13 modules match no tensor" in line
    assert "model.layers.7.post_attention_layernorm.weight, model.layers.7.mlp.up_proj …;" in line
    assert "nearest: model.layers." in line


def test_a_misspelt_prefix(files: Path, tmp_path: Path) -> None:
    """Every module is counted."""
    weights = load_file(files / "adapter" / WEIGHTS)
    changed = {k.replace("base_model.model.model", "base_model.model.modle"): t for k, t in weights.items()}
    line = refused(files / "base", rewritten(files, tmp_path / "a", changed), tmp_path / "out")
    assert "12 of 13 modules match no tensor" in line
    assert "modle.layers.0.input_layernorm" in line
    assert " …;" in line


def test_a_saved_module_that_the_base_has_elsewhere(files: Path, tmp_path: Path) -> None:
    """A norm under another path is no new module: it is refused, not written beside the base's own."""
    weights = load_file(files / "adapter" / WEIGHTS)
    changed = {k.replace("model.model.norm", "model.modle.norm"): t for k, t in weights.items()}
    assert set(changed) != set(weights)
    line = refused(files / "base", rewritten(files, tmp_path / "a", changed), tmp_path / "out")
    assert "1 of 13 modules matches no tensor" in line
    assert "modle.norm.weight" in line


def test_another_width(files: Path, tmp_path: Path) -> None:
    """The same names in another width: the shapes are told."""
    (tmp_path / "adapter").mkdir()
    wide = {k: torch.cat([t, t], -1 if "lora_A" in k else 0) for k, t in load_file(files / "adapter" / WEIGHTS).items()
            if ".q_proj." in k}  # fmt: skip
    line = refused(files / "base", rewritten(files, tmp_path / "a", wide), tmp_path / "out")
    assert "q_proj" in line
    assert "64×64" in line
    assert "32×32" in line


@pytest.mark.parametrize("other", ["gpt2", "bert", "t5", "opt"])
def test_another_family(other: str, files: Path, tmp_path: Path) -> None:
    """An adapter of another architecture says what it looks for."""
    base = models.save(models.make(other), tmp_path / "base")
    line = refused(base, files / "adapter", tmp_path / "out")
    assert "no tensor" in line or "×" in line


def test_experts_of_another_family(tmp_path: Path) -> None:
    """Fused experts that the base lacks are counted among the modules."""
    zoo.make("mistral").save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter"
    path.mkdir()
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    save_file({f"{stem}A.weight": torch.ones(8, 32), f"{stem}B.weight": torch.ones(48, 8)}, path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    line = refused(tmp_path / "base", path, tmp_path / "out")
    assert "1 of 1 modules matches no tensor" in line
    assert "mlp.experts.gate_up_proj" in line
