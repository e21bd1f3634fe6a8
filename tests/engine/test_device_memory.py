"""A device whose memory does not suffice: less at a time, then the CPU, the same result, and one warning that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from long_runs import hashes, operation, world
from safetensors.torch import load_file

from lorasurgery.engine.device_memory import Fallback
from lorasurgery.linalg import truncate, undo
from lorasurgery.linalg.blocks import InMemory, Streamed, times, transposed_times
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.rounding import Merger
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction import decompose as extraction
from lorasurgery.ops.extraction import difference
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging import tensor_jobs as jobs
from lorasurgery.ops.unmerge import unmerge

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU = "out of GPU memory at {} of the tensors ({}): done on the CPU, which is slower"
SMALLER = "out of GPU memory at {} of the tensors ({}): done in smaller pieces"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    world(path)
    return path


def full_at(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> list[int]:
    """Let a function be out of the device's memory where `when` says so of its arguments; counts the failures."""
    plain, failures = getattr(owner, name), [0]

    def replaced(*args: Any, **more: Any) -> Any:
        if when(*args, **more):
            failures[0] += 1
            raise torch.OutOfMemoryError(FULL)
        return plain(*args, **more)

    patch.setattr(owner, name, replaced)
    return failures


class First:
    """True for the first calls of each argument that is asked about."""

    def __init__(self, calls: int, key: Callable[..., Any]) -> None:
        self.calls, self.key = calls, key
        self.seen: dict[Any, int] = {}

    def __call__(self, *args: Any, **more: Any) -> bool:
        key = self.key(*args, **more)
        self.seen[key] = self.seen.get(key, 0) + 1
        return self.seen[key] <= self.calls


def test_ways_in_turn() -> None:
    """Each way only where those before it did not fit; other errors are nobody's business here."""

    def too_large() -> int:
        raise torch.OutOfMemoryError(FULL)

    def wrong() -> int:
        raise RuntimeError("a shape is wrong")

    fallback = Fallback()
    assert fallback.first("a", [lambda: 1, wrong]) == (1, 0)
    assert not fallback.warnings
    assert fallback.first("a", [too_large, lambda: 2, wrong]) == (2, 1)
    assert fallback.first("a", [wrong, lambda: 2, wrong], 1) == (2, 1)
    assert fallback.first("b", [too_large, too_large, lambda: 3]) == (3, 2)
    assert fallback.warnings == [
        "out of GPU memory at 2 of the tensors (a, b): 1 of them done on the CPU, which is slower"
    ]
    with pytest.raises(RuntimeError, match="a shape"):
        fallback.first("c", [wrong, lambda: 1])
    with pytest.raises(torch.OutOfMemoryError):
        fallback.first("c", [too_large, too_large])
    assert len(fallback.warnings) == 1


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory"])
def test_libraries_say_it_otherwise(text: str) -> None:
    """cuBLAS, cuSOLVER and the driver raise a RuntimeError that only its words tell from others."""

    def too_large() -> int:
        raise RuntimeError(text)

    assert Fallback().first("a", [too_large, lambda: 2]) == (2, 1)


def test_what_failed_is_let_go_of() -> None:
    """When the next way begins, nothing holds what the failed one had made: its traceback is gone."""
    import weakref

    held: list[Any] = []

    def too_large() -> None:
        matrix = torch.ones(3)
        held.append(weakref.ref(matrix))
        raise torch.OutOfMemoryError(FULL)

    def smaller() -> bool:
        return held[0]() is None

    assert Fallback().first("a", [too_large, smaller]) == (True, 1)


@pytest.mark.parametrize("failures, warning", [(1, SMALLER), (2, SMALLER), (3, CPU)], ids=["halves", "eighths", "cpu"])
@pytest.mark.parametrize("undone", [False, True])
def test_merge_by_rows(
    undone: bool, failures: int, warning: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in halves, eighths, then on the CPU: the same bytes as with memory enough, and what undoes them."""
    expected = merge(folder / "base", [folder / "adapter"], tmp_path / "whole", undo=undone)
    assert not expected.warnings
    full_at(monkeypatch, Merger, "rows", First(failures, lambda self, *_: self))
    report = merge(folder / "base", [folder / "adapter"], tmp_path / "full", undo=undone)
    names = "model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.up_proj.weight, "
    names += "model.layers.0.self_attn.q_proj.weight and 21 more"
    assert report.warnings == [warning.format(24, names)]
    weights = {n for n in hashes(tmp_path / "whole") if n.startswith("model-")}
    assert {n: hashes(tmp_path / "full")[n] for n in weights} == {n: hashes(tmp_path / "whole")[n] for n in weights}
    if undone:
        monkeypatch.undo()
        unmerge(tmp_path / "full", [folder / "adapter"], tmp_path / "back")
        assert {n: hashes(tmp_path / "back")[n] for n in weights} == {n: hashes(folder / "base")[n] for n in weights}


def test_merge_of_a_whole_tensor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is merged as a whole goes to the CPU at once."""
    monkeypatch.setattr("lorasurgery.ops.merging.tensor_jobs.is_by_rows", lambda *_, **__: False)
    merge(folder / "base", [folder / "adapter"], tmp_path / "whole")
    full_at(monkeypatch, jobs, "apply_edit", First(1, lambda base, edit, tensor, *_, **__: tensor.name))
    report = merge(folder / "base", [folder / "adapter"], tmp_path / "full")
    (line,) = report.warnings
    assert line.startswith("out of GPU memory at 24 of the tensors (")
    assert line.endswith("done on the CPU, which is slower")
    shard = "model-00001-of-00003.safetensors"
    assert hashes(tmp_path / "whole")[shard] == hashes(tmp_path / "full")[shard]


def test_corrections_and_their_undoing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a merge keeps for its undoing is found on the CPU where the device is full, and so is the undoing itself."""
    once = First(1, lambda self, *_: self)
    full_at(monkeypatch, undo.Undoing, "corrections", once)
    report = merge(folder / "base", [folder / "adapter"], tmp_path / "merged", undo=True)
    assert len(report.warnings) == 1
    full_at(monkeypatch, undo.Undoing, "restore", First(1, lambda self, *_: self))
    report = unmerge(tmp_path / "merged", [folder / "adapter"], tmp_path / "back")
    assert len(report.warnings) == 1
    before, after = hashes(folder / "base"), hashes(tmp_path / "back")
    assert all(after[n] == before[n] for n in before if n.endswith(".safetensors"))


def _adapters_alike(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = (load_file(p / "adapter_model.safetensors") for p in (one, other))
    assert a.keys() == b.keys()
    for key in (k for k in a if "lora_A" in k):
        first, second = (t[key.replace("lora_A", "lora_B")].double() @ t[key].double() for t in (a, b))
        assert float((first - second).norm() / first.norm()) < tolerance


@pytest.mark.parametrize("failures, warning", [(1, SMALLER), (2, CPU)], ids=["blocks", "cpu"])
@pytest.mark.parametrize("where", ["read", "svd"])
def test_extract(
    where: str, failures: int, warning: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that does not fit is read in blocks of rows, and then on the CPU: the same adapter."""
    options = ExtractOptions(RankChoice(rank=8))
    extract(folder / "base", folder / "tuned", tmp_path / "whole", options)
    if where == "svd":
        full_at(monkeypatch, extraction, "truncated_svd", First(failures, lambda delta, *_, **__: delta.shape))
    else:
        full_at(monkeypatch, difference.Difference, "read", First(1, lambda self, piece: piece.old.name))
        if failures == 2:
            full_at(monkeypatch, extraction.PairWork, "_in_blocks", lambda *_: True)
    report = extract(folder / "base", folder / "tuned", tmp_path / "full", options)
    (line,) = report.warnings
    assert line.startswith("out of GPU memory at ")
    assert line.endswith(warning.rpartition(": ")[2])
    _adapters_alike(tmp_path / "whole", tmp_path / "full")


def test_extract_gives_memory_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that could be read but not decomposed is given back before the next way begins."""
    lent: list[int] = []
    taken, given = difference.Difference._take, difference.Difference.give

    def take(self: Any, *args: Any) -> Any:
        lent.append(1)
        return taken(self, *args)

    def give(self: Any, delta: Any) -> None:
        lent.append(-1)
        given(self, delta)

    monkeypatch.setattr(difference.Difference, "_take", take)
    monkeypatch.setattr(difference.Difference, "give", give)

    full_at(monkeypatch, extraction, "truncated_svd", lambda delta, *_, **__: isinstance(delta, InMemory))
    extract(folder / "base", folder / "tuned", tmp_path / "out", ExtractOptions(RankChoice(rank=2)))
    assert sum(lent) == 0


@pytest.mark.parametrize("where", ["read", "svd"])
def test_groups_one_by_one(where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pairs that do not fit together are taken one by one, and a NaN is still named."""
    monkeypatch.setattr(extraction, "BATCHED_DEVICES", ("cpu",))
    monkeypatch.setattr(extraction, "_SIDE", 512)
    monkeypatch.setattr(extraction, "pays", lambda _: False)  # as on a GPU, for which the CPU stands here
    options = ExtractOptions(RankChoice(rank=8))
    extract(folder / "base", folder / "tuned", tmp_path / "whole", options)
    if where == "svd":
        failed = full_at(monkeypatch, extraction, "batched_svd", lambda *_: True)
    else:
        failed = full_at(monkeypatch, difference.Difference, "read", lambda self, *pieces: len(pieces) > 1)
    report = extract(folder / "base", folder / "tuned", tmp_path / "full", options)
    assert failed[0] >= 3
    (line,) = report.warnings
    assert line.endswith("done in smaller pieces")
    _adapters_alike(tmp_path / "whole", tmp_path / "full", 1e-3)  # alone they are not small, and sketched


def test_blend(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that does not fit is blended on the CPU: the same bytes."""
    operation("blend", folder, tmp_path / "whole")
    full_at(monkeypatch, truncate, "recompress", First(1, lambda *_: "any"))
    report = operation("blend", folder, tmp_path / "full")
    assert len(report.warnings) == 1
    one, other = (hashes(tmp_path / name)["adapter_model.safetensors"] for name in ("whole", "full"))
    assert one == other


def test_blocks_of_rows_on_a_gpu() -> None:
    """There a span is what there is room for, not the whole matrix; the products are the same."""
    matrix = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked: list[slice] = []

    def make(rows: slice) -> torch.Tensor:
        asked.append(rows)
        return matrix[rows]

    blocks = Streamed(make, (200, 30), torch.float64, torch.device("meta"), 70 * 30 * 8)
    blocks.device = torch.device("cpu")  # for the products; the step was chosen for a device that is none
    y = torch.randn(200, 3, dtype=torch.float64)
    assert torch.allclose(transposed_times(blocks, y), matrix.T @ y)
    assert [s.stop - s.start for s in asked] == [64, 64, 64, 8]
    assert torch.allclose(times(blocks, y[:30]), matrix @ y[:30])
