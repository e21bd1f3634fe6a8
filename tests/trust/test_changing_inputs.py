"""Inputs that change while they are read: every verb refuses in one line, leaves no output, and states nothing."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from verbs import BASE, FACTORS, INSIDE, OTHER, OUTSIDE, REPORTS, SHARD, STYLE, Paused, make_world, state, tensors

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint import journal
from lorasurgery.checkpoint.fingerprint import Identity
from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.atomic_file import PARTIAL
from lorasurgery.engine.runtime import Clock
from lorasurgery.errors import FormatError, MismatchError, SurgeryError
from lorasurgery.nn.load import load_adapter
from lorasurgery.ops.blend import BlendOptions, blend
from lorasurgery.ops.merge import merge
from lorasurgery.ops.provenance.record import read_record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A world that may be changed."""
    return shutil.copytree(made, tmp_path / "world")


def rewritten(file: Path) -> None:
    """Another byte, the same size, and the time of the last change set back."""
    before, data = file.stat(), bytearray(file.read_bytes())
    if file.suffix == ".json":
        data[data.index(b": ") + 1] = ord("\n")  # it says the same
    else:
        data[-2] ^= 1
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the system's clock has moved on
        with file.open("r+b") as opened:
            opened.write(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        time.sleep(0.001)


def written(file: Path) -> None:
    """Another byte, the same size, a later time."""
    rewritten(file)
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def replaced(file: Path) -> None:
    """Another file with the same bytes and times takes its name."""
    fresh = file.with_name("fresh")
    shutil.copy2(file, fresh)
    fresh.replace(file)


def cut(file: Path) -> None:
    """The last byte goes."""
    os.truncate(file, file.stat().st_size - 1)


WAYS: dict[str, tuple[Callable[[Path], None], str]] = {
    "rewritten": (rewritten, "it was written to, or its permissions or links were changed"),
    "written": (written, "it was written to"),
    "replaced": (replaced, "another file has its name"),
    "cut": (cut, r"it had [\d,]+ bytes and has [\d,]+"),
    "removed": (Path.unlink, "it is gone"),
}
MESSAGE = "{}: was changed while it was read ({}); leave it alone and repeat the command"


def changing(file: Path, way: str) -> Callable[..., None]:
    """A progress callback that changes a file when it is first called."""
    done: list[bool] = []

    def change(*_: object) -> None:
        if not done:
            done.append(True)
            WAYS[way][0](file)

    return change


def check_line(told: SurgeryError, file: Path, way: str) -> None:
    """One line that names the file and what happened to it, and perhaps what was noticed first."""
    pattern = re.escape(f"{file}: was changed while it was read (") + WAYS[way][1] + re.escape("); leave it alone and ")
    assert re.fullmatch(f"{pattern}repeat the command(; what came of it: .*)?", str(told)), told


WRITTEN = [(name, file, "rewritten") for name, verb in OUTSIDE.items() for file in verb.reads]
WRITTEN += [(name, OUTSIDE[name].reads[0], way) for name in OUTSIDE for way in WAYS if way != "rewritten"]


@pytest.mark.parametrize(("name", "file", "way"), WRITTEN)
def test_what_is_written(name: str, file: str, way: str, world: Path, tmp_path: Path) -> None:
    """Whichever of its inputs changes in whatever way, there is no output: no mixture, and nothing left behind."""
    (tmp_path / "home").mkdir()
    out = OUTSIDE[name].place(world, tmp_path / "home")
    with pytest.raises(SurgeryError) as told:
        OUTSIDE[name].work(world, out, progress=changing(world / file, way))
    check_line(told.value, world / file, way)
    assert not list((tmp_path / "home").iterdir())


READ = [(name, file, "rewritten") for name, verb in REPORTS.items() for file in verb.reads]
READ += [(name, REPORTS[name].reads[0], way) for name in REPORTS for way in WAYS if way != "rewritten"]


@pytest.mark.parametrize(("name", "file", "way"), READ)
def test_what_is_reported(
    name: str, file: str, way: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report of what was changed before its end is not given: half of it might be of the one, half of the other."""
    change, stamp = changing(world / file, way), Clock.stamp

    def late(self: Clock, report: Any) -> Any:
        change()
        return stamp(self, report)

    monkeypatch.setattr(Clock, "stamp", late)
    with pytest.raises(SurgeryError) as told:
        REPORTS[name].work(world, tmp_path / "out")
    check_line(told.value, world / file, way)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, verb in INSIDE.items() for file in verb.reads])
def test_in_place(name: str, file: str, world: Path, tmp_path: Path) -> None:
    """An adapter that changes before the first new bytes go to their place: everything stays as it was."""
    out = INSIDE[name].place(world, tmp_path)
    before = state(out)
    with pytest.raises(SurgeryError) as told:
        INSIDE[name].work(world, out, progress=changing(world / file, "rewritten"))
    check_line(told.value, world / file, "rewritten")
    assert state(out) == before


@pytest.mark.parametrize("name", INSIDE)
def test_a_shard_that_others_write_to(name: str, world: Path, tmp_path: Path) -> None:
    """Somebody who asks for no lock writes to the checkpoint itself: noticed before anything of ours goes there."""
    out = INSIDE[name].place(world, tmp_path)
    with pytest.raises(SurgeryError) as told:
        INSIDE[name].work(world, out, progress=changing(out / SHARD, "written"))
    check_line(told.value, out / SHARD, "written")
    found, base = tensors(out), tensors(world / INSIDE[name].start)
    assert sum(not torch.equal(found[n].view(torch.uint8), base[n].view(torch.uint8)) for n in base) == 1


READERS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "merge": lambda w, o, p: merge(w / "base", [w / "topic"], o, progress=p),
    "extract": lambda w, o, p: OUTSIDE["extract"].work(w, o, progress=p),
    "convert": lambda w, o, p: OUTSIDE["convert"].work(w, o, progress=p),
}


@pytest.mark.parametrize("name", READERS)
def test_a_merge_in_place_meanwhile(name: str, world: Path, tmp_path: Path) -> None:
    """A checkpoint that is merged into while it is read: refused when that is done, and when it only began."""

    def whole(*_: object) -> None:
        if not (world / "base/lorasurgery-undo").exists():
            merge(world / "base", [world / "style"], in_place=True)

    with pytest.raises(FormatError, match=r"base/.*was changed while it was read"):
        READERS[name](world, tmp_path / "out", whole)
    assert not (tmp_path / "out").exists()

    with Paused(lambda **more: READERS[name](world, tmp_path / "out", more["progress"])) as reader:
        writer = Paused(lambda **more: merge(world / "base", [world / "topic"], in_place=True, **more))
        writer.__enter__()
    with pytest.raises(MismatchError, match=r"base: is in the middle of `merge base topic --in-place`"):
        reader.result()
    assert not (tmp_path / "out").exists()
    writer.__exit__()
    writer.result()


def test_a_second_read_of_a_tensor(world: Path) -> None:
    """A tensor that is read twice is read from the same file twice, or not at all."""
    with Operation(), Checkpoint.open(world / "base") as base:
        name = next(n for n, file in base.file_of.items() if file == OTHER)
        first = base.read(name)
        base.close()
        assert torch.equal(base.read(name), first)
        base.close()
        rewritten(world / "base" / OTHER)
        with pytest.raises(FormatError, match="was changed while it was read"):
            base.read(name)


def test_loading_into_a_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """load_adapter takes no mixture into memory: the model is as it was."""
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(32, 32) for i in range(2)})
    sizes = {"A": (4, 32), "B": (32, 4)}
    keys = {f"base_model.model.layer{i}.lora_{m}.weight": torch.ones(s) for i in range(2) for m, s in sizes.items()}
    save_file(keys, world / STYLE[0], {"format": "pt"})
    change, plain = changing(world / STYLE[0], "rewritten"), Adapter.load
    monkeypatch.setattr(Adapter, "load", lambda self, delta: (plain(self, delta), change())[0])
    before = list(layers.state_dict())
    with pytest.raises(FormatError) as told:
        load_adapter(layers, world / "style")
    check_line(told.value, world / STYLE[0], "rewritten")
    assert list(layers.state_dict()) == before


def test_a_change_after_the_end(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed when the result had its name: that is whole and stays, but no record says that it was made of these bytes."""
    from lorasurgery.ops.provenance import references

    plain, late = references.describe, changing(world / STYLE[0], "rewritten")
    monkeypatch.setattr(references, "describe", lambda *given: (late(), plain(*given))[1])
    report = merge(world / "base", [world / "style"], tmp_path / "out")
    assert report.sources == []
    assert report.warnings[-1].endswith(f"{tmp_path / 'out'} was whole before, but its record is left out")
    assert not read_record(tmp_path / "out", [])
    monkeypatch.undo()
    merge(world / "base", [world / "topic"], tmp_path / "other")
    assert read_record(tmp_path / "other", [])
    Checkpoint.open(tmp_path / "out")


def interrupted(work: Callable[..., Any]) -> None:
    """Stop a run in the middle; what it has stays for --resume."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(progress=stop)


@pytest.mark.parametrize("file", BASE[:4] + STYLE)
def test_resume_wants_the_same_inputs(file: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was changed between a kill and --resume is named, even if size and time are as they were."""
    monkeypatch.setattr(journal, "KEPT", 1)
    out = tmp_path / "out"
    interrupted(lambda **more: OUTSIDE["merge"].work(world, out, **more))
    kept = state(out)
    assert kept
    rewritten(world / file)
    with pytest.raises(MismatchError, match=rf"was begun with another input {file.partition('/')[0]} .*overwrite=True"):
        OUTSIDE["merge"].work(world, out, resume=True)
    assert state(out) == kept


def test_resume_of_a_run_whose_inputs_changed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept of a run that noticed a change is of no use, and --resume says so."""
    monkeypatch.setattr(journal, "KEPT", 1)
    out = tmp_path / "out"
    with pytest.raises(FormatError, match="was changed while it was read"):
        OUTSIDE["merge"].work(world, out, progress=changing(world / BASE[0], "rewritten"))
    assert all(name.endswith(PARTIAL) for name in state(out))
    with pytest.raises(MismatchError, match=r"another input base .*overwrite=True starts over"):
        OUTSIDE["merge"].work(world, out, resume=True)
    OUTSIDE["merge"].work(world, out, overwrite=True)
    OUTSIDE["merge"].work(world, tmp_path / "again")
    assert state(out) == state(tmp_path / "again")


@pytest.mark.parametrize("which", ["one", "two"])
def test_resume_with_inputs_of_one_name(
    which: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters whose folders have the same last name are told apart."""
    monkeypatch.setattr(journal, "KEPT", 1)
    given = [
        shutil.copytree(world / name, world / number / "adapter")
        for name, number in (("style", "one"), ("topic", "two"))
    ]
    interrupted(lambda **more: blend(given, tmp_path / "out", BlendOptions(), **more))
    rewritten(world / which / "adapter" / FACTORS)
    with pytest.raises(MismatchError, match="was begun with another input adapter "):
        blend(given, tmp_path / "out", BlendOptions(), resume=True)


def test_shared_blocks_and_untouched_shards(world: Path, tmp_path: Path) -> None:
    """A shard that goes along whole, as the system copies it, is identified like any other."""
    keys = {k: v for k, v in tensors(world / "style").items() if ".layers.0." in k}
    save_file(keys, world / "style" / FACTORS, {"format": "pt"})
    done = merge(world / "base", [world / "style"], tmp_path / "right")
    assert done.totals["tensors_touched"] == 2
    with pytest.raises(FormatError, match=re.escape(OTHER)):
        merge(
            world / "base", [world / "style"], tmp_path / "out", progress=changing(world / "base" / OTHER, "rewritten")
        )
    assert not (tmp_path / "out").exists()


def test_what_costs_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identifying takes a few calls of stat a file, whatever its size, and no reading."""
    seen: list[Identity] = []
    plain = Identity.of
    monkeypatch.setattr(Identity, "of", lambda found: (seen.append(plain(found)), plain(found))[1])
    report = OUTSIDE["merge"].work(world, tmp_path / "out")
    files = {i.inode for i in seen}
    assert len(seen) <= 5 * len(files)
    assert report.bytes_read == sum(t.nbytes for f in ("base", "style") for t in tensors(world / f).values())


def test_reading_harms_nobody(world: Path, tmp_path: Path) -> None:
    """What others may do to inputs meanwhile: read them, list them, and lock the folder."""

    def look(*_: object) -> None:
        for name in OUTSIDE["merge"].reads:
            (world / name).read_bytes()
        (world / "base" / LOCK).write_text("")
        (world / "base" / "notes.log").write_text("of a training run")

    OUTSIDE["merge"].work(world, tmp_path / "out", progress=look)
    assert (tmp_path / "out" / SHARD).exists()
