"""One writer at a time, whatever writes: the second is told who the first is, changes nothing, and the first succeeds."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from long_runs import kill_after
from long_runs import world as long_world
from torch import nn
from verbs import INSIDE, OUTSIDE, TOKENIZER, WRITING, Paused, make_world, state

from lorasurgery.checkpoint import lock as locks
from lorasurgery.checkpoint.lock import LOCK, Lock, lock_of
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.checkpoint.output import Output
from lorasurgery.errors import OutputError
from lorasurgery.nn.model import apply_lora
from lorasurgery.nn.save import save_adapter
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

ME = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def locked(home: Path) -> list[Path]:
    """The files of locks."""
    return [f for f in home.rglob("*") if f.name.endswith(LOCK)]


def visible(home: Path) -> dict[str, str]:
    """What readers see, whatever the first is writing just now."""
    return {name: digest for name, digest in state(home).items() if not any(p[0] == "." for p in Path(name).parts)}


@pytest.mark.parametrize("name", WRITING)
def test_the_second_is_refused(name: str, world: Path, tmp_path: Path) -> None:
    """While the first is at work, the same verb and another one are refused at once, and the first is not disturbed."""
    verb = WRITING[name]
    for home in ("alone", "both"):
        (tmp_path / home).mkdir()
    alone, out = verb.place(world, tmp_path / "alone"), verb.place(world, tmp_path / "both")
    verb.work(world, alone)
    others = [(verb, {"resume": True} if name != "convert" else {}), (OUTSIDE["rerank"], {"overwrite": True})]
    others += [(verb, {"overwrite": True})] if name in OUTSIDE else []
    if verb.file or name in INSIDE:
        others.pop(1)
    with Paused(lambda **more: verb.work(world, out, **more)) as first:
        before = visible(tmp_path / "both")
        for other, more in others:
            with pytest.raises(OutputError) as told:
                other.work(world, out, **more)
            assert str(told.value).startswith(f"{out}: another command is changing it at this moment ({ME}: {name[:5]}")
            assert str(told.value).endswith("); wait until it is done")
        assert visible(tmp_path / "both") == before
    first.result()
    assert state(tmp_path / "both") == state(tmp_path / "alone")
    assert not locked(tmp_path)


def test_saving_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_adapter waits for nobody either: its output is locked while it is written, and only then."""
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, "0", 2)
    seen: list[str] = []

    def commit(self: Output, *, last: str) -> None:
        with pytest.raises(OutputError, match=rf"{ME}: save_adapter\); wait until it is done"):
            with Operation():
                Lock(tmp_path / "out")
        seen.append(last)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", commit)
        save_adapter(model, tmp_path / "out")
    assert seen
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "out")
    assert not locked(tmp_path)


WATCHED: list[tuple[str, list[str]]] = []


@contextmanager
def watched(place: Path) -> Iterator[list[str]]:
    """What is opened or listed in a folder, or of a file and what stands beside it for it, in order."""
    if not hasattr(sys, "_watched_by_tests"):
        sys._watched_by_tests = True  # type: ignore[attr-defined]
        sys.addaudithook(_audit)
    found: list[str] = []
    WATCHED.append((str(place), found))
    try:
        yield found
    finally:
        WATCHED.clear()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, os.PathLike)):
        path, (place, found) = os.fspath(arguments[0]), WATCHED[0]
        if path.startswith((place, str(Path(place).with_name(f".{Path(place).name}")))):
            found.append(path)


@pytest.mark.parametrize("name", WRITING)
def test_the_lock_comes_first(name: str, world: Path, tmp_path: Path) -> None:
    """Of all that is read or listed of a place that is written to, the lock is the first: no plan rests on older looks."""
    out = WRITING[name].place(world, tmp_path)
    with watched(out) as found:
        WRITING[name].work(world, out)
    assert found[0] == str(lock_of(out))
    assert len(found) > 2


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_dry_run_locks_nothing(name: str, world: Path, tmp_path: Path) -> None:
    """What writes nothing makes no folder and no lock, and is not kept waiting."""
    out = OUTSIDE[name].place(world, tmp_path)
    OUTSIDE[name].work(world, out, dry_run=True)
    assert not list(tmp_path.iterdir())
    lock = Lock(out)
    if OUTSIDE[name].file:
        OUTSIDE[name].work(world, out, dry_run=True)
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_failure_leaves_nothing(name: str, world: Path, tmp_path: Path) -> None:
    """Whatever a call fails of, neither its lock nor a folder that it made stays."""
    out = OUTSIDE[name].place(world, tmp_path / "a/b") if OUTSIDE[name].file else tmp_path / "a/b/out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OUTSIDE[name].work(world, out, progress=stop)
    assert not list(tmp_path.iterdir())


def test_merges_in_turn_come_back(world: Path, tmp_path: Path) -> None:
    """A merge in place that was begun too early is refused; begun again, both are undone to every byte of the base."""
    base = INSIDE["merge --in-place"].place(world, tmp_path)
    before = state(base)
    with Paused(lambda **more: merge(base, [world / "style"], in_place=True, **more)) as first:
        with pytest.raises(OutputError, match="another command is changing it"):
            merge(base, [world / "topic"], in_place=True)
    first.result()
    assert (base / TOKENIZER).read_text() == '{"of": "style"}'
    merge(base, [world / "topic"], in_place=True)
    unmerge(base, [world / "topic"], in_place=True)
    assert (base / TOKENIZER).read_text() == '{"of": "style"}'
    unmerge(base, [world / "style"], in_place=True)
    assert state(base) == before


def test_a_kill_lets_the_lock_go(tmp_path: Path) -> None:
    """After kill -9 the lock's file is there and holds nobody up; --resume takes it and what the killed run left."""
    long_world(tmp_path / "world")
    out = tmp_path / "out"
    assert kill_after("merge", tmp_path / "world", out, 5, 0.0)
    assert (out / LOCK).read_text().startswith("process ")
    names = {p.name.split(".")[-2] for p in out.glob(".model-*")}
    assert len(names) == 1
    (token,) = names
    assert list(out.glob(f".journal-{token}-*"))
    report = merge(tmp_path / "world/base", [tmp_path / "world/adapter"], out, resume=True, **_OPTIONS)
    assert report.resumed
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


_OPTIONS: dict[str, Any] = {"rounding": "stochastic"}

KIN = {
    "the same": ("m", "m", True),
    "a part of a pipeline": ("m", "m/unet", True),
    "the pipeline of a part": ("m/unet", "m", True),
    "a file in a folder": ("m", "m/a.safetensors", True),
    "the folder of a file": ("m/a.safetensors", "m", True),
    "another file": ("m/a.safetensors", "m/b.safetensors", False),
    "another folder": ("m", "n", False),
    "a neighbour whose name begins alike": ("m", "m2", False),
    "another part": ("m/unet", "m/vae", False),
}


@pytest.mark.parametrize("kind", KIN)
def test_kin(kind: str, tmp_path: Path) -> None:
    """A folder, its parts and its files are one place for those who write; neighbours are not."""
    held, wanted, refused = KIN[kind]
    first = Lock(tmp_path / held, "one")
    if refused:
        with pytest.raises(OutputError, match=r"at this moment \(process .*: one\); wait until it is done"):
            Lock(tmp_path / wanted)
    else:
        Lock(tmp_path / wanted).release()
    first.release()
    assert not list(tmp_path.iterdir())
    Lock(tmp_path / wanted).release()


def test_two_names_of_one_place(tmp_path: Path) -> None:
    """A link to a folder is the folder."""
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to("m")
    first = Lock(tmp_path / "m")
    with pytest.raises(OutputError, match="another command"):
        Lock(tmp_path / "link")
    first.release()


def test_who_opened_a_lock_before_it_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file while another has it open: what that one then locks is not a lock, and he makes a new one."""
    first, opened = Lock(tmp_path / "m"), locks._opened
    stale = [opened(first.file)]

    def late(file: Path) -> tuple[int, bool]:
        if stale:
            first.release()
            return stale.pop()
        return opened(file)

    monkeypatch.setattr(locks, "_opened", late)
    second = Lock(tmp_path / "m")
    assert os.path.samestat(os.fstat(second._descriptor), second.file.stat())
    monkeypatch.setattr(locks, "_opened", opened)
    with pytest.raises(OutputError, match="another command"):
        Lock(tmp_path / "m")
    second.release()


def test_a_folder_that_cannot_be_made(world: Path, tmp_path: Path) -> None:
    """A link to nothing on the way is no other command."""
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError) as told:
        OUTSIDE["merge"].work(world, tmp_path / "link/out")
    assert str(told.value).endswith("cannot be written (No such file or directory); nothing was left behind")


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_fork_does_not_release(tmp_path: Path) -> None:
    """A process that was forked meanwhile has the lock's file open too; its end lets nobody in."""
    first = Lock(tmp_path / "m")
    child = os.fork()
    if not child:
        first.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(OutputError, match="another command"):
        Lock(tmp_path / "m")
    first.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file is the lock: it keeps others out, goes at the end, and after a kill the line says what to remove."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    out = tmp_path / "out"
    first = Lock(out, "one")
    with pytest.raises(OutputError) as told:
        OUTSIDE["merge"].work(world, out)
    assert str(told.value) == (
        f"{out}: another command is changing it at this moment ({ME}: one); wait until it is done, or if it no "
        f"longer exists remove {first.file}"
    )
    first.file.unlink()  # as the line says
    OUTSIDE["merge"].work(world, out)
    assert not locked(tmp_path)


@pytest.mark.parametrize("name", ["merge", "merge --in-place"])
def test_a_lock_that_is_a_link(name: str, world: Path, tmp_path: Path) -> None:
    """A link in the lock's place is not followed: what it leads to keeps its bytes."""
    out = WRITING[name].place(world, tmp_path)
    out.mkdir(exist_ok=True)
    (tmp_path / "precious").write_text("mine")
    (out / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError) as told:
        WRITING[name].work(world, out)
    assert str(told.value) == f"{out / LOCK}: is a link, which no lock is; remove it"
    assert (tmp_path / "precious").read_text() == "mine"


def test_names_of_their_own(tmp_path: Path) -> None:
    """Two runs never write to one file, and a name that is taken all the same is refused."""
    with Output(tmp_path / "out", overwrite=False) as output:
        output.write_bytes("a", b"1")
        (partial,) = tmp_path.glob("out/.a.*")
        output._token = "other"
        output.write_bytes("a", b"2")
        assert partial.read_bytes() == b"1"
        with pytest.raises(FileExistsError):
            output.write_bytes("a", b"3")
