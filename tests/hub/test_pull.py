"""References against a Hub on loopback, through an unmodified huggingface_hub: what is fetched, and what is said."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hub_client import Client
from local_hub import LocalHub
from safetensors.torch import load_file, save_file


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def world(hub: LocalHub, tmp_path: Path) -> Path:
    """A base in shards, a tuned model and an adapter, here and on the Hub; the base's repository holds a pickle too."""
    models.make("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    models.save(models.perturb(models.make("llama")), tmp_path / "tuned")
    models.peft_adapter("llama", tmp_path / "adapter", r=4, target_modules=["q_proj", "up_proj"])
    (tmp_path / "adapter/README.md").unlink()  # PEFT's, which names a base that the Hub refuses
    (tmp_path / "base/README.md").write_text("---\nlicense: mit\n---\n# base\n")
    hub.fill("me/base", contents(tmp_path / "base") | {"pytorch_model.bin": b"\x80\x02never", "runs/log": b"x"})
    hub.fill("me/tuned", contents(tmp_path / "tuned"), private=True)
    hub.fill("me/adapter", contents(tmp_path / "adapter"))
    return tmp_path


def report(client: Client, *words: str | Path, **variables: str) -> dict[str, Any]:
    done = client.cli(*words, "--json", **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def line(client: Client, *words: str | Path, token: str | None = None, **variables: str) -> str:
    """The one line that a failing command ends in."""
    done = client.cli(*words, token=token, **variables)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert "hf_local" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def asked(hub: LocalHub, since: int) -> list[str]:
    """The files whose bytes were sent, once redirects are followed."""
    return [r.path.rpartition("/")[2] for r in hub.log[since:] if r.method == "GET" and "/resolve/" in r.path]


def test_the_same_bytes_as_from_local_paths(hub: LocalHub, client: Client, world: Path) -> None:
    """extract and merge from org/name@revision write what they write from the same files here."""
    sha = hub.commits("me/tuned")[0].id
    far = report(client, "extract", "me/base", f"me/tuned@{sha}", "-o", world / "far", "--rank", "4")
    report(client, "extract", world / "base", world / "tuned", "-o", world / "near", "--rank", "4")
    weights = "adapter_model.safetensors"
    assert (world / "far" / weights).read_bytes() == (world / "near" / weights).read_bytes()
    assert far["inputs"] == ["me/base", f"me/tuned@{sha}"]
    report(client, "merge", "me/base", "me/adapter@main", "-o", world / "far-merged")
    report(client, "merge", world / "base", world / "adapter", "-o", world / "near-merged")
    far_files, near_files = contents(world / "far-merged"), contents(world / "near-merged")
    assert {n: b for n, b in far_files.items() if n != "lorasurgery.json"} == {
        n: b for n, b in near_files.items() if n != "lorasurgery.json"
    }


def test_the_config_and_the_record_name_the_repository(hub: LocalHub, client: Client, world: Path) -> None:
    """adapter_config.json names the base on the Hub at its commit; the record has revisions, licence and true hashes."""
    from hashlib import sha256

    report(client, "extract", "me/base", "me/tuned", "-o", world / "a", "--rank", "2")
    config = json.loads((world / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert config["revision"] == hub.commits("me/base")[0].id
    record = json.loads((world / "a/lorasurgery.json").read_text())
    base, tuned = record["sources"]
    assert (base["name"], base["revision"], base["license"]) == ("me/base", config["revision"], "mit")
    assert tuned["revision"] == hub.commits("me/tuned")[0].id
    for source, folder in ((base, "base"), (tuned, "tuned")):
        hashes = {f["name"]: f["sha256"] for f in source["files"]}
        assert hashes == {f.name: sha256(f.read_bytes()).hexdigest() for f in (world / folder).glob("*.safetensors")}
    assert str(world) not in (world / "a/lorasurgery.json").read_text()


def test_only_what_is_needed_is_fetched(hub: LocalHub, client: Client, world: Path) -> None:
    """Weights, index, configs and tokenizer; never a pickle, nothing that is not part of the model; and only once."""
    since = len(hub.log)
    report(client, "merge", "me/base", "me/adapter", "-o", world / "m")
    names = asked(hub, since)
    assert not {"pytorch_model.bin", "log"} & set(names)
    assert {"model.safetensors.index.json", "config.json", "adapter_config.json"} <= set(names)
    since = len(hub.log)
    report(client, "merge", "me/base", "me/adapter", "-o", world / "m", "--overwrite")
    assert not any(name.endswith(".safetensors") for name in asked(hub, since))


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "me/base", "--rank", "4"],
        ["inspect", "me/base"],
        ["inspect", "me/adapter", "--base", "me/base"],
        ["check", "me/adapter", "--base", "me/base"],
        ["merge", "me/base", "me/adapter", "-o", "OUT", "--dry-run"],
        ["extract", "me/base", "me/tuned", "-o", "OUT", "--dry-run"],
        ["rerank", "me/adapter", "-o", "OUT", "--rank", "2", "--dry-run"],
        ["blend", "me/adapter", "me/adapter", "-o", "OUT", "--dry-run"],
        ["convert", "me/adapter", "-o", "OUT", "--to", "peft", "--portable", "--dry-run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_plans_fetch_headers_alone(hub: LocalHub, client: Client, world: Path, words: list[str]) -> None:
    """What reads only headers asks weight files for ranges, never for a whole one, and says what it says of local files."""
    grow(hub, world)
    since = len(hub.log)
    far = report(client, *(str(world / "out") if w == "OUT" else w for w in words))
    near = report(client, *(str(world / {"OUT": "out"}.get(w, w[3:])) if w[:3] in ("me/", "OUT") else w for w in words))
    assert far["totals"] == near["totals"]
    assert far["modules"] == near["modules"]
    sent = [r for r in hub.log[since:] if r.method == "GET" and "/cdn/" in r.path]
    assert sent
    assert all(r.range == "bytes=0-131071" or r.sent_bytes < 131072 for r in sent)
    if "me/base" in words:
        assert sum(r.sent_bytes for r in sent) < 0.2 * sum(f.stat().st_size for f in world.glob("base/*.safetensors"))
    assert not {"tokenizer.json", "vocab.json"} & set(asked(hub, since))
    assert not (world / "out").exists()


def grow(hub: LocalHub, world: Path) -> None:
    """Give each checkpoint a matrix of 4 MB, beside which a header is nothing."""
    for name in ("base", "tuned"):
        file = sorted((world / name).glob("*.safetensors"))[-1]
        save_file(load_file(file) | {"model.extra.weight": torch.ones(1024, 1024)}, file, {"format": "pt"})
        (world / name / "tokenizer.json").write_text("{}")
        hub.fill(f"me/{name}", contents(world / name), private=name == "tuned")


def test_alphas_of_a_remote_file_are_read(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """kohya's alphas lie in the tensors, so a plan fetches them too; the factors stay where they are."""
    tensors: dict[str, torch.Tensor] = {}
    for block in range(3):
        stem = f"lora_unet_down_blocks_{block}_attentions_0_proj_in"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, 60_000)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(64, 4)
        tensors[f"{stem}.alpha"] = torch.tensor(float(block + 1))
    save_file(tensors, tmp_path / "style.safetensors")
    hub.fill("me/styles", {"style.safetensors": (tmp_path / "style.safetensors").read_bytes(), "b.safetensors": b"x"})
    since = len(hub.log)
    found = report(client, "inspect", "hf://me/styles@main/style.safetensors")
    assert [m["alpha"] for m in found["modules"]] == [1.0, 2.0, 3.0]
    sent = sum(r.sent_bytes for r in hub.log[since:] if "/cdn/" in r.path)
    assert sent < (tmp_path / "style.safetensors").stat().st_size / 4
    assert "hf://me/styles/b.safetensors" in line(client, "inspect", "me/styles", "--spectrum")
    spectrum = report(client, "inspect", "hf://me/styles/style.safetensors", "--spectrum")
    assert all(m["delta_norm"] > 0 for m in spectrum["modules"])


def test_an_existing_path_wins(hub: LocalHub, client: Client, world: Path) -> None:
    """A folder that is called like a repository is taken, and nothing is asked of the Hub."""
    models.peft_adapter("llama", world / "me/adapter", r=2, target_modules=["v_proj"])
    since = len(hub.log)
    code = "import os, sys, json; os.chdir(sys.argv[1]); from lorasurgery.ops.inspect import inspect; answer = "
    assert client.python(code + "inspect('me/adapter').totals['rank_max']", world) == 2
    assert len(hub.log) == since


def test_offline_takes_the_cache(hub: LocalHub, client: Client, world: Path) -> None:
    """What was fetched once works with HF_HUB_OFFLINE and when nobody answers; what was not is one clear line."""
    report(client, "merge", "me/base", "me/adapter", "-o", world / "m")
    since = len(hub.log)
    report(client, "merge", "me/base", "me/adapter", "-o", world / "n", HF_HUB_OFFLINE="1")
    assert contents(world / "m") == contents(world / "n")
    assert "HF_HUB_OFFLINE is set" in line(client, "inspect", "me/tuned", HF_HUB_OFFLINE="1")
    assert len(hub.log) == since
    hub.stop()
    report(client, "inspect", "me/adapter", "--base", "me/base")
    assert "the Hub can't be reached" in line(client, "inspect", "me/tuned")


def test_failures_are_one_line(hub: LocalHub, client: Client, world: Path) -> None:
    """Missing, private, gated, no such revision, wrong token, no safetensors: what it is, and the next move."""
    hub.fill("me/gated", contents(world / "adapter"))
    hub.fill("me/pickles", {"pytorch_model.bin": b"\x80\x02x", "config.json": b"{}"})
    hub.fill("me/prose", {"README.md": b"# hi"})
    missing = line(client, "inspect", "me/nothing")
    assert missing.startswith("lorasurgery: me/nothing: is neither a file nor a folder here nor a repository")
    assert "log in" in line(client, "inspect", "me/tuned", token="")
    assert "does not accept this token" in line(client, "inspect", "me/adapter", token="hf_wrong")
    assert "has no revision v9" in line(client, "merge", "me/base@v9", "me/adapter", "-o", world / "m")
    for command in (["inspect", "me/gated"], ["inspect", "me/gated", "--spectrum"]):
        assert "ask for access at" in line(client, *command, token="hf_other")
    assert "pickle" in line(client, "plan", "me/pickles")
    assert "no safetensors files here" in line(client, "plan", "me/prose")
    assert not (world / "m").exists()


def test_a_broken_file_is_named_by_its_reference(hub: LocalHub, client: Client, world: Path) -> None:
    """A header that lies is told with the repository's name, not with a path of the cache."""
    raw = (world / "adapter/adapter_model.safetensors").read_bytes()
    hub.fill("me/cut", contents(world / "adapter") | {"adapter_model.safetensors": raw[:-100]})
    for command in (["inspect", "me/cut"], ["inspect", "me/cut", "--spectrum"]):
        says = line(client, *command)
        assert says.startswith("lorasurgery: me/cut")
        assert "cut short" in says


def test_progress_of_a_download(hub: LocalHub, client: Client, world: Path) -> None:
    """Plain lines off a terminal tell what is being fetched; -q and --json are silent."""
    loud = client.cli("merge", "me/base", "me/adapter", "-o", world / "m")
    assert "(fetching me/base)" in loud.stderr
    assert loud.returncode == 0
    quiet = Client(hub, world / "another-home").cli("merge", "me/base", "me/adapter", "-o", world / "q", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_stub_is_never_read_as_weights(tmp_path: Path) -> None:
    """A hole reads as zeros, so tensors that were not fetched are refused by name."""
    from lorasurgery.checkpoint.header_only import write_stub
    from lorasurgery.checkpoint.reader import Checkpoint
    from lorasurgery.errors import FormatError

    save_file({"w": torch.ones(4, 4), "w.alpha": torch.tensor(3.0)}, tmp_path / "whole.safetensors")
    raw = (tmp_path / "whole.safetensors").read_bytes()
    start = raw[: 8 + struct.unpack("<Q", raw[:8])[0]]
    info = Checkpoint.open(tmp_path / "whole.safetensors").tensors["w.alpha"]
    write_stub(tmp_path / "s/w.safetensors", start, len(raw), {"w.alpha": (info.start, raw[info.start : info.end])})
    stub = Checkpoint.open(tmp_path / "s/w.safetensors")
    assert stub.number("w.alpha") == 3.0
    with pytest.raises(FormatError, match="only the header of this file was fetched"):
        stub.read("w")


def test_nn_loads_from_the_hub(hub: LocalHub, client: Client, world: Path) -> None:
    """PeftModel and lorasurgery.nn give the same outputs for an adapter that extract made, loaded from the Hub."""
    report(client, "extract", "me/base", "me/tuned", "-o", world / "a", "--rank", "4", "--push", "me/made")
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import lorasurgery.nn as nn
torch.manual_seed(0)
ids = torch.randint(0, 30, (2, 7))
load = lambda: AutoModelForCausalLM.from_pretrained("me/base").eval()
with torch.no_grad():
    plain = load()(ids).logits
    theirs = PeftModel.from_pretrained(load(), "me/made").eval()(ids).logits
    ours = nn.load_adapter(load(), "me/made").eval()(ids).logits
answer = [float((ours - theirs).abs().max()), float((theirs - plain).abs().max())]
"""
    gap, moved = client.python(code)
    assert gap < 1e-5 < 1e-3 < moved
    assert load_file(world / "a/adapter_model.safetensors")
