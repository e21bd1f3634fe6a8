"""switch and unmerge where no record says what is in a checkpoint: nothing is added, or called restored, in silence."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from undo_world import adapter, llama, sums

from lorasurgery.checkpoint.inplace import transaction as surgery
from lorasurgery.checkpoint.inplace.recover import unfinished
from lorasurgery.checkpoint.inplace.transaction import Surgery
from lorasurgery.cli.main import main
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.ops.merge import merge
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge

TOKENIZER = "tokenizer_config.json"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """base, three adapters, and the base with `style` merged into it without a record for undoing."""
    base = llama(tmp_path / "base", torch.bfloat16, 64)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / TOKENIZER).write_text('{"of": "base"}')
    for seed, name in enumerate(("style", "topic", "other")):
        adapter(base, tmp_path / name, 4, 0.05, seed)
    merge(base, [tmp_path / "style"], tmp_path / "merged", device="cpu")
    return tmp_path


def cli(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.stdout, done.stderr


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--json"], ["-q"]])
def test_switch_without_a_record_is_refused(options: Sequence[str], world: Path) -> None:
    """A plain base, a merge without --undo, and one whose records were deleted: one line names every way, nothing changes."""
    merge(world / "base", [world / "style"], world / "lost", undo=True, device="cpu")
    shutil.rmtree(world / "lost/lorasurgery-undo")
    single = Path(shutil.copy(world / "merged/model.safetensors", world / "single.safetensors"))
    for place in (world / "base", world / "merged", world / "lost", single):
        before = bytes_in(world)
        code, out, err = cli("switch", place, "--to", world / "topic", *options)
        assert (code, out) == (1, "")
        assert err.startswith(
            f"lorasurgery: {place}: no undo record says which adapter is in it, so none can be taken out"
        )
        assert all(way in err for way in ("--add puts", "--base BASE begins", "lorasurgery unmerge"))
        assert ("says that style was merged" in err) == (place.name in ("merged", "lost"))
        assert len(err.splitlines()) == 1
        assert bytes_in(world) == before


def test_the_moves_that_the_line_names(world: Path) -> None:
    """--add, --base and the unmerge command do as they stand there what the line says of them."""
    _, _, line = cli("switch", world / "merged", "--to", world / "topic")
    command = shlex.split(line.partition("`lorasurgery ")[2].partition("`")[0])
    restored = world / "restored"
    words = [str(restored) if w == "OUT" else str(world / "style") if w == "style" else w for w in command]
    assert cli(*words)[0] == 0
    added, rebased = (Path(shutil.copytree(world / "merged", world / name)) for name in ("added", "rebased"))
    assert cli("switch", added, "--to", world / "topic", "--add")[0] == 0
    assert cli("switch", rebased, "--to", world / "topic", "--base", world / "base")[0] == 0


def test_add_is_a_merge_on_top(world: Path) -> None:
    """--add gives the bytes of merge --in-place, with or without records below, and each comes out again to the bit."""
    for place in ("base", "merged"):
        ours, theirs = (Path(shutil.copytree(world / place, world / f"{place}-{n}")) for n in ("ours", "theirs"))
        for name in ("topic", "other"):
            report = switch(ours, [world / name], add=True, device="cpu")
            assert report.summary.startswith("nothing is taken out; ")
            assert report.totals["from"] == []
            merge(theirs, [world / name], in_place=True, device="cpu")
            assert sums(ours) == sums(theirs)
        for name in ("other", "topic"):
            unmerge(ours, [world / name], in_place=True, device="cpu")
        assert sums(ours) == sums(world / place)


def test_base_begins_again(world: Path) -> None:
    """--base gives the bytes of a merge into the base, tokenizer and config with it; unmerge then gives the base's."""
    (world / "style" / TOKENIZER).write_text('{"of": "style"}')
    merge(world / "base", [world / "style"], world / "worn", device="cpu")
    shutil.copy(world / "topic" / "adapter_config.json", world / "topic" / "kept.json")
    keys = load_file(world / "topic/adapter_model.safetensors")
    only = {k: t for k, t in keys.items() if "q_proj" in k}  # so that tensors of `style` alone must be put back
    save_file(only, world / "topic/adapter_model.safetensors", {"format": "pt"})
    merge(world / "base", [world / "topic"], world / "wanted", device="cpu")
    plan = switch(world / "worn", [world / "topic"], base=world / "base", dry_run=True)
    assert plan.dry_run
    report = switch(world / "worn", [world / "topic"], base=world / "base", device="cpu")
    assert report.summary.startswith(f"begun from {world / 'base'}; ")
    assert sums(world / "worn") == sums(world / "wanted")
    assert (world / "worn" / TOKENIZER).read_text() == '{"of": "base"}'
    assert [s.name for s in report.sources or ()] == ["worn", "base", "topic"]
    unmerge(world / "worn", [world / "topic"], in_place=True, device="cpu")
    assert sums(world / "worn") == sums(world / "base")


def test_a_base_that_is_none(world: Path) -> None:
    """Another model as --base, two ways at once, and a base beside a record are refused before anything is read."""
    other = llama(world / "wider", torch.bfloat16, 128)
    with pytest.raises(MismatchError, match=r"wider: model\.layers\.0\.mlp\.down_proj\.weight is not as in"):
        switch(world / "merged", [world / "topic"], base=other, device="cpu")
    with pytest.raises(UsageError, match="add=True and base: say one way to begin, not 2"):
        switch(world / "merged", [world / "topic"], add=True, base=world / "base")
    merge(world / "base", [world / "style"], world / "kept", undo=True, device="cpu")
    with pytest.raises(UsageError, match="base: an undo record takes style out to the bit; omit base"):
        switch(world / "kept", [world / "topic"], base=world / "base", device="cpu")
    (world / "merged" / "vocab.txt").write_text("a")
    with pytest.raises(MismatchError, match=r"vocab\.txt: the tokenizer that is to come has no such file"):
        switch(world / "merged", [world / "topic"], base=world / "base", device="cpu")


def test_a_switch_with_a_record_is_as_it_was(world: Path) -> None:
    """One adapter out, to the bit, and another in."""
    merge(world / "base", [world / "style"], world / "kept", undo=True, device="cpu")
    merge(world / "base", [world / "topic"], world / "wanted", device="cpu")
    report = switch(world / "kept", [world / "topic"], device="cpu")
    assert report.summary.startswith("style is out; ")
    assert sums(world / "kept") == sums(world / "wanted")


def test_unmerging_what_no_record_knows(world: Path) -> None:
    """The first words of the first warning, the summary and the JSON say subtracted, and nothing says restored."""
    for place, name in (("base", "topic"), ("merged", "topic")):
        code, out, err = cli("unmerge", world / place, world / name, "-o", world / f"out-{place}", "--device", "cpu")
        assert code == 0
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert warnings[0].startswith(f"warning: no record says that {name} was ever merged into {world / place}: ")
        assert "the update is subtracted" in warnings[0]
        assert "tensors had the update subtracted, rounded (noise" in out
        assert "restored" not in out + err
        words = ["unmerge", world / place, world / name, "-o", world / f"out-{place}", "--overwrite", "--json"]
        told = json.loads(cli(*words)[1])
        assert told["totals"]["unrecorded"] == [name]
        assert told["warnings"][0].startswith("no record says that")
        assert "restored" not in told["summary"]
        plan = json.loads(cli(*words, "--dry-run")[1])
        assert plan["warnings"][0].startswith("no record says that")
        assert plan["summary"].endswith("no record of the merge")


def test_unmerging_what_a_record_knows(world: Path) -> None:
    """lorasurgery.json, or an undo record that is not used, says it was merged: no warning, and it is called restored."""
    report = unmerge(world / "merged", [world / "style"], world / "a", device="cpu")
    assert not report.warnings
    assert report.totals["unrecorded"] == []
    assert "tensors restored up to rounding" in report.summary
    merge(world / "base", [world / "style"], world / "kept", undo=True, device="cpu")
    (world / "kept/lorasurgery.json").unlink()
    assert not unmerge(world / "kept", [world / "style"], world / "b", undo=False, device="cpu").warnings
    moved = Path(shutil.copytree(world / "style", world / "by-another-name"))
    assert not unmerge(world / "merged", [moved], world / "c", device="cpu").warnings
    both = unmerge(world / "merged", [world / "style", world / "topic"], world / "d", device="cpu")
    assert both.totals["unrecorded"] == ["topic"]


def test_another_strength_than_recorded(world: Path) -> None:
    """What was merged with 0.5 and is subtracted with 1 is said, with the option that is right."""
    merge(world / "base", [world / "style"], world / "half", weights=[0.5], device="cpu")
    report = unmerge(world / "half", [world / "style"], world / "a", device="cpu")
    assert report.warnings[0].startswith("style was merged with weight 0.5, as the record beside ")
    assert report.warnings[0].endswith("; weights=0.5 takes all of it out")
    assert not unmerge(world / "half", [world / "style"], world / "b", weights=[0.5], device="cpu").warnings


@pytest.mark.parametrize(("place", "turn"), [("put", 0), ("put", 2), ("put", 5), ("flush", 0), ("finish", 0)])
def test_a_base_and_a_full_disk(place: str, turn: int, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--base that is cut short: readers are told, the same command with --resume ends on the bytes of an undisturbed run."""
    shutil.rmtree(world / "topic")
    adapter(world / "base", world / "topic", 4, 0.05, 1)
    factors = load_file(world / "topic/adapter_model.safetensors")
    save_file({k: t for k, t in factors.items() if "q_proj" in k}, world / "topic/adapter_model.safetensors")
    merge(world / "base", [world / "topic"], world / "wanted", device="cpu")
    calls, real = [0], getattr(Surgery, place)

    def full(self: Surgery, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > turn:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Surgery, place, full)
    monkeypatch.setattr(surgery, "BATCH", 5000)  # so that some tensors are in their place by then
    with pytest.raises((SurgeryError, OSError), match="No space left"):
        switch(world / "merged", [world / "topic"], base=world / "base", device="cpu")
    monkeypatch.undo()
    if unfinished(world / "merged") is not None:
        with pytest.raises(MismatchError, match="is in the middle of `switch merged base topic`"):
            unmerge(world / "merged", [world / "topic"], world / "nowhere", device="cpu")
        switch(world / "merged", [world / "topic"], base=world / "base", device="cpu", resume=True)
    else:
        switch(world / "merged", [world / "topic"], base=world / "base", device="cpu")
    assert sums(world / "merged") == sums(world / "wanted")
    unmerge(world / "merged", [world / "topic"], in_place=True, device="cpu")
    assert sums(world / "merged") == sums(world / "base")
