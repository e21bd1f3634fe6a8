"""A run that was killed goes on: the same bytes as one that was not, and nothing done twice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from long_runs import hashes, kill_after, left, operation, world
from safetensors.torch import load_file, save_file

from lorasurgery.checkpoint import journal
from lorasurgery.checkpoint.journal import journals
from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.errors import MismatchError, OutputError, SurgeryError
from lorasurgery.ops.merge import merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    world(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What undisturbed runs write, by operation."""
    found = {}
    for name in ("merge", "unmerge", "extract", "extract --budget", "blend"):
        out = tmp_path_factory.mktemp("whole") / "out"
        operation(name, folder, out)
        found[name] = hashes(out)
        assert not [n for n in found[name] if n.startswith(".")]
    return found


@pytest.mark.parametrize("name", ["merge", "extract"])
def test_ten_kills(name: str, folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """kill -9 at ten random moments, then --resume: the same bytes as an undisturbed run, less work, no remains."""
    moments, worked = random.Random(name), 0
    for i in range(10):
        out = tmp_path / str(i)
        if not kill_after(name, folder, out, moments.randrange(1, 22), moments.random() * 0.02):
            continue
        assert all(name.endswith(".lorasurgery-partial") for name in left(out))
        with pytest.raises(OutputError, match="resume=True goes on with it"):
            operation(name, folder, out)
        report = operation(name, folder, out, resume=True)
        assert report.resumed >= 1
        assert hashes(out) == whole[name]
        worked += 1
    assert worked >= 8, "killed too late to prove anything"


@pytest.mark.parametrize("name", ["unmerge", "extract --budget", "blend"])
def test_killed_twice(name: str, folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Two kills in one run, the second while it is being resumed."""
    out = tmp_path / "out"
    assert kill_after(name, folder, out, 3, 0.005)
    assert kill_after(name, folder, out, 6, 0.005, resume=True)
    report = operation(name, folder, out, resume=True)
    assert report.resumed >= 7
    assert hashes(out) == whole[name]


def test_resume_does_only_what_is_missing(folder: Path, tmp_path: Path) -> None:
    """What was finished is neither read nor computed again."""
    all_of_it = operation("merge", folder, tmp_path / "whole").bytes_read
    assert kill_after("merge", folder, tmp_path / "out", 20, 0.0)
    assert operation("merge", folder, tmp_path / "out", resume=True).bytes_read < 0.5 * all_of_it


def test_resume_with_nothing_to_resume(folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """--resume starts a run that nobody began, and leaves a finished output alone."""
    operation("merge", folder, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == whole["merge"]
    with pytest.raises(OutputError, match="overwrite=True"):
        operation("merge", folder, tmp_path / "out", resume=True)


def test_overwrite_starts_anew(folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """--overwrite clears what a killed run left."""
    assert kill_after("merge", folder, tmp_path / "out", 5, 0.0)
    report = operation("merge", folder, tmp_path / "out", overwrite=True)
    assert report.resumed == 0
    assert hashes(tmp_path / "out") == whole["merge"]


def test_other_inputs_or_options_are_refused(tmp_path: Path) -> None:
    """A shard that was touched, another option: one line says what differs, and nothing is lost."""
    world(tmp_path)
    out = tmp_path / "out"
    assert kill_after("merge", tmp_path, out, 5, 0.0)
    (out / LOCK).unlink()
    before = hashes(out)
    with pytest.raises(MismatchError, match="another options"):
        merge(tmp_path / "base", [tmp_path / "adapter"], out, rounding="stochastic", seed=1, resume=True)
    with pytest.raises(MismatchError, match="another command"):
        operation("unmerge", tmp_path, out, resume=True)
    shard = tmp_path / "base/model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes())  # the same bytes, a later time
    with pytest.raises(MismatchError, match=r"input base.*overwrite=True"):
        operation("merge", tmp_path, out, resume=True)
    assert hashes(out) == before
    operation("merge", tmp_path, out, overwrite=True)


def test_a_power_cut_loses_what_was_not_synced(
    folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of the machine only synced lines count; those are as good as ever, a torn last line is none."""
    out = tmp_path / "out"
    assert kill_after("merge", folder, out, 12, 0.0)
    (lines,) = journals(out)
    with lines.open("a") as file:
        file.write('{"done": "model.norm.w')
    monkeypatch.setattr(journal, "_boot", lambda: "another start")
    report = operation("merge", folder, out, resume=True)
    assert report.resumed == 0
    assert hashes(out) == whole["merge"]


def test_a_kill_between_the_renames(folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Killed when some files have their names already: they are taken back, and the commit is made again."""
    out = tmp_path / "out"
    assert kill_after("merge", folder, out, 25, 0.0)
    (partial,) = out.glob(".model-00001-of-00003.safetensors.*.lorasurgery-partial")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with journals(out)[0].open("a") as file:
        file.write(json.dumps({"renamed": names}) + "\n")
    partial.rename(out / names[0])
    operation("merge", folder, out, resume=True)
    assert hashes(out) == whole["merge"]


def test_damaged_factors_are_noticed(folder: Path, tmp_path: Path) -> None:
    """Factors that are not what was written, or gone, are not taken."""
    out = tmp_path / "out"
    assert kill_after("extract", folder, out, 8, 0.0)
    (factors,) = journals(out, journal.FACTORS)
    data = bytearray(factors.read_bytes())
    data[10] ^= 1
    factors.write_bytes(data)
    with pytest.raises(SurgeryError, match="damaged"):
        operation("extract", folder, out, resume=True)
    factors.unlink()
    with pytest.raises(SurgeryError, match=r"was removed.*overwrite=True"):
        operation("extract", folder, out, resume=True)


def test_a_file_that_was_removed_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Half of a shard was written and somebody removed it: the resumed run must not make a new one with zeros in it."""
    out = tmp_path / "out"
    assert kill_after("merge", folder, out, 5, 0.0)
    (partial,) = out.glob(".model-00001-of-00003.safetensors.*.lorasurgery-partial")
    partial.unlink()
    with pytest.raises(OutputError, match=r"was removed.*overwrite=True"):
        operation("merge", folder, out, resume=True)
    operation("merge", folder, out, overwrite=True)


def test_small_remains_go_and_large_ones_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails early leaves nothing; one that worked long keeps what it has for --resume."""
    for kept, expected in ((10**9, False), (1, True)):
        out = tmp_path / str(kept)
        monkeypatch.setattr(journal, "KEPT", kept)

        def stop(name: str, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            operation("merge", folder, out, progress=stop)
        assert bool(out.exists() and journals(out)) == expected
    assert operation("merge", folder, tmp_path / "1", resume=True).resumed


def test_a_name_that_looks_like_a_pattern(folder: Path, tmp_path: Path) -> None:
    """An output named m[1].safetensors is resumed, and its journal goes, like that of any other."""
    shard, out = folder / "base" / "model-00001-of-00003.safetensors", tmp_path / "m[1].safetensors"
    (tmp_path / "base").mkdir()
    base = tmp_path / "base" / "model.safetensors"
    base.write_bytes(shard.read_bytes())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file({k: v for k, v in tensors.items() if ".layers.0." in k}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_bytes((folder / "adapter/adapter_config.json").read_bytes())
    merge(base, [tmp_path / "adapter"], out, undo=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", out.name, f"{out.name}.lorasurgery-undo"]
    merge(base, [tmp_path / "adapter"], out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", out.name]  # no record of what is gone


def test_what_overwrite_was_to_replace_goes(folder: Path, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """A run that began with --overwrite and is resumed without it still retires the old output's index and shards."""
    out = tmp_path / "out"
    operation("unmerge", folder, out)  # another number of shards
    old = {p.name for p in out.glob("*.safetensors")}
    assert kill_after("merge", folder, out, 5, 0.0, overwrite=True)
    assert {p.name for p in out.glob("*.safetensors")} == old  # nothing is touched before the end
    operation("merge", folder, out, resume=True)
    assert hashes(out) == whole["merge"]
