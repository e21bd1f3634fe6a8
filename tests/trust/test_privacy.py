"""What goes along, who may read it, and what it tells of this machine."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from trust_world import SHARD, adapter, checkpoint, copied, modes, pipeline, pipeline_adapter, snapshot, victim, world

from lorasurgery.checkpoint.lock import Lock
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.errors import FormatError, SurgeryError, UsageError
from lorasurgery.hub.push import Target
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import blend, rerank
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging.undo.record import read_undo_record
from lorasurgery.ops.push import pack, push
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge


@pytest.fixture(autouse=True)
def _plain_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


# ── what is copied along

WRITERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge": lambda ck, style, out: merge(ck, [style], out, allow_loss=True),
    "merge --undo": lambda ck, style, out: merge(ck, [style], out, undo=True, allow_loss=True),
    "unmerge": lambda ck, style, out: unmerge(ck, [style], out),
    "rerank": lambda ck, style, out: rerank(style, out, RankChoice(rank=1)),
    "blend": lambda ck, style, out: blend([style, style], out),
    "convert": lambda ck, style, out: convert(style, out, ConvertOptions("peft")),
}


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_links_that_lead_out_are_left_out(where: str, verb: str, tmp_path: Path) -> None:
    """What they lead to is in no output; a warning names them, unless nothing of that folder goes along."""
    ck, style, out = world(tmp_path)
    folder = ck if where == "base" else style
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(out / "precious.json")
    (folder / "vocab.txt").symlink_to("/nowhere")
    (folder / "more").symlink_to(out)
    report = WRITERS[verb](ck, style, tmp_path / "OUT")
    written = {f.name: f.read_bytes() for f in (tmp_path / "OUT").rglob("*") if f.is_file()}
    assert b"hunter2" not in b"".join(written.values())
    assert not {"precious.json", "more", "vocab.txt"} & set(written)
    assert not any(f.is_symlink() for f in (tmp_path / "OUT").rglob("*"))
    told = [w for w in report.warnings if "a link that leads out of its folder is not followed" in w]
    goes = (where == "base") == ("merge" in verb) or verb in ("merge", "merge --undo")
    assert len(told) == (goes and not (where == "adapter" and verb == "unmerge"))
    if told:
        assert told[0].startswith(f"{folder}: not taken along: ")
        assert "tokenizer.json" in told[0]
        assert ("more" in told[0]) is (where == "base")
    if where == "adapter" and verb.startswith("merge"):
        assert written["tokenizer.json"] == b'{"a": "base"}'


def test_links_that_stay_inside_are_copied(tmp_path: Path) -> None:
    """As files, as ever; and so are those of the Hub's cache."""
    ck, style, _ = world(tmp_path)
    (ck / "tokenizer.json").rename(ck / "real.json")
    (ck / "tokenizer.json").symlink_to("real.json")
    report = merge(ck, [style], tmp_path / "OUT", allow_loss=True)
    assert (tmp_path / "OUT/tokenizer.json").read_text() == '{"a": "base"}'
    assert not (tmp_path / "OUT/tokenizer.json").is_symlink()
    cache = tmp_path / "models--me--ck"
    home = cache / "snapshots" / ("a" * 40)
    home.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(f for f in ck.iterdir() if not f.is_symlink()):
        (cache / f"blobs/{i}").write_bytes(file.read_bytes())
        (home / file.name).symlink_to(f"../../blobs/{i}")
    far = merge(home, [style], tmp_path / "FAR", allow_loss=True)
    assert (tmp_path / "FAR/real.json").read_text() == '{"a": "base"}'
    assert not [w for w in (*report.warnings, *far.warnings) if "link" in w]


def test_a_tokenizer_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    """Half a tokenizer of the adapter's and half of the base's would be neither."""
    ck, style, out = world(tmp_path)
    (style / "tokenizer_config.json").write_text('{"new": true}')
    (style / "tokenizer.json").symlink_to(out / "precious.json")
    for in_place in (False, True):
        report = merge(ck, [style], None if in_place else tmp_path / "OUT", in_place=in_place, allow_loss=True)
        target = ck if in_place else tmp_path / "OUT"
        assert (target / "tokenizer.json").read_text() == '{"a": "base"}'
        assert not (target / "tokenizer_config.json").exists()
        assert any("tokenizer.json; a link that leads out" in w for w in report.warnings)


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "pipeline"])
def test_push_refuses_links_that_lead_out(kind: str, tmp_path: Path) -> None:
    """Files, and folders of a pipeline; a forged place in the Hub's cache is not an excuse."""
    out = victim(tmp_path / "victim")
    make = {"adapter": adapter, "checkpoint": checkpoint, "pipeline": pipeline}[kind]
    for home in (tmp_path / "plain", tmp_path / "models--me--x/snapshots" / ("0" * 40)):
        folder = make(home)
        assert "precious.json" not in pack(folder).files
        (folder / "extra.json").symlink_to(out / "precious.json")
        with pytest.raises(FormatError, match=r"extra\.json: is a link that leads out of the folder; put the file"):
            push(folder, Target("me/x"), dry_run=True)
        (folder / "extra.json").unlink()
        if kind == "pipeline":
            (folder / "text_encoder").rename(home.with_name("te"))
            (folder / "text_encoder").symlink_to(home.with_name("te"))
            with pytest.raises(FormatError, match=r"text_encoder: is a link that leads out of the folder"):
                push(folder, Target("me/x"), dry_run=True)


# ── permissions


def private(folder: Path, file_mode: int, folder_mode: int) -> None:
    """Close a folder to others."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(folder_mode if path.is_dir() else file_mode)


def tuned(ck: Path) -> Path:
    (ck / "config.json").write_text("{}")  # no model's class is asked, which would take seconds
    other = copied(ck, ck.parent / "tuned")
    for shard in other.glob("*.safetensors"):
        mode = stat.S_IMODE(shard.stat().st_mode)
        save_file({n: t + 0.1 for n, t in load_file(shard).items()}, shard, {"format": "pt"})
        shard.chmod(mode)  # safetensors writes for the user alone
    return other


MODE_VERBS: dict[str, Callable[[Path, Path, Path], Any]] = WRITERS | {
    "merge, one file": lambda ck, style, out: merge(ck, [style], out.with_name("OUT.safetensors"), allow_loss=True),
    "extract": lambda ck, style, out: extract(ck, tuned(ck), out, ExtractOptions(RankChoice(rank=1))),
}


@pytest.mark.parametrize("verb", MODE_VERBS)
@pytest.mark.parametrize(("which", "file", "folder"), [("one file", 0o600, 0o755), ("all", 0o640, 0o750),
                                                       ("folder", 0o644, 0o700), ("none", 0o644, 0o755),
                                                       ("wider", 0o666, 0o777)])  # fmt: skip
def test_outputs_are_as_private_as_the_inputs(which: str, file: int, folder: int, verb: str, tmp_path: Path) -> None:
    """No file or folder of an output may be read by more than the narrowest input, nor by more than the umask lets."""
    ck, style, _ = world(tmp_path)
    if verb == "unmerge":
        merge(ck, [style], in_place=True, allow_loss=True)
    for source in (ck, style):
        private(source, 0o644, 0o755)
        if which == "one file":
            (source / ("config.json" if source == ck else "adapter_config.json")).chmod(file)
        else:
            private(source, file, folder)
    MODE_VERBS[verb](ck, style, tmp_path / "OUT")
    found = [p for p in (tmp_path / "OUT", *tmp_path.glob("OUT/**/*"), tmp_path / "OUT.safetensors") if p.exists()]
    assert any(p.is_file() for p in found)
    seen = file if folder & 0o5 else file & (0o660 if folder & 0o50 else 0o600)
    wanted = {True: folder & ~0o022 | 0o700, False: seen & ~0o022 | 0o600}
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in found} == {
        p.name: oct(wanted[p.is_dir()]) for p in found
    }


def test_partial_files_are_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, in place and not, nothing under a temporary name is readable by others than the result will be."""
    ck, style, _ = world(tmp_path)
    seen: dict[str, int] = {}

    def look(name: str, done: int, total: int) -> None:
        for place in (ck, tmp_path / "OUT"):
            for path in place.rglob("*"):
                if ".lorasurgery-" in path.relative_to(place).as_posix():
                    seen[path.relative_to(place).as_posix()] = stat.S_IMODE(path.stat().st_mode)

    private(ck, 0o600, 0o700)
    merge(ck, [style], tmp_path / "OUT", undo=True, allow_loss=True, progress=look)
    merge(ck, [style], in_place=True, allow_loss=True, progress=look)
    assert any("surgery/journal" in name for name in seen)
    assert any(name.startswith(".undo-") for name in seen)
    assert {name: oct(mode) for name, mode in seen.items() if mode & 0o077} == {}


def test_in_place_keeps_the_modes_of_what_it_replaces(tmp_path: Path) -> None:
    """A file that gets other content keeps its mode, whatever the umask; new ones are as private as the checkpoint."""
    ck, _, _ = world(tmp_path)
    first = adapter(tmp_path / "first", tokenizer='{"a": 1}')
    second = adapter(tmp_path / "second", seed=3, tokenizer='{"a": 2}')
    for folder in (ck, first, second):
        private(folder, 0o640, 0o750)
    (ck / "tokenizer.json").chmod(0o664)
    os.umask(0o077)
    merge(ck, [first], in_place=True, allow_loss=True)
    old = {"tokenizer.json": 0o664, "config.json": 0o640, SHARD: 0o640}
    assert {n: m for n, m in modes(ck).items() if n in old} == old
    new = {"lorasurgery.json": 0o600, "lorasurgery-undo": 0o700, "lorasurgery-undo/0001.safetensors": 0o600}
    assert {n: m for n, m in modes(ck).items() if n in new} == new
    (ck / "lorasurgery.json").chmod(0o644)
    switch(ck, [second], allow_loss=True)
    unmerge(ck, [second], in_place=True)
    assert modes(ck)["tokenizer.json"] == 0o664
    os.umask(0o022)
    merge(ck, [first], in_place=True, allow_loss=True)
    assert modes(ck)["lorasurgery-undo"] == 0o750
    assert modes(ck)["lorasurgery-undo/0001.safetensors"] == 0o640


def test_a_lock_tells_no_more_than_its_folder(tmp_path: Path) -> None:
    """It names a command and its files: of a private folder nobody else reads it."""
    os.umask(0o022)
    for mode, wanted in ((0o700, 0o600), (0o750, 0o640), (0o755, 0o644)):
        tmp_path.chmod(mode)
        lock = Lock(tmp_path, "lorasurgery merge …")
        assert lock.file.stat().st_mode & 0o777 == wanted
        lock.release()


def test_a_mode_is_for_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only another group may read is not for the group of the new file."""
    (tmp_path / "a").write_text("")
    (tmp_path / "a").chmod(0o640)
    assert Modes.of([tmp_path / "a"], tmp_path).file == 0o640
    monkeypatch.setattr(os, "getegid", lambda: (tmp_path / "a").stat().st_gid + 1)
    assert Modes.of([tmp_path / "a"], tmp_path).file == 0o600
    (tmp_path / "team").mkdir()
    (tmp_path / "team").chmod(0o2775)  # where new files are the folder's group's
    assert Modes.of([tmp_path / "a"], tmp_path / "team/new/out").file == 0o640
    (tmp_path / "a").chmod(0o664)
    assert Modes.of([tmp_path / "a"], tmp_path).file == 0o644


# ── what is told of this machine


@pytest.mark.parametrize("call", ["absolute", "relative", "up", "here"])
@pytest.mark.parametrize("verb", ["merge --undo", "merge", "in place", "rerank", "blend", "switch"])
def test_nothing_names_a_folder_of_this_machine(
    verb: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However inputs are named, no file that is written holds the names of the folders they lie in; warnings included."""
    home = tmp_path / "alice-secret/acme-merger"
    ck, style = checkpoint(home / "ck"), adapter(home / "x/style")
    (style / "tokenizer.json").symlink_to("/etc/hostname")  # gives a warning with a path in it
    work = {"up": home / "work", "here": style}.get(call, tmp_path)
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    names = {"absolute": lambda p: str(p), "relative": lambda p: str(p.relative_to(tmp_path)),
             "up": lambda p: f"../{p.relative_to(home)}", "here": lambda p: "." if p == style else str(p)}[call]  # fmt: skip
    base, lora, out = names(ck), names(style), tmp_path / "OUT"
    verbs: dict[str, Callable[[], Any]] = {
        "merge --undo": lambda: merge(base, [lora], out, undo=True, allow_loss=True),
        "merge": lambda: merge(base, [lora], out, allow_loss=True),
        "in place": lambda: merge(base, [lora], in_place=True, allow_loss=True),
        "rerank": lambda: rerank(lora, out, RankChoice(rank=1)),
        "blend": lambda: blend([lora, lora], out),
        "switch": lambda: (merge(base, [lora], in_place=True, allow_loss=True), switch(base, [lora], allow_loss=True)),
    }
    verbs[verb]()
    written = [f for f in (*out.rglob("*"), *ck.rglob("*")) if f.is_file()]
    assert len(written) > 2
    for file in written:
        for secret in (b"alice-secret", b"acme-merger", str(tmp_path).encode()):
            assert secret not in file.read_bytes(), file
    records = [*out.glob("lorasurgery-undo/*"), *ck.glob("lorasurgery-undo/*")]
    assert [a.name for r in records for a in read_undo_record(r).adapters] == ["style"] * len(records)


def test_switch_finds_what_it_takes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the checkpoint, beside what comes in, or here, by name and content; elsewhere --from says where."""
    ck, style, _ = world(tmp_path)
    topic = adapter(tmp_path / "topics/topic", seed=9)
    base = snapshot(ck)
    merge(ck, [style], in_place=True, allow_loss=True)
    other = adapter(tmp_path / "elsewhere/style", seed=5)
    monkeypatch.chdir(other.parent)  # one of that name that is not it
    switch(ck, [topic], allow_loss=True)
    switch(ck, [style], allow_loss=True, from_=[topic])
    style.rename(tmp_path / "topics/style")
    switch(ck, [topic], allow_loss=True)
    topic.rename(tmp_path / "gone")
    with pytest.raises(SurgeryError, match=r"topic: was merged, and is not in .*; from_ says where it is"):
        switch(ck, [other], allow_loss=True)
    adapter(tmp_path / "topic", seed=1)
    with pytest.raises(SurgeryError, match=r"topic: is not the adapter that was merged"):
        switch(ck, [other], allow_loss=True)
    unmerge(ck, [tmp_path / "gone"], in_place=True)
    left = {n: v for n, v in snapshot(ck).items() if n in base}
    assert left == base


def test_older_records_are_read(tmp_path: Path) -> None:
    """Records of before, which say where the adapter lay, still undo; the path is not looked at."""
    import torch

    ck, style, _ = world(tmp_path)
    merge(ck, [style], in_place=True, allow_loss=True)
    record = ck / "lorasurgery-undo/0001.safetensors"
    tensors = load_file(record)
    about = json.loads(bytes(tensors["about"].tolist()))
    assert set(about["adapters"][0]) == {"name", "sha256", "weight"}
    about["adapters"][0]["path"] = "/dev/zero"
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file(tensors, record)
    switch(ck, [style], allow_loss=True)
    unmerge(ck, [style], in_place=True)


@pytest.mark.parametrize("name", ["../style", "/etc", "..", "", ".", "a/b", "C:x", "x\\y"])
def test_a_name_in_a_record_leads_nowhere(name: str, tmp_path: Path) -> None:
    """The name of an adapter is looked up in folders, so it is one name."""
    from lorasurgery.ops.merging.undo.record import Merged, UndoRecord
    from lorasurgery.ops.merging.undo.select import adapters_of

    (tmp_path / "x").mkdir()
    adapter(tmp_path / "style")
    with pytest.raises(SurgeryError, match="was merged, and is not in"):
        adapters_of(UndoRecord([Merged(name, "0" * 64, 1.0)], []), (), [tmp_path / "x"])


# ── the base's name


def test_push_says_that_a_base_is_named_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local path stays what PEFT writes; push says so and --base-model sends another name, and writes none here."""
    style = adapter(tmp_path / "style")
    config = style / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama").mkdir(parents=True)
    for base, local in (("/home/alice/llama", True), ("../llama", True), ("C:\\models\\llama", True),
                        ("models/llama", True), ("meta-llama/Llama-3.2-1B", False), ("gpt2", False)):  # fmt: skip
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        before = config.read_bytes()
        told = push(style, Target("me/x"), dry_run=True).warnings
        assert [w for w in told if "base_model=ORG/NAME)` writes the name" in w] == told
        assert len(told) == local
        assert push(style, Target("me/x"), base_model="org/llama", dry_run=True).warnings == []
        assert config.read_bytes() == before
    for bad in ("/home/alice/llama", "../x", "a/b/c", "", "org/na me"):
        with pytest.raises(UsageError, match=r"base_model.*: expected the base's name on the Hub"):
            push(style, Target("me/x"), base_model=bad, dry_run=True)


def test_what_is_sent_names_the_base(tmp_path: Path) -> None:
    """All that is in the config is sent, but for the name."""
    from lorasurgery.ops.provenance.record import with_base_model

    style = adapter(tmp_path / "style")
    sent = with_base_model(pack(style).files, "org/llama")
    assert set(sent) == {"adapter_config.json"}
    mine = json.loads((style / "adapter_config.json").read_text())
    assert json.loads(sent["adapter_config.json"]) == mine | {"base_model_name_or_path": "org/llama"}
    lora = pipeline_adapter(tmp_path / "lora.safetensors")
    assert with_base_model(pack(lora).files, "org/llama") == {}
