"""Folders, shards and indexes: what belongs together, and what an index may not point at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasurgery.checkpoint import reader
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, SurgeryError

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, shards: int = 2) -> Path:
    """A good checkpoint of several shards with its index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({f"w{i}": torch.full((2, 2), float(i)), f"b{i}": torch.zeros(2)}, folder / name)
        weight_map |= {f"w{i}": name, f"b{i}": name}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model-00002-of-00002.safetensors").rename(target)
    (folder / "model-00002-of-00002.safetensors").symlink_to(target)


def test_the_shard_that_was_asked_for_longest_ago_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more shards than may be open at once, those in use stay open."""
    monkeypatch.setattr(reader, "_MAX_OPEN", 2)
    with Checkpoint.open(sharded(tmp_path, 3)) as checkpoint:
        names = [checkpoint.file_of[f"w{i}"] for i in range(3)]
        first, second = (checkpoint.file(name) for name in names[:2])
        assert checkpoint.file(names[0]) is first
        checkpoint.file(names[2])
        assert checkpoint.file(names[0]) is first
        assert checkpoint.file(names[1]) is not second


BROKEN: dict[str, Callable[[Path], object]] = {
    "parent": lambda f: edit(f, lambda m: m.update(w0="../outside.safetensors")),
    "absolute": lambda f: edit(f, lambda m: m.update(w0="/etc/passwd")),
    "backslash": lambda f: edit(f, lambda m: m.update(w0="..\\outside.safetensors")),
    "symlink out": link_out,
    "missing shard": lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
    "missing tensor": lambda f: edit(f, lambda m: m.update(ghost="model-00001-of-00002.safetensors")),
    "pickled shard": lambda f: ((f / "a.bin").write_bytes(b"x"), edit(f, lambda m: m.update(w0="a.bin"))),
    "shard no string": lambda f: edit(f, lambda m: m.update(w0=3)),
    "no weight_map": lambda f: (f / INDEX).write_text("{}"),
    "empty weight_map": lambda f: edit(f, lambda m: m.clear()),
    "no object": lambda f: (f / INDEX).write_text("[]"),
    "no JSON": lambda f: (f / INDEX).write_text("{"),
    "empty index": lambda f: (f / INDEX).write_text(""),
    "twice": lambda f: (f / INDEX).write_text('{"weight_map":{"w0":"a","w0":"b"}}'),
    "two indexes": lambda f: (f / ("other" + ".safetensors.index.json")).write_text("{}"),
    "no index": lambda f: (f / INDEX).unlink(),
    "broken shard": lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 20),
    "nothing": lambda f: [p.unlink() for p in f.iterdir()],
}
SAID = {
    "parent": "shard ../outside.safetensors points outside",
    "absolute": "shard /etc/passwd points outside",
    "backslash": "shard ..\\outside.safetensors points outside",
    "symlink out": "shard model-00002-of-00002.safetensors is a link that leads outside",
    "missing shard": "shard model-00002-of-00002.safetensors is missing",
    "missing tensor": "model-00001-of-00002.safetensors: has no ghost",
    "pickled shard": "a.bin: a pickle file",
    "shard no string": "expected a weight_map",
    "no weight_map": "expected a weight_map",
    "empty weight_map": "its weight_map is empty",
    "no object": "expected a JSON object, found list",
    "no JSON": "not JSON (Expecting property name",
    "empty index": "not JSON (Expecting value",
    "twice": "w0 stands twice",
    "two indexes": "has 2 indexes",
    "no index": "has 2 safetensors files and no index",
    "broken shard": "model-00001-of-00002.safetensors: the header does not begin with '{'",
    "nothing": "no safetensors files here",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_indexes_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    """Every index that lies or points outside its folder is refused, naming file and flaw, before any tensor is read."""
    folder = sharded(tmp_path / "model")
    BROKEN[case](folder)
    with pytest.raises(SurgeryError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)
    assert SAID[case] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_index_decides_between_two_of_a_name(tmp_path: Path) -> None:
    """A tensor that lies in two shards is read from the one that the index names; those after it are read all the same."""
    folder = sharded(tmp_path / "model")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.ones(2), "w1": torch.full((2, 2), 7.0), "z": torch.zeros(2)}, folder / first)
    edit(folder, lambda m: (m.pop("w0"), m.pop("b0"), m.update(a=first, z=first)))
    found = Checkpoint.open(folder)
    assert set(found.tensors) == {"a", "z", "w1", "b1"}
    assert found.file_of == {"a": first, "z": first, "w1": second, "b1": second}
    assert torch.equal(found.read("w1"), torch.ones(2, 2))


def test_shards_read_as_one(tmp_path: Path) -> None:
    """All shards' tensors are there, each with its file; more shards than open files is no matter."""
    found = Checkpoint.open(sharded(tmp_path, 40))
    assert [float(found.read(f"w{i}")[0, 0]) for i in range(40)] == [float(i) for i in range(40)]
    assert found.file_of["w7"] == "model-00008-of-00040.safetensors"
    assert len(found._open) <= 16


def test_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """snapshots/<revision>/ holds links into the blobs/ of the same repository; those are followed."""
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    sharded(blobs)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(blob)
    assert set(Checkpoint.open(snapshot).tensors) == {"w0", "b0", "w1", "b1"}


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    """A tensor in two shards is read from the one the index names; tensors the index forgot are kept."""
    folder = sharded(tmp_path)
    save_file({"w1": torch.full((2, 2), 9.0), "b1": torch.zeros(2), "w0": torch.full((2, 2), 7.0), "more": torch.ones(1)},
              folder / "model-00002-of-00002.safetensors")  # fmt: skip
    found = Checkpoint.open(folder)
    assert float(found.read("w0")[0, 0]) == 0.0
    assert "more" in found.tensors


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    """An adapter folder given as a checkpoint is named for what it is."""
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is an adapter"):
        Checkpoint.open(tmp_path)


def test_what_does_not_exist_says_so(tmp_path: Path) -> None:
    """A missing path is named; one that looks like a Hub repository gets the command that downloads it."""
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(FormatError, match="hf download org/name"):
        Checkpoint.open("org/name")


def test_a_sole_shard_is_no_checkpoint(tmp_path: Path) -> None:
    """One shard of several without an index is what a copy or an output that was cut short begins with."""
    folder = sharded(tmp_path / "m")
    (folder / INDEX).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="one of 2 shards, and no index"):
        Checkpoint.open(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert set(Checkpoint.open(folder).tensors) == {"w0", "b0"}
