"""What a server says of itself: its commit and its files' names become paths here, and are checked before they do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trust_world import INDEX, SHARD, checkpoint

from lorasurgery.errors import FormatError, SurgeryError, UsageError
from lorasurgery.hub import pull
from lorasurgery.hub.reference import Reference, cached_reference, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "model-00002-of-00002.safetensors"
GOOD = ["config.json", INDEX, SHARD, OTHER]
VERBS: dict[str, Callable[[Path], Path]] = {
    "whole": lambda place: pull.fetch(Reference("me/ck")),
    "headers": lambda place: pull.fetch_headers(Reference("me/ck"), place),
}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let a server say what it likes; returns the names that are asked for afterwards."""

    def begin(sha: Any = COMMIT, names: Sequence[str] = (), folder: str = COMMIT) -> list[str]:
        snapshot = checkpoint(tmp_path / "cache" / "snapshots" / folder)
        info = SimpleNamespace(sha=sha, siblings=[SimpleNamespace(rfilename=n) for n in (*GOOD, *names)])
        monkeypatch.setattr(pull, "api", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
        asked: list[str] = []

        def download(*_: Any, allow_patterns: Sequence[str], **__: Any) -> str:
            asked.extend(allow_patterns)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr(pull, "_keep_branch", lambda *_: None)
        return asked

    return begin


def here(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "sha", [None, "", "main", "../../evil", "/evil", COMMIT[:-1], COMMIT + "0", COMMIT.upper(), COMMIT + "\n", "..\\x",
            f"../{COMMIT[3:]}"],
)  # fmt: skip
def test_a_commit_is_forty_digits(sha: Any, verb: str, serve: Callable[..., list[str]], tmp_path: Path) -> None:
    """Anything else is refused before it names a folder."""
    asked, before = serve(sha), here(tmp_path)
    with pytest.raises(FormatError, match=r"^me/ck: the Hub names .* as the commit, which is not 40 hex digits$"):
        VERBS[verb](tmp_path / "scratch")
    assert asked == []
    assert here(tmp_path) == before


@pytest.mark.parametrize("verb", VERBS)
def test_names_that_lead_out_are_not_asked_for(verb: str, serve: Callable[..., list[str]], tmp_path: Path) -> None:
    """They are as good as not there: neither fetched nor laid out."""
    evil = ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", "./x.json", "a//x.json",
            "", "x\x00.json", "\ud800.json", "../config.json", f"../{INDEX}", "n" * 300 + ".txt"]  # fmt: skip
    asked, before = serve(names=evil), here(tmp_path)
    found = VERBS[verb](tmp_path / "scratch")
    assert set(asked) <= set(GOOD)
    assert found.name == COMMIT
    new = here(tmp_path) - before
    assert all(n == "scratch" or n.startswith("scratch/") for n in new)
    assert not [n for n in new if "evil" in n]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("names", [["a", "a/b.txt"], ["b/c.txt", "b"]], ids=["a", "b"])
def test_names_that_can_be_no_files(
    names: list[str], verb: str, serve: Callable[..., list[str]], tmp_path: Path
) -> None:
    """One line, and no traceback, where a name is that of a file and of a folder."""
    serve(names=names)
    with pytest.raises(FormatError, match=r"^me/ck: .* can't be a file here \("):
        VERBS[verb](tmp_path / "scratch")


def test_a_client_that_brings_another_commit(serve: Callable[..., list[str]], tmp_path: Path) -> None:
    """What was asked for by its commit is what comes, or nothing is read of it."""
    serve(folder="f" * 40)
    with pytest.raises(FormatError, match=rf"the Hub gave another commit for {COMMIT}"):
        pull.fetch(Reference("me/ck"))


@pytest.mark.parametrize(
    "text", ["me/ck@..", "hf://me/ck@..", "hf://me/ck/../../x", "hf://me/ck//x", "hf://me/ck/./x", "hf://me/ck@a\\..\\x",
             "me/ck@C:x", "hf://me/ck@main/a/../b"],
)  # fmt: skip
def test_references_that_lead_out(text: str) -> None:
    """A revision and a path in a repository become paths in the cache too."""
    with pytest.raises(UsageError, match=r"is neither a revision nor a path in a repository|expected hf://"):
        parse_reference(text)


def test_what_lies_in_the_cache_is_named_in_full() -> None:
    """Repository, commit and file, so that it can be found again."""
    path = f"/c/models--me--ck/snapshots/{COMMIT}"
    assert cached_reference(f"{path}/unet/a.safetensors") == Reference("me/ck", COMMIT, "unet/a.safetensors")
    assert cached_reference(path) == Reference("me/ck", COMMIT)
    for other in (path[:-1], path + "0", f"/c/models--me--ck/{COMMIT}", "/c/models--me--ck/snapshots/main"):
        assert cached_reference(other) is None


def test_a_server_s_index_stays_inside(serve: Callable[..., list[str]], tmp_path: Path) -> None:
    """An index from the server names shards of its own repository, or is refused before any weight is asked for."""
    asked = serve()
    index = tmp_path / "cache/snapshots" / COMMIT / INDEX
    for shard in ("../evil.safetensors", "/evil.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(SurgeryError, match="points outside the checkpoint's folder"):
            pull.fetch(Reference("me/ck"))
        assert SHARD not in asked
