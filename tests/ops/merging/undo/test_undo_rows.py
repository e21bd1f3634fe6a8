"""merge --undo, then unmerge: every tensor has the base's bytes again, for every family of adapter and kind of layer."""

from __future__ import annotations

import warnings
from pathlib import Path

import models
import pytest
import torch
from rows import DTYPES, Row, weights_of
from table import ROWS

from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify


def same_bytes(one: Path, two: Path) -> bool:
    """Whether two checkpoints hold the same tensors to the bit."""
    a, b = weights_of(one), weights_of(two)
    a, b = ({k: v for k, v in w.items() if "lorasurgery-undo" not in k} for w in (a, b))
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, tmp_path: Path) -> None:
    """LoRA, DoRA, LoHa, LoKr, whole differences, embeddings, convolutions, experts, single rows, norms: all come back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracles' own
        made = row.make(tmp_path, DTYPES[row.adapter], DTYPES[row.base])
    end = "" if made.base.is_dir() else ".safetensors"
    merged, back = tmp_path / f"merged{end}", tmp_path / f"back{end}"
    merge(made.base, [made.adapter], merged, weights=[row.strength], allow_loss=True, undo=True)
    assert not same_bytes(merged, made.base)
    held = verify(merged, against=made.base, adapters=[made.adapter], weights=[row.strength]).totals
    assert held["findings"] == []
    assert held["equal"] == "bits"
    report = unmerge(merged, [made.adapter], back)
    assert report.totals["exact"]
    assert same_bytes(back, made.base)
    assert verify(back, against=made.base).totals["equal"] == "bits"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_replaced_tensors_and_config_come_back(family: str, tmp_path: Path) -> None:
    """A grown vocabulary, an untied head, a saved norm, the adapter's tokenizer: files and tensors are the base's."""
    base = models.save(models.make(family), tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"old": 1}')
    kind = {"gpt2": ["c_attn"], "bert": ["query"], "t5": ["q"]}.get(family, ["q_proj"])
    saved = {"gpt2": "wte", "bert": "word_embeddings", "t5": "shared"}.get(family, "embed_tokens")
    models.peft_adapter(family, tmp_path / "adapter", r=4, target_modules=kind, modules_to_save=[saved])
    (tmp_path / "adapter/tokenizer_config.json").write_text('{"new": 1}')
    (tmp_path / "adapter/added_tokens.json").write_text("{}")
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", undo=True)
    assert (tmp_path / "merged/added_tokens.json").exists()
    unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "back")
    before, after = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in (base, tmp_path / "back"))
    after.pop("lorasurgery.json")
    assert after == before
