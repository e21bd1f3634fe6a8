"""push and --push against a Hub on loopback: one commit, whole or not at all, resumable, with a card that is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from hub_client import Client
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from test_pull import contents, line, report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, and what the operations make of them, for all tests of this file to read."""
    from lorasurgery.linalg.rank import RankChoice
    from lorasurgery.ops.extract import ExtractOptions, extract
    from lorasurgery.ops.merge import merge

    root = tmp_path_factory.mktemp("made")
    models.make("llama").save_pretrained(root / "base", max_shard_size="20KB")
    (root / "base/README.md").write_text("---\nlicense: mit\n---\n# base\n")
    models.save(models.perturb(models.make("llama")), root / "tuned")
    extract(root / "base", root / "tuned", root / "adapter", ExtractOptions(RankChoice(rank=4)))
    merge(root / "base", [root / "adapter"], root / "merged", max_shard_size=30_000)
    return root


def card(hub: LocalHub, repo: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a repository's model card."""
    found = hub.files(repo)["README.md"]
    text = found.decode() if isinstance(found, bytes) else found.read_text()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def bytes_of(hub: LocalHub, repo: str, rev: str = "main") -> dict[str, bytes]:
    found = hub.files(repo, rev)
    return {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in found.items()}


def test_an_adapter_is_published_in_one_commit(hub: LocalHub, client: Client, made: Path) -> None:
    """The repository is made, all files come in one commit, the URL is told, and pulling gives the same bytes."""
    done = report(client, "push", made / "adapter", "me/adapter")
    assert done["output"] == f"{hub.url}/me/adapter"
    assert hub.commits("me/adapter")[0].title == "Upload adapter with lorasurgery"
    assert len(hub.commits("me/adapter")) == 2  # the first is the repository's own
    there = bytes_of(hub, "me/adapter")
    assert {n: b for n, b in there.items() if n not in (".gitattributes", "README.md", "spectrum.png")} == contents(
        made / "adapter"
    )
    assert there["spectrum.png"].startswith(b"\x89PNG")
    assert done["pushed"]["commit"] == hub.commits("me/adapter")[0].id
    loud = client.cli("push", made / "adapter", "me/again")
    assert f"{hub.url}/me/again" in loud.stdout


def test_private_and_its_dangers(hub: LocalHub, client: Client, made: Path) -> None:
    """--private makes the repository private; one that is public already is refused before a byte is sent."""
    report(client, "push", made / "adapter", "me/secret", "--private")
    assert "log in" in line(client, "inspect", "me/secret", token="")
    report(client, "push", made / "adapter", "me/open")
    since = len(hub.log)
    says = line(client, "push", made / "merged", "me/open", "--private")
    assert "exists and is public" in says
    assert "repeat" not in says  # it would be refused again
    assert not any(r.method == "PUT" for r in hub.log[since:])


def test_branches_messages_and_pull_requests(hub: LocalHub, client: Client, made: Path) -> None:
    """--revision makes and fills a branch, --create-pr opens a pull request, -m is the commit's message."""
    report(client, "push", made / "adapter", "me/a")
    main = hub.commits("me/a")[0].id
    done = report(client, "push", made / "merged", "me/a", "--revision", "v2", "-m", "rank 4")
    assert done["output"].endswith("/me/a/tree/v2")
    assert hub.commits("me/a", "v2")[0].title == "rank 4"
    assert "model.safetensors.index.json" in hub.files("me/a", "v2")
    pull = report(client, "push", made / "merged", "me/a", "--create-pr")
    assert "/me/a/discussions/" in pull["pushed"]["pull_request"]
    assert hub.commits("me/a")[0].id == main
    both = client.cli("push", made / "merged", "me/a", "--create-pr", "--revision", "v2")
    assert both.returncode == 2
    assert "--create-pr: a pull request goes to main; leave --revision out" in both.stderr


def test_a_server_that_dies_halfway(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """Nothing is published, the line says how to repeat the upload, and the repetition sends only what is missing."""
    base = models.make("llama")
    for name in "abcdefghijkl":  # more shards than a client sends at once: some arrive whole, whatever the order
        base.register_buffer(f"buffer_{name}", torch.randn(100_000))
    base.save_pretrained(tmp_path / "model", max_shard_size="400KB")
    report(client, "push", tmp_path / "model", "me/first")  # an upload that goes well
    whole = sum(r.received_bytes for r in hub.log if r.method == "PUT")
    before = contents(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        save_file({n: t + 1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    changed = contents(tmp_path / "model")
    hub.fail_after(int(0.7 * whole))
    says = line(client, "push", tmp_path / "model", "me/second")
    assert "nothing was published" in says
    assert f"`lorasurgery push {tmp_path}/model me/second`" in says
    assert contents(tmp_path / "model") == changed != before
    hub.recover()
    assert not {n for n in hub.files("me/second") if n.endswith(".safetensors")} if hub.commits("me/second") else True
    shards = [data for name, data in changed.items() if name.endswith(".safetensors")]
    missing = sum(len(data) for data in shards if hashlib.sha256(data).hexdigest() not in hub.objects())
    since = len(hub.log)
    report(client, "push", tmp_path / "model", "me/second")
    again = sum(r.received_bytes for r in hub.log[since:] if r.method == "PUT")
    assert 0 < again == missing < whole
    there = bytes_of(hub, "me/second")
    assert {n: there[n] for n in changed} == changed
    since = len(hub.log)
    told = report(client, "push", tmp_path / "model", "me/second")  # nothing is new
    assert told["pushed"]["files"] == 0
    assert "nothing was sent" in told["summary"]
    assert not any(r.method == "PUT" for r in hub.log[since:])


def test_a_failed_upload_leaves_the_result(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """extract --push whose upload fails ends in status 1 with the adapter whole here, and still reports its work."""
    hub.fail_after(1)
    words = ["extract", made / "base", made / "tuned", "-o", tmp_path / "a", "--rank", "4"]
    done = client.cli(*words, "--push", "me/a", "--json")
    assert done.returncode == 1
    assert "me/a" in done.stderr
    told = json.loads(done.stdout)
    assert "repeat the upload alone" in told["error"]
    assert told["totals"]["modules"] > 0
    assert {n: len(b) for n, b in contents(tmp_path / "a").items() if n != "lorasurgery.json"} == {
        n: len(b) for n, b in contents(made / "adapter").items() if n != "lorasurgery.json"
    }
    hub.recover()
    report(client, "push", tmp_path / "a", "me/a")
    assert card(hub, "me/a")[0]["library_name"] == "peft"


def test_no_token_is_found_out_before_the_work(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """A missing or wrong token and a name that is none stop the command before anything is computed or made."""
    words = ["extract", made / "base", made / "tuned", "-o", tmp_path / "a", "--push"]
    assert "HF_TOKEN" in line(client, *words, "me/a", token="")
    assert "does not accept this token" in line(client, *words, "me/a", token="hf_wrong")
    refused = client.cli(*words, "not-a-repo")
    assert refused.returncode == 2
    assert "not-a-repo: expected a repository on the Hub as org/name" in refused.stderr
    assert "may not" in line(client, "push", made / "adapter", "you/not-mine")
    assert not (tmp_path / "a").exists()
    assert "HF_HUB_OFFLINE" in line(client, *words, "me/a", HF_HUB_OFFLINE="1")


def test_push_on_every_command_that_writes(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """--push publishes what merge, unmerge, rerank, blend and convert wrote, with a card of its kind."""
    adapter, base = made / "adapter", made / "base"
    for words, library in (
        (["merge", base, adapter, "-o", tmp_path / "m"], "transformers"),
        (["unmerge", made / "merged", adapter, "--base", base, "-o", tmp_path / "u"], "transformers"),
        (["rerank", adapter, "--rank", "2", "-o", tmp_path / "r"], "peft"),
        (["blend", adapter, adapter, "-w", "0.5", "-w", "-1", "-o", tmp_path / "b"], "peft"),
        (["convert", adapter, "--to", "peft", "-o", tmp_path / "c"], "peft"),
    ):
        told = report(client, *words, "--push", f"me/{words[0]}")
        assert told["pushed"]["url"] == f"{hub.url}/me/{words[0]}"
        metadata, body = card(hub, f"me/{words[0]}")
        assert metadata["library_name"] == library
        assert metadata["license"] == "mit" if words[0] in ("merge", "unmerge") else True
        assert f"lorasurgery {words[0]}" in body


def test_the_card(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """Metadata that the Hub accepts; command, inputs with revisions and hashes, modules with errors, how to load it."""
    hub.fill("me/base", contents(made / "base"))
    hub.fill("me/tuned", contents(made / "tuned"))
    told = report(client, "extract", "me/base", "me/tuned", "-o", tmp_path / "a", "--rank", "4", "--push", "me/a")
    metadata, body = card(hub, "me/a")
    assert metadata["base_model"] == "me/base"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"lora", "lorasurgery"} <= set(metadata["tags"])
    assert "lorasurgery extract me/base me/tuned --rank 4 -o OUT" in body
    assert hub.commits("me/base")[0].id in body
    for source in told["sources"]:
        assert all(f["sha256"] in body for f in source["files"])
    assert "<details><summary>" in body
    assert all(f"| {m['name']} |" in body and f"{m['error']:.2%}" in body for m in told["modules"])
    assert 'PeftModel.from_pretrained(model, "me/a")' in body
    assert "vllm serve me/base" in body or "vllm serve merged" in body
    assert "(spectrum.png)" in body
    assert str(tmp_path) not in body
    assert str(made) not in body


def test_a_card_is_kept(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """README.md of the repository stays, and so does one in the folder, unless --overwrite-card."""
    import shutil

    folder = shutil.copytree(made / "adapter", tmp_path / "a")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    assert report(client, "push", folder, "me/a")["pushed"]["card"] == "written"
    assert "my own words" in card(hub, "me/a")[1]
    (folder / "README.md").write_text("other words\n")
    told = report(client, "push", folder, "me/a")
    assert told["pushed"]["card"] == "kept"
    assert "--overwrite-card" in told["summary"]
    assert "my own words" in card(hub, "me/a")[1]
    report(client, "push", folder, "me/a", "--overwrite-card")
    assert "Use with PEFT" in card(hub, "me/a")[1]
    assert (folder / "README.md").read_text() == "other words\n"


def test_a_card_that_the_hub_refuses(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """PEFT's own README names a local base: the Hub refuses it, the line says so, and nothing is published."""
    models.peft_adapter("llama", tmp_path / "a", r=2, target_modules=["q_proj"])
    says = line(client, "push", tmp_path / "a", "me/a")
    assert "base_model" in says
    assert "nothing was published" in says
    report(client, "push", tmp_path / "a", "me/a", "--overwrite-card")
    assert "base_model" not in card(hub, "me/a")[0]


def test_only_what_belongs_is_published(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """Pickles, hidden files and a trainer's sub-folders stay here and are named; links out of the folder are refused."""
    import shutil

    folder = shutil.copytree(made / "adapter", tmp_path / "a")
    (folder / "training_args.bin").write_bytes(b"\x80\x02")
    (folder / ".env").write_text("SECRET=1")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    shutil.copytree(made / "adapter", folder / "checkpoint-5")
    told = report(client, "push", folder, "me/a")
    names = set(hub.files("me/a"))
    assert "1_Pooling/config.json" in names
    assert not {n for n in names if n.startswith(("checkpoint", ".env", "training"))}
    assert "training_args.bin" in told["warnings"][0].partition(",")[0]
    (tmp_path / "secret.json").write_text("{}")
    (folder / "extra.json").symlink_to(tmp_path / "secret.json")
    assert "leads out of the folder" in line(client, "push", folder, "me/a")


def test_what_is_not_whole_is_not_published(hub: LocalHub, client: Client, made: Path, tmp_path: Path) -> None:
    """Missing shards, files cut short, adapters without weights, remains of a run: refused before the Hub is asked."""
    import shutil

    cut = shutil.copytree(made / "adapter", tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    bare = shutil.copytree(made / "adapter", tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    gone = shutil.copytree(made / "merged", tmp_path / "gone")
    next(gone.glob("model-00002*")).unlink()
    half = shutil.copytree(made / "merged", tmp_path / "half")
    (half / ".model.safetensors.lorasurgery-partial").write_bytes(b"")
    for folder, says in ((cut, "cut short"), (bare, "adapter_model"), (gone, "is missing"), (half, "interrupted run"),
                         (tmp_path / "none", "neither a file nor a folder")):  # fmt: skip
        found = line(client, "push", folder, "me/x")
        assert says in found
    assert not any("/repos/create" in r.path for r in hub.log)


def test_old_shards_are_deleted(hub: LocalHub, client: Client, made: Path) -> None:
    """A model in shards over a model in one file: the old file would be read first, so the same commit deletes it."""
    report(client, "push", made / "tuned", "me/m")
    assert "model.safetensors" in hub.files("me/m")
    told = report(client, "push", made / "merged", "me/m")
    assert told["pushed"]["deleted"] == ["model.safetensors"]
    assert "model.safetensors" not in hub.files("me/m")
    told = report(client, "push", made / "tuned", "me/m")
    assert "model.safetensors.index.json" in told["pushed"]["deleted"]


def test_a_dry_run_asks_nobody(hub: LocalHub, client: Client, made: Path) -> None:
    """push --dry-run checks the folder and says what would be sent, without a token."""
    told = report(client, "push", made / "adapter", "me/a", "--dry-run", HF_TOKEN="", HF_HUB_OFFLINE="1")
    assert told["totals"]["files"] == ["adapter_config.json", "adapter_model.safetensors", "lorasurgery.json"]
    assert not hub.log
