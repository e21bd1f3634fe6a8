"""Nothing outside: every place that names a file × every way to lead out of the folder × every verb that reads it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trust_world import INDEX, SHARD, adapter, checkpoint, copied, pipeline, pipeline_adapter, snapshot, victim, world

from lorasurgery.checkpoint.files import read_back
from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.checkpoint.inside import files_below, is_commit, is_inside, to_read, to_replace, to_write
from lorasurgery.checkpoint.journal import Run
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import FormatError, OutputError, SurgeryError
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging.undo.record import read_undo_record
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify

# How a name leads out: what is put into the folder, and the name.
ESCAPES: dict[str, tuple[Callable[[Path, Path], object], Callable[[Path, str], str]]] = {
    "absolute": (lambda ck, out: None, lambda out, name: str(out / name)),
    "dots": (lambda ck, out: None, lambda out, name: f"../{out.name}/{name}"),
    "dots within": (lambda ck, out: (ck / "docs").mkdir(), lambda out, name: f"docs/../../{out.name}/{name}"),
    "backslashes": (lambda ck, out: None, lambda out, name: f"..\\{out.name}\\{name}"),
    "a drive": (lambda ck, out: None, lambda out, name: f"C:{name}"),
    "a link for a folder": (lambda ck, out: (ck / "docs").symlink_to(out), lambda out, name: f"docs/{name}"),
    "a link in a folder": (
        lambda ck, out: ((ck / "docs").mkdir(), (ck / "docs/deep").symlink_to(out)),
        lambda out, name: f"docs/deep/{name}",
    ),
    "a folder of nothing": (lambda ck, out: (ck / "docs").symlink_to(out / "no"), lambda out, name: f"docs/{name}"),
    "a link for a file": (lambda ck, out: _link(ck / "x.json", out / "x.json"), lambda out, name: name),
    "a link to nothing": (lambda ck, out: _link(ck / "x.json", out / "no.json"), lambda out, name: name),
}
LINKS_OF_FILES = {"a link for a file", "a link to nothing"}
NAMED = {"absolute", "dots", "dots within", "backslashes", "a drive"}
TOKEN = "0123456789abcdef"  # of an interrupted run
JOURNAL = f".journal-{TOKEN}-0.lorasurgery-partial"


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_one_place(escape: str, tmp_path: Path) -> None:
    """Names are refused for what they are, links for where they lead; a link that is a file may itself be replaced."""
    ck, _, out = world(tmp_path)
    lay, name = ESCAPES[escape]
    lay(ck, out)
    for rule, kind in ((to_read, FormatError), (to_write, OutputError), (to_replace, OutputError)):
        if rule is to_replace and escape in LINKS_OF_FILES:
            assert rule(ck, name(out, "x.json")) == ck / "x.json"
            continue
        says = "is not the name of a file in this folder" if escape in NAMED else "is a link"
        with pytest.raises(FormatError if escape in NAMED else kind, match=says):
            rule(ck, name(out, "x.json"))


def test_what_may_be_named(tmp_path: Path) -> None:
    """Files in the folder and below, links that stay in it, and those of the Hub's cache, which are only read."""
    ck = checkpoint(tmp_path / "ck")
    (ck / "sub").mkdir()
    (ck / "sub/a.json").write_text("{}")
    (ck / "b.json").symlink_to("sub/a.json")
    (ck / "c").symlink_to("sub")
    for name in ("sub/a.json", "b.json", "c/a.json", "new.json", "new/new.json"):
        assert to_read(ck, name) == ck / name
    with pytest.raises(OutputError, match=r"ck/c: is a link"):
        to_replace(ck, "c/a.json")
    cache = tmp_path / "models--me--ck"
    snapshot_ = cache / "snapshots" / ("0" * 40)
    (snapshot_ / "unet").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs/1234").write_text("{}")
    (snapshot_ / "unet/a.json").symlink_to("../../../blobs/1234")
    for folder, name in ((snapshot_, "unet/a.json"), (snapshot_ / "unet", "a.json")):
        assert to_read(folder, name).read_text() == "{}"
        with pytest.raises(OutputError, match="is a link"):
            to_write(folder, name)
    (cache / "blobs/1234").unlink()
    (cache / "blobs/1234").symlink_to(tmp_path / "ck/config.json")
    with pytest.raises(FormatError, match="leads out"):
        to_read(snapshot_, "unet/a.json")


def test_links_inside_are_walked_once(tmp_path: Path) -> None:
    """Links to folders inside are followed once, to themselves never; what leads out is told apart."""
    (tmp_path / "f/a").mkdir(parents=True)
    (tmp_path / "f/a/x").write_text("x")
    (tmp_path / "f/b").symlink_to("a")
    (tmp_path / "f/a/up").symlink_to("..")
    (tmp_path / "f/a/out").symlink_to(tmp_path)
    (tmp_path / "f/none").symlink_to("/nowhere")
    (tmp_path / "f/self").symlink_to("self")
    files, outside = files_below(tmp_path / "f")
    assert set(files) == {"a/x", "b/x"}
    assert set(outside) == {"a/out", "b/out", "none", "self"}


# ── undo records


def forged(ck: Path, style: Path, names: dict[str, bytes | None]) -> None:
    """A merged checkpoint whose record names these files too."""
    merge(ck, [style], in_place=True, allow_loss=True)
    record = ck / "lorasurgery-undo/0001.safetensors"
    tensors = load_file(record)
    about = json.loads(bytes(tensors["about"].tolist()))
    about["files"] |= {n: None if d is None else base64.b64encode(d).decode() for n, d in names.items()}
    raw = list(json.dumps(about).encode())
    save_file(tensors | {"about": torch.tensor(raw, dtype=torch.uint8)}, record, {"format": "lorasurgery-undo"})


UNDO_VERBS: dict[str, Callable[[Path, Path], object]] = {
    "unmerge in place": lambda ck, style: unmerge(ck, [style], in_place=True),
    "unmerge": lambda ck, style: unmerge(ck, [style], ck.parent / "OUT"),
    "switch": lambda ck, style: switch(ck, [adapter(ck.parent / "topic", seed=9)], from_=[style], allow_loss=True),
}


@pytest.mark.parametrize("verb", UNDO_VERBS)
@pytest.mark.parametrize("escape", ESCAPES)
def test_files_that_a_record_names(escape: str, verb: str, tmp_path: Path) -> None:
    """Neither written nor removed elsewhere, and refused before a tensor changes; a new folder has real ones."""
    ck, style, out = world(tmp_path)
    lay, name = ESCAPES[escape]
    forged(ck, style, {name(out, "x.json"): b"evil", name(out, "precious.json"): None})
    lay(ck, out)
    before, weights = snapshot(out), (ck / SHARD).read_bytes()
    if escape in LINKS_OF_FILES or (verb == "unmerge" and escape not in NAMED):
        UNDO_VERBS[verb](ck, style)  # the link itself is replaced, or a folder of that name is made
    else:
        says = r"0001\.safetensors: is a damaged undo record" if escape in NAMED else "is a link, and nothing is"
        with pytest.raises(SurgeryError, match=says):
            UNDO_VERBS[verb](ck, style)
        assert (ck / SHARD).read_bytes() == weights
        assert not (tmp_path / "OUT").exists()
    assert snapshot(out) == before


def test_a_record_of_a_file_names_no_others(tmp_path: Path) -> None:
    """Beside a single file lies whatever the user has there: `~/bin/x` must not come out of a record."""
    ck, style, _ = world(tmp_path)
    forged(ck, style, {"bin/x": b"evil"})
    home = tmp_path / "home"
    home.mkdir()
    (ck / SHARD).rename(home / "one.safetensors")
    record = ck / "lorasurgery-undo/0001.safetensors"
    tensors = load_file(record)
    about = json.loads(bytes(tensors["about"].tolist()))
    about["tensors"] = {n: k for n, k in about["tensors"].items() if ".0." in n}
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    (home / "one.safetensors.lorasurgery-undo").mkdir()
    save_file(tensors, home / "one.safetensors.lorasurgery-undo/0001.safetensors")
    keys = style / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(keys).items() if ".0." in k}, keys)
    stolen = read_undo_record(home / "one.safetensors.lorasurgery-undo/0001.safetensors").files
    assert "bin/x" in stolen
    before = snapshot(home)
    with pytest.raises(SurgeryError):
        unmerge(home / "one.safetensors", [style], in_place=True)
    assert snapshot(home) == before


@pytest.mark.parametrize(
    "verb", ["merge in place", "merge", "unmerge in place", "unmerge", "switch", "inspect", "verify"]
)
def test_records_behind_a_link(verb: str, tmp_path: Path) -> None:
    """`lorasurgery-undo` that is a link is neither written through, nor copied from, nor believed."""
    ck, style, out = world(tmp_path)
    forged(ck, style, {})
    (ck / "lorasurgery-undo").rename(out / "records")
    (ck / "lorasurgery-undo").symlink_to(out / "records")
    before = snapshot(out), snapshot(ck)
    verbs: dict[str, Callable[[], object]] = {
        "merge in place": lambda: merge(ck, [style], in_place=True, allow_loss=True),
        "merge": lambda: merge(ck, [style], tmp_path / "OUT", undo=True, allow_loss=True),
        "unmerge in place": lambda: unmerge(ck, [style], in_place=True),
        "unmerge": lambda: unmerge(ck, [style], tmp_path / "OUT"),
        "switch": lambda: switch(ck, [style], from_=[style], allow_loss=True),
        "inspect": lambda: inspect(ck),
        "verify": lambda: verify(ck),
    }
    with pytest.raises(SurgeryError, match=r"lorasurgery-undo(/0001\.safetensors)?: is a link"):
        verbs[verb]()
    (ck / ".lorasurgery-lock").unlink(missing_ok=True)
    assert (snapshot(out), snapshot(ck)) == before
    assert not list(tmp_path.glob("OUT/*"))


def test_an_empty_place_for_records_that_is_a_link(tmp_path: Path) -> None:
    """Nor does the first record go through a link, in place or into an output that has one."""
    ck, style, out = world(tmp_path)
    base = copied(ck, tmp_path / "base")
    (out / "empty").mkdir()
    (ck / "lorasurgery-undo").symlink_to(out / "empty")
    before = snapshot(out)
    with pytest.raises(OutputError, match=r"ck/lorasurgery-undo: is a link, and nothing is written"):
        merge(ck, [style], in_place=True, allow_loss=True)
    with pytest.raises(OutputError, match=r"ck/lorasurgery-undo: is a link, and nothing is written"):
        merge(base, [style], ck, undo=True, overwrite=True, allow_loss=True)
    assert snapshot(out) == before


# ── what in place reads and replaces


def test_secrets_do_not_become_part_of_a_record(tmp_path: Path) -> None:
    """A tokenizer or record of the base that leads elsewhere would be kept in the undo record, to be published."""
    ck, _, out = world(tmp_path)
    topic = adapter(tmp_path / "topic", tokenizer='{"a": "new"}')
    for name in ("tokenizer.json", "lorasurgery.json"):
        base = copied(ck, tmp_path / f"base-{name}")
        _link(base / name, out / "precious.json")
        before = snapshot(base)
        with pytest.raises(FormatError, match=rf"{name}: is a link that leads out of its folder"):
            merge(base, [topic], in_place=True, allow_loss=True)
        (base / ".lorasurgery-lock").unlink(missing_ok=True)
        assert snapshot(base) == before
        merge(base, [topic], tmp_path / f"out-{name}", undo=True, allow_loss=True)
        found = b"".join(f.read_bytes() for f in (tmp_path / f"out-{name}").rglob("*") if f.is_file())
        assert b"hunter2" not in found
        assert base64.b64encode(b'{"password": "hunter2"}') not in found


# ── parts and outputs that are links


@pytest.mark.parametrize("inside", [True, False])
def test_a_part_that_is_a_link(inside: bool, tmp_path: Path) -> None:
    """In place it is refused, wherever it leads; into a new folder its weights are read."""
    pipe, lora = pipeline(tmp_path / "pipe"), pipeline_adapter(tmp_path / "lora.safetensors")
    shared = (pipe if inside else tmp_path) / "shared"
    (pipe / "text_encoder").rename(shared)
    if inside:  # a second part of the same weights
        (shared / "model.safetensors").rename(shared / "w.safetensors")
        (shared / "w.safetensors").rename(shared / "model.safetensors")
    (pipe / "text_encoder").symlink_to(shared)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"pipe/text_encoder: is a link, so others would be changed too"):
        merge(pipe, [lora], in_place=True, allow_loss=True)
    assert snapshot(tmp_path) == before
    report = merge(pipe, [lora], tmp_path / "OUT", allow_loss=True)
    merged = load_file(tmp_path / "OUT/text_encoder/model.safetensors")
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], torch.eye(16) + 2 * torch.ones(16, 16))
    told = [w for w in report.warnings if "text_encoder; a link that leads out" in w]
    assert bool(told) is not inside
    assert (tmp_path / "OUT/text_encoder/config.json").exists() is inside


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_an_output_with_a_link_in_it(part: str, tmp_path: Path) -> None:
    """--overwrite writes and deletes nothing through a link to a folder; one that is a file is replaced itself."""
    pipe, lora = pipeline(tmp_path / "pipe"), pipeline_adapter(tmp_path / "lora.safetensors")
    (pipe / "tokenizer").mkdir()
    (pipe / "tokenizer/vocab.json").write_text("{}")
    old = pipeline(tmp_path / "OUT")
    out = victim(tmp_path / "victim")
    (old / "text_encoder").rename(tmp_path / "gone")
    (old / part).symlink_to(out)
    before = snapshot(out)
    with pytest.raises(OutputError, match=rf"OUT/{part}: is a link, and nothing is written or removed through one"):
        merge(pipe, [lora], old, overwrite=True, allow_loss=True)
    assert snapshot(out) == before
    (old / part).unlink()
    (old / "model_index.json").unlink()
    (old / "model_index.json").symlink_to(out / "precious.json")
    merge(pipe, [lora], old, overwrite=True, allow_loss=True)
    assert not (old / "model_index.json").is_symlink()
    assert snapshot(out) == before


def test_remains_that_are_links(tmp_path: Path) -> None:
    """What an interrupted run is said to have left is not written to through a link; --overwrite clears the link."""
    ck, style, out = world(tmp_path)
    target = tmp_path / "OUT"
    for name in (JOURNAL, f".model.safetensors.{TOKEN}.lorasurgery-partial"):
        target.mkdir(exist_ok=True)
        (target / JOURNAL).touch()
        _link(target / name, out / "precious.json")
        before = snapshot(out)
        with pytest.raises(FormatError, match=r"is a link, which no run leaves; overwrite=True clears it"):
            merge(ck, [style], target, resume=True, allow_loss=True)
        assert snapshot(out) == before
        merge(ck, [style], target, overwrite=True, allow_loss=True)
        assert snapshot(out) == before
        assert not any(f.is_symlink() for f in target.iterdir())
        for file in target.iterdir():
            file.unlink()


# ── indexes


INDEX_VERBS: dict[str, Callable[[Path, Path], object]] = {
    "inspect": lambda ck, style: inspect(ck),
    "verify": lambda ck, style: verify(ck),
    "merge": lambda ck, style: merge(ck, [style], ck.parent / "OUT", allow_loss=True),
    "merge in place": lambda ck, style: merge(ck, [style], in_place=True, allow_loss=True),
}


@pytest.mark.parametrize("verb", INDEX_VERBS)
@pytest.mark.parametrize("escape", ESCAPES)
def test_shards_that_an_index_names(escape: str, verb: str, tmp_path: Path) -> None:
    """An index lists files of its folder alone, whatever its names lead through."""
    ck, style, out = world(tmp_path)
    lay, name = ESCAPES[escape]
    lay(ck, out)
    shard = name(out, SHARD)
    if escape in LINKS_OF_FILES:
        _link(ck / SHARD, out / SHARD if escape == "a link for a file" else out / "no.safetensors")
    index = json.loads((ck / INDEX).read_text())
    index["weight_map"] = {t: shard if s == SHARD else s for t, s in index["weight_map"].items()}
    (ck / INDEX).write_text(json.dumps(index))
    before = snapshot(out)
    says = "points outside the checkpoint's folder" if escape in NAMED else "is a link that leads outside"
    with pytest.raises(FormatError, match=rf"{INDEX}: shard .* {says}"):
        INDEX_VERBS[verb](ck, style)
    assert snapshot(out) == before


# ── journals


@pytest.mark.parametrize("place", ["ready", "ending", "removed", "heap", "renamed"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_files_that_a_journal_names(escape: str, place: str, tmp_path: Path) -> None:
    """A journal that came along moves, overwrites, removes and reads nothing elsewhere."""
    ck, style, out = world(tmp_path)
    lay, name = ESCAPES[escape]
    lay(ck, out)
    before = snapshot(out)
    if place == "heap":
        says = {"backslashes": "was removed", "a drive": "was removed"}.get(escape, "is not the name|leads out")
        with pytest.raises(FormatError, match=says):
            read_back(ck, [name(out, "x.json"), 0, 4, 0])
    elif place == "renamed":
        lines = [{"about": {"a": 1}, "boot": ""}, {"renamed": [name(out, "x.json")]}]
        (ck / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = Run(ck, {"a": 1}, resume=True, ranks=ranks())
        if escape in LINKS_OF_FILES:
            run.begin(lambda: None)
            run.end(committed=False)
        else:
            with pytest.raises(SurgeryError, match="is damaged" if escape in NAMED else "is a link, and nothing"):
                run.begin(lambda: None)
    else:
        _in_place_journal(ck, place, name(out, "x.json" if place != "ready" else SHARD), escape, out)
        if escape in LINKS_OF_FILES and place != "ready":
            merge(ck, [style], in_place=True, allow_loss=True)  # the link itself goes
        else:
            says = r"journal: (speaks of|would write to) '.*; leave it, and ask for help with it"
            for resume in (False, True):
                with pytest.raises(FormatError, match=says):
                    merge(ck, [style], in_place=True, resume=resume, allow_loss=True)
    assert snapshot(out) == before


def _in_place_journal(ck: Path, place: str, name: str, escape: str, out: Path) -> None:
    if escape in LINKS_OF_FILES and place == "ready":
        _link(ck / SHARD, out / (SHARD if escape == "a link for a file" else "no.safetensors"))
        (ck / INDEX).unlink()
        (ck / "model-00002-of-00002.safetensors").rename(ck / "model.safetensors")
    last: dict[str, Any] = {
        "ready": {"ready": [[name, 0, 0, 4, 3057449933]], "done": {}},
        "ending": {"ending": {"0": name}, "removed": []},
        "removed": {"ending": {}, "removed": [name]},
    }[place]
    folder = ck / ".lorasurgery-surgery"
    folder.mkdir()
    (folder / "redo").write_bytes(b"\1\2\3\4")
    (folder / "new-0").write_bytes(b"evil")
    lines = [{"about": {"call": "merge ck style --in-place"}}, last]
    (folder / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_surgery_writes_by_the_rules_it_is_read_by(tmp_path: Path) -> None:
    """Whatever asks for it, an operation in place gives no file elsewhere new bytes, a name or an end."""
    ck, _, out = world(tmp_path)
    (ck / "docs").symlink_to(out)
    before = snapshot(out)
    for files, removed in (({"docs/x.json": b"evil"}, []), ({}, ["docs/x.json"]), ({"../victim/x.json": b""}, [])):
        with (
            pytest.raises(FormatError, match=r"which is not in its checkpoint"),
            Surgery(ck, {"call": "x"}, resume=False) as surgery,
        ):
            surgery.finish(files, staged={}, removed=removed)
    with (
        pytest.raises(FormatError, match=r"none of its checkpoint's weights|not in its checkpoint"),
        Surgery(ck, {"call": "x"}, resume=False) as surgery,
    ):
        surgery.put("k", f"docs/{SHARD}", 0, memoryview(b"evil"), None)
        surgery.flush()
    assert snapshot(out) == before


def test_a_journal_folder_that_is_a_link(tmp_path: Path) -> None:
    """It would have another folder cleared away, with a journal in it and without."""
    ck, style, out = world(tmp_path)
    (ck / ".lorasurgery-surgery").symlink_to(out)
    before = snapshot(out)
    with pytest.raises(OutputError, match=r"lorasurgery-surgery: is a link, and nothing is written or removed"):
        merge(ck, [style], in_place=True, allow_loss=True)
    assert snapshot(out) == before


# ── files of its own that a stranger may have put there as links


def test_no_file_is_opened_for_writing_through_a_link(tmp_path: Path) -> None:
    """The last line of defence: the system itself refuses."""
    from lorasurgery.checkpoint.files import WriteFile, make

    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    with pytest.raises(OSError, match="symbolic links"):
        WriteFile(tmp_path / "link")
    make(tmp_path / "link")
    assert (tmp_path / "mine").read_text() == "mine"


def test_commits_and_names() -> None:
    """40 hex digits, no more, no less, and nothing of a path."""
    good = "0123456789abcdef0123456789abcdef01234567"
    assert is_commit(good)
    for bad in (good[:-1], good + "0", good.upper(), "../" + good[3:], "main", "", None, good + "\n", good[:-1] + "/"):
        assert not is_commit(bad)
    assert [n for n in ("a", "a/b", "a.b/c-d_e", "ü/漢") if not is_inside(n)] == []


def test_readers_follow_the_users_own_links_to_weights(tmp_path: Path) -> None:
    """`ln -s` of a weights file or of a part is how people share them: reading is allowed, for weights end as weights."""
    ck = checkpoint(tmp_path / "ck")
    one = tmp_path / "one"
    one.mkdir()
    (one / "model.safetensors").symlink_to(ck / SHARD)
    assert set(Checkpoint.open(one).tensors) == {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("name", ["a/b/c.json", "n" * 250 + "/" + "n" * 256, "config.json/x.json", "lorasurgery-undo"])
def test_names_that_can_be_no_files(name: str, tmp_path: Path) -> None:
    """A record with a name that could get no file is refused before a tensor changes, not after."""
    ck, style, _ = world(tmp_path)
    forged(ck, style, {name: b"evil"})
    before = snapshot(ck)
    with pytest.raises(FormatError, match=r"can't be a file|is a damaged undo record"):
        unmerge(ck, [style], in_place=True)
    assert snapshot(ck) == before


def test_an_odd_name_is_refused_in_place_at_once(tmp_path: Path) -> None:
    """A journal that names a file with a backslash would not be read after a kill; -o writes it as ever."""
    ck, style, _ = world(tmp_path)
    file = tmp_path / "a\\b.safetensors"
    file.write_bytes((ck / SHARD).read_bytes())
    keys = style / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(keys).items() if ".0." in k}, keys)
    before = file.read_bytes()
    with pytest.raises(FormatError, match="the operation speaks of"):
        merge(file, [style], in_place=True, allow_loss=True)
    assert file.read_bytes() == before
    merge(file, [style], tmp_path / "c\\d.safetensors", undo=True, allow_loss=True)
    assert (tmp_path / "c\\d.safetensors").is_file()
