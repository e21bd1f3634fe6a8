"""Output appears whole or not at all, byte for byte as safetensors would write it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.checkpoint.output import Output, check_output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor, index_json, parse_size, split_shards
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.atomic_file import PARTIAL
from lorasurgery.errors import OutputError, UsageError

ONE = PlannedFile("model.safetensors", (PlannedTensor("w", "F32", (2,)),), {"format": "pt"})


def write_one(out: Path, overwrite: bool = False, value: float = 1.0) -> None:
    with Output(out, overwrite=overwrite) as output:
        with output.tensor_file(ONE) as file:
            file.write("w", torch.full((2,), value))
        output.write_bytes("sub/config.json", b"{}")
        output.commit(last="model.safetensors")


def test_rewriting_an_unchanged_file_gives_the_same_bytes(tmp_path: Path) -> None:
    """A file by safetensors, copied tensor by tensor through our writer, is the same file to the byte."""
    source = tmp_path / "a.safetensors"
    tensors = {"b": torch.zeros(3, dtype=torch.int64), "a": torch.ones(5), "é": torch.ones(1, dtype=torch.bool)}
    save_file(tensors, source, {"format": "pt", "note": "ü"})
    base = Checkpoint.open(source)
    header = base.files["a.safetensors"]
    planned = PlannedFile("b.safetensors", tuple(PlannedTensor(t.name, t.dtype, t.shape) for t in base.tensors.values()),
                          header.metadata)  # fmt: skip
    with Output(tmp_path / "b.safetensors", overwrite=False) as output:
        with output.tensor_file(planned) as file:
            for t in planned.tensors:
                file.write(t.name, base.chunks(t.name))
        output.commit(last="b.safetensors")
    # the library orders metadata keys by hash, so compare what follows and what they mean
    ours, theirs = ((tmp_path / n).read_bytes() for n in ("b.safetensors", "a.safetensors"))
    assert len(ours) == len(theirs)
    assert ours[-32:] == theirs[-32:]
    again = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


def test_wide_dtypes_come_first_where_they_would_lie_askew() -> None:
    """Three bytes before a float32 would misalign it, so the wider tensor is written first."""
    planned = PlannedFile("x", (PlannedTensor("a", "U8", (3,)), PlannedTensor("b", "F32", (1,))), {})
    assert [t.name for t in planned.tensors] == ["b", "a"]


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    """An exception inside removes every partial file, and the folder when it was made for them."""
    out = tmp_path / "deep/out"
    with pytest.raises(RuntimeError), Output(out, overwrite=False) as output:
        with output.tensor_file(ONE) as file:
            file.write("w", torch.zeros(2))
        raise RuntimeError
    assert not (tmp_path / "deep").exists()


def test_a_tensor_too_few_or_of_another_size_is_refused(tmp_path: Path) -> None:
    """A file must hold exactly what its header promised."""
    with pytest.raises(ValueError, match="planned but not written"), Output(tmp_path / "o", overwrite=False) as output:
        with output.tensor_file(ONE):
            pass
    with pytest.raises(ValueError, match="bytes were written"), Output(tmp_path / "o", overwrite=False) as output:
        with output.tensor_file(ONE) as file:
            file.write("w", torch.zeros(3))
    assert not (tmp_path / "o").exists()


def test_overwrite_replaces_weights_and_nothing_else(tmp_path: Path) -> None:
    """Stale shards and index go, a user's own files stay."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}})
    )
    (out / "notes.txt").write_text("mine")
    (out / "other.safetensors").write_bytes(b"mine")
    (out / f".model.safetensors{PARTIAL}").write_bytes(b"of a killed run")
    write_one(out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "notes.txt", "other.safetensors", "sub"]


def test_output_is_checked_against_inputs(tmp_path: Path) -> None:
    """Equal to an input, inside one, around one, or there already: refused, --overwrite or not where it must be."""
    base = tmp_path / "base"
    write_one(base)
    for out, said in (
        (base, "is the input .*base, or"),
        (base / "inner", "or lies inside it"),
        (tmp_path, "holds the input .*base, which"),
    ):
        with pytest.raises(OutputError, match=said):
            check_output(out, [base], overwrite=True)
    with pytest.raises(OutputError, match=r"holds the input .*model.safetensors, which"):
        check_output(base, [base / "model.safetensors"], overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(OutputError, match=r"link: is the input .*base, or"):
        check_output(link, [base], overwrite=True)
    full = tmp_path / "full"
    write_one(full)
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(full, [base], overwrite=False)
    check_output(full, [base], overwrite=True)
    check_output(tmp_path / "new", [base], overwrite=False)


def test_the_last_file_comes_last(tmp_path: Path) -> None:
    """Until commit nothing has its final name; afterwards nothing has a partial one."""
    with Output(tmp_path / "o", overwrite=False) as output:
        with output.tensor_file(ONE) as file:
            file.write("w", torch.zeros(2))
        lock, partial = sorted(p.name for p in (tmp_path / "o").iterdir())
        assert (lock, partial[:19], partial[-len(PARTIAL) :]) == (LOCK, ".model.safetensors.", PARTIAL)
        output.commit(last="model.safetensors")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["model.safetensors"]


def test_shards_and_index() -> None:
    """Tensors are dealt in order, none is lost, and the index says where each lies."""
    tensors = tuple(PlannedTensor(f"t{i}", "F32", (i + 1,)) for i in range(20))
    files = split_shards([PlannedFile("a", tensors[:7], {}), PlannedFile("b", tensors[7:], {})], 100)
    assert [t.name for f in files for t in f.tensors] == [t.name for t in tensors]
    assert all(sum(t.nbytes for t in f.tensors) <= 100 for f in files)
    index = index_json(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert set(index["weight_map"]) == {t.name for t in tensors}


SIZES = {
    "": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4, "K": 1000, "M": 1000**2, "G": 1000**3,
    "T": 1000**4, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3,
    "Ti": 1024**4,
}  # fmt: skip


@pytest.mark.parametrize("unit", SIZES)
def test_every_unit_of_size(unit: str) -> None:
    """Decimal units count in thousands and binary ones in 1024s, in capitals or not, with a space or not."""
    for spelt in (unit, unit.lower(), unit.upper(), f" {unit}"):
        assert parse_size(f"3{spelt}") == 3 * SIZES[unit]
        assert parse_size(f"2.5{spelt}") == int(2.5 * SIZES[unit])


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "0", "1e9", "0.1B", "5i", "5iB", "5PB", "5BB"])
def test_senseless_sizes(text: str) -> None:
    """A size that means nothing is a usage error."""
    with pytest.raises(UsageError, match=f"^size '{text}': expected a number with KB, MB, GB"):
        parse_size(text)


def test_kill_leaves_only_partial_names(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing: no file has a name that a reader would take for finished."""
    script = f"""
import sys, time, torch
from pathlib import Path
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
files = [PlannedFile(f"model-{{i}}.safetensors", (PlannedTensor("w", "F32", (2,)),), {{}}) for i in range(3)]
with Output(Path({str(tmp_path / "out")!r}), overwrite=False) as output:
    for f in files[:2]:
        with output.tensor_file(f) as file:
            file.write("w", torch.zeros(2))
    print("half", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    names = [p.name for p in (tmp_path / "out").iterdir() if p.name != LOCK]
    assert len(names) == 2
    assert all(n.endswith(PARTIAL) for n in names)
    with pytest.raises(OutputError, match="interrupted"):
        check_output(tmp_path / "out", [], overwrite=False)
    write_one(tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "out").glob(f"*{PARTIAL}"))
