"""What is not a regular file where one is expected, links that lead nowhere or round and round, files that are cut."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import Files
from hostile_line import refused, within

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError
from lorasurgery.ops.merge import merge

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("good") / "good")


def a_socket(path: Path) -> None:
    """A socket, by a short name: there is little room for it."""
    with socket.socket(socket.AF_UNIX) as made:
        short = Path("/tmp") / f"s{os.getpid()}"
        made.bind(str(short))
        short.rename(path)


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": a_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


def replace(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    if path.exists():
        path.unlink()
    KINDS[kind](path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_adapters_of_what_is_no_file(kind: str, name: str, files: Files, tmp_path: Path) -> None:
    """A FIFO, a socket, a device, a folder or a broken link in an adapter is refused at once, by its name."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    replace(adapter / name, kind)
    for words in (["inspect", adapter], ["check", adapter], ["merge", files.base, adapter, "-o", tmp_path / "out"]):
        line = refused(words, tmp_path)
        assert name.partition(".")[0] in line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_checkpoints_of_what_is_no_file(kind: str, name: str, files: Files, tmp_path: Path) -> None:
    """The same for an index and for a shard."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    replace(base / name, kind)
    for words in (["inspect", base], ["plan", base], ["merge", base, files.adapter, "-o", tmp_path / "out"]):
        assert "base" in refused(words, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_paths_that_are_no_file(kind: str, files: Files, tmp_path: Path) -> None:
    """The same where the path itself is given, by a name that could be a checkpoint's or an adapter's."""
    path = tmp_path / "model.safetensors"
    KINDS[kind](path)
    for words in (["inspect", path], ["check", path], ["merge", files.base, path, "-o", tmp_path / "out"]):
        assert "model.safetensors" in refused(words, tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_lies_beside_is_not_waited_for(kind: str, files: Files, tmp_path: Path) -> None:
    """A config.json, a tokenizer or a record that is not a file is not read, and not carried into a result."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    for name in ("config.json", "tokenizer.json", "lorasurgery.json"):
        replace(base / name, kind)
    with within():
        merge(base, [files.adapter], tmp_path / "out", device="cpu")
    assert not {"tokenizer.json"} & {f.name for f in (tmp_path / "out").iterdir()}


def test_marks_and_journals_that_are_no_files(files: Files, tmp_path: Path) -> None:
    """The mark of a header-only file that is a FIFO is refused; a journal that is one is none."""
    path = Path(shutil.copy(files.loose / "kohya.safetensors", tmp_path))
    os.mkfifo(tmp_path / ".kohya.safetensors.header-only")
    assert "header-only" in refused(["inspect", path], tmp_path)
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    (base / ".lorasurgery-surgery").mkdir()
    os.mkfifo(base / ".lorasurgery-surgery" / "journal")
    with within():
        assert Checkpoint.open(base).tensors


def test_names_as_long_as_the_system_allows(files: Files, tmp_path: Path) -> None:
    """A file whose name leaves no room for the names of marks and journals beside it is opened all the same."""
    path = Path(shutil.copy(files.loose / "kohya.safetensors", tmp_path / f"{'n' * 243}.safetensors"))
    assert Checkpoint.open(path).tensors


def test_pipelines_that_link_to_themselves(tmp_path: Path) -> None:
    """Parts that are links to their own folder would make 2⁴⁰ paths; they are looked into once."""
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).symlink_to(".")
    assert tmp_path.name in refused(["plan", tmp_path], tmp_path / "nothing")


def test_files_cut_while_they_are_read(files: Files, tmp_path: Path) -> None:
    """A shard that is cut, or goes, after its header was read gives an error that names it, and nothing is written."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    shard = base / "model-00002-of-00002.safetensors"
    found = Checkpoint.open(base)
    name = next(n for n, file in found.file_of.items() if file == shard.name)
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(FormatError, match=r"was changed while it was read \(it had 1,200 bytes and has 1,196\)"):
        found.raw(name)
    shard.unlink()
    with pytest.raises(FormatError, match="model-00002"):
        found.raw(name)
    assert "model-00002" in refused(["merge", base, files.adapter, "-o", tmp_path / "out"], tmp_path)
