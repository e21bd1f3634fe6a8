"""Outputs in odd places, two writers at once, links, and names that nobody expects."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import Child
from long_runs import hashes
from operations import INSIDE, OPERATIONS, OUTSIDE, run, state
from people import mounted

SHARD = "model-00001-of-00003.safetensors"
CALLS = {
    "merge --in-place": "lorasurgery merge out style --in-place",
    "unmerge --in-place": "lorasurgery unmerge out style --in-place",
    "switch": "lorasurgery switch out --to topic --from style",
}
NAMES = ["with two  spaces", "ünïcødé 模型 🦙", "line\nbreak", "quo'te\"s", "percent%20", "a[b]*?"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev and os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)
    else:
        with mounted(tmp_path / "elsewhere") as folder:
            yield folder


@pytest.mark.parametrize("name", OPERATIONS)
def test_another_file_system(name: str, small: Path, whole: dict[str, dict[str, str]], elsewhere: Path) -> None:
    """What is written to another file system than the inputs' is the same to the byte."""
    out = OPERATIONS[name].prepare(small, elsewhere / "out")
    run(*OPERATIONS[name].words(small, out))
    assert state(out) == whole[name]
    assert sorted(p.name for p in elsewhere.iterdir()) == ["out"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_output_that_is_an_input(name: str, small: Path) -> None:
    """An output equal to an input, inside one, around one, or a link to one is refused, whatever --overwrite says."""
    inputs = hashes(small)
    words = [str(w) for w in OPERATIONS[name].words(small, small)]
    given = [Path(w) for w in words[1:] if w.startswith(f"{small}/")]
    link = small.parent / "link"
    for source in given:
        link.unlink(missing_ok=True)
        link.symlink_to(source)
        for out, reason in ((source, "is the input"), (source / "out", "is the input"), (small, "holds the input"),
                            (link, "is the input"), (link / "out", "is the input")):  # fmt: skip
            done = run(*OPERATIONS[name].words(small, out), "--overwrite", fails=True)
            assert done.status == 1
            assert done.line.startswith(f"lorasurgery: {out}: {reason} ")
            assert done.line.endswith("; choose another output")
    link.unlink()
    assert hashes(small) == inputs


@pytest.mark.parametrize("name", NAMES)
def test_names(
    name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces, other scripts, line breaks and what shells care about in a name: the whole round trip works, to the bit."""
    world = tmp_path / name
    for folder in ("base", "tuned", "style", "topic"):
        shutil.copytree(small / folder, world / f"{folder} {name}")
    base, tuned, style, topic = (world / f"{folder} {name}" for folder in ("base", "tuned", "style", "topic"))
    before = state(base)
    out, merged = world / f"out {name}", world / f"merged {name}"
    run("extract", base, tuned, "-o", out, "--rank", "4")
    run("merge", base, style, "-o", merged)
    for n, digest in whole["merge"].items():
        assert n == "lorasurgery.json" or state(merged)[n] == digest
    run("merge", base, style, "--in-place")
    run("switch", base, "--to", topic)
    run("inspect", base)
    run("inspect", out)
    failed = run("unmerge", base, style, "--in-place", fails=True)
    assert failed.status == 1
    assert len(failed.text.splitlines()) == 1
    run("unmerge", base, topic, "--in-place")
    assert state(base) == before


def test_a_file_with_such_a_name(small: Path, tmp_path: Path) -> None:
    """A single file that is a checkpoint: merged and unmerged in place under a name with a line break and a space."""
    file = tmp_path / "my model\n模型.safetensors"
    shutil.copy(small / "merged" / SHARD, file)
    keys = tmp_path / "one"
    shutil.copytree(small / "style", keys)
    from safetensors.torch import load_file, save_file

    tensors = load_file(keys / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".0." in k}, keys / "adapter_model.safetensors")
    before = file.read_bytes()
    run("merge", file, keys, "--in-place")
    assert file.read_bytes() != before
    run("unmerge", file, keys, "--in-place")
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", INSIDE)
def test_two_writers_at_once(name: str, small: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """The second gets one line and exit status 1, whatever it wants to do; the first is not disturbed."""
    out = OPERATIONS[name].prepare(small, tmp_path / "out")
    child = Child(OPERATIONS[name].words(small, out), tmp_path / "log", 1)
    assert child.wait()
    call = CALLS[name]
    for second in (OPERATIONS[name].words(small, out), [*OPERATIONS[name].words(small, out), "--resume"]):
        done = run(*second, fails=True)
        assert (done.status, done.line) == (
            1, f"lorasurgery: {out}: another command is changing it at this moment (process {child.number} on "
            f"{socket.gethostname()}: {call}); wait until it is done",
        )  # fmt: skip
    assert child.end() == 0
    assert state(out) == whole[name]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_shards_that_are_links(kind: str, name: str, small: Path, tmp_path: Path) -> None:
    """In place on links is refused, for what they lead to is somebody else's; -o OUT reads them like files."""
    out = OPERATIONS[name].prepare(small, tmp_path / "out")
    shard, real = out / SHARD, out / "real.safetensors"
    shard.rename(real)
    shard.symlink_to(real.name) if kind == "symbolic" else shard.hardlink_to(real)
    before = hashes(out)
    done = run(*OPERATIONS[name].words(small, out), fails=True)
    assert (done.status, done.line) == (
        1, f"lorasurgery: {shard}: is a link, so others would be changed too (the Hub's cache keeps files this way); copy "
        "the checkpoint first, or write a new one with -o OUT",
    )  # fmt: skip
    assert hashes(out) == before
    run("merge", out, small / "style", "-o", tmp_path / "new")
