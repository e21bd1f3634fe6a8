"""Exact undo: on any machine, stacked, and refused by name where it would not be exact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from long_runs import hashes, world
from safetensors.torch import load_file, save_file
from test_undo_rows import same_bytes
from torch import Tensor

from lorasurgery.errors import FormatError, SurgeryError, UsageError
from lorasurgery.linalg import undo as arithmetic
from lorasurgery.linalg.rounding import add_updates
from lorasurgery.linalg.undo import Undoing
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.merge import merge
from lorasurgery.ops.merging import tensor_jobs as jobs
from lorasurgery.ops.merging.undo.recorder import pack_corrections, unpack_corrections
from lorasurgery.ops.unmerge import unmerge

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    world(path)
    scaled(path, "small", 0.01)
    merge(path / "base", [path / "small"], path / "merged", undo=True)
    return path


def scaled(folder: Path, name: str, factor: float) -> Path:
    """The world's adapter, its update made smaller or larger."""
    shutil.copytree(folder / "adapter", folder / name)
    tensors = load_file(folder / name / "adapter_model.safetensors")
    tensors = {k: (v * factor if "lora_B" in k else v) for k, v in tensors.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors", {"format": "pt"})
    return folder / name


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def weights(generator: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Values over the whole range of a dtype: tiny ones, zeros of both signs, powers of two, subnormals."""
    value = 0.05 * torch.randn(rows, columns, generator=generator)
    value *= torch.exp2(torch.randint(-20, 4, (rows, columns), generator=generator).float())
    value[0, 0], value[0, -1] = -0.0, 0.0
    return value.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 9), size=st.floats(-12, 1), terms=st.integers(1, 3))
def test_whatever_order_the_sum_is_taken_in(dtype: torch.dtype, seed: int, rank: int, size: float, terms: int) -> None:
    """A machine whose Δ is off by as much as float64 sums can be restores the same bits, each value off its own way."""
    generator = torch.Generator().manual_seed(seed)
    old = weights(generator, dtype, 7, 11)
    updates = [
        LowRank(torch.randn(7, rank, generator=generator), torch.randn(rank, 11, generator=generator), 2.0**size)
        for _ in range(terms)
    ]
    merged, _ = add_updates(old, updates, dtype)
    undoing = Undoing(updates, dtype)
    kept = unpack_corrections(pack_corrections(undoing.corrections(old, merged, 0), dtype.itemsize), dtype.itemsize, 77)
    plain = Undoing._before
    unit, count = 2.0**-53, sum(u.rank for u in updates) + 2 * terms + 2

    def off(self: Undoing, rows: Tensor, value: Tensor, first: int) -> None:
        plain(self, rows, value, first)
        most = count * unit * (self.spread + float(rows.to(torch.float64).abs().amax()))
        value += most * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1)

    out = torch.empty_like(old)
    for machine in (plain, off, off):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Undoing, "_before", machine)
            undoing.restore(merged, kept, out, 0)
        assert torch.equal(bits(out), bits(old))


def test_the_doubt_is_needed() -> None:
    """Without the values kept for doubt, a sum taken otherwise does turn some roundings: the test above can fail."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, 64, generator=generator)
    update = LowRank(torch.randn(64, 8, generator=generator), torch.randn(8, 64, generator=generator), 1e6)
    merged, _ = add_updates(old, [update], torch.float32)
    undoing = Undoing([update], torch.float32)
    kept = undoing.corrections(old, merged, 0)
    assert len(kept.doubtful) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "_EPS", 0.0)
        blind = Undoing([update], torch.float32).corrections(old, merged, 0)
    assert len(blind.doubtful) == 0
    plain, out = Undoing._before, torch.empty_like(old)

    def off(self: Undoing, rows: Tensor, value: Tensor, first: int) -> None:
        plain(self, rows, value, first)
        value += 2.0**-50 * self.spread

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Undoing, "_before", off)
        undoing.restore(merged, blind, out, 0)
        assert not torch.equal(bits(out), bits(old))
        undoing.restore(merged, kept, out, 0)
    assert torch.equal(bits(out), bits(old))


MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "2"},
}


@pytest.mark.parametrize("machine", MACHINES)
def test_undone_elsewhere(machine: str, folder: Path, tmp_path: Path) -> None:
    """Other threads, other vector instructions of torch and MKL: the base's bytes, from one record."""
    code = (
        "import sys; from lorasurgery.ops.unmerge import unmerge; "
        "unmerge(sys.argv[1], [sys.argv[2]], sys.argv[3], device='cpu')"
    )
    arguments = [folder / "merged", folder / "small", tmp_path / "back"]
    subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ | MACHINES[machine], check=True)
    assert same_bytes(tmp_path / "back", folder / "base")


def test_other_blocks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and pieces of other sizes change nothing: what a record holds says where its stretches begin."""
    monkeypatch.setattr(jobs, "PIECE", 1 << 14)
    monkeypatch.setattr(arithmetic, "block_height", lambda columns, device: 3)
    unmerge(folder / "merged", [folder / "small"], tmp_path / "back")
    assert same_bytes(tmp_path / "back", folder / "base")
    merge(folder / "base", [folder / "small"], tmp_path / "merged", undo=True)
    monkeypatch.undo()
    unmerge(tmp_path / "merged", [folder / "small"], tmp_path / "again")
    assert same_bytes(tmp_path / "again", folder / "base")


def test_merges_stack(folder: Path, tmp_path: Path) -> None:
    """Three merges, undone in reverse order, each to the bytes before it; out of order is refused by name."""
    other = scaled(folder, "other", 0.02)
    adapters = [folder / "small", other, folder / "adapter"]
    states = [folder / "base"]
    for i, adapter in enumerate(adapters):
        merge(states[-1], [adapter], tmp_path / f"m{i}", undo=True, weights=[0.5 + i])
        states.append(tmp_path / f"m{i}")
    records = sorted(p.name for p in (states[-1] / "lorasurgery-undo").iterdir())
    assert records == ["0001.safetensors", "0002.safetensors", "0003.safetensors"]
    with pytest.raises(SurgeryError, match="other was merged before adapter; undo adapter first"):
        unmerge(states[-1], [other], tmp_path / "no")
    with pytest.raises(SurgeryError, match="adapter was merged after other; undo adapter first"):
        unmerge(states[-1], [other], tmp_path / "no", undo_file=states[-1] / "lorasurgery-undo/0002.safetensors")
    for i in (2, 1, 0):
        back = tmp_path / f"b{i}"
        unmerge(states[i + 1] if i == 2 else tmp_path / f"b{i + 1}", [adapters[i]], back)
        assert same_bytes(back, states[i])
    assert not (tmp_path / "b0/lorasurgery-undo").exists()


def test_several_at_once_in_any_order(folder: Path, tmp_path: Path) -> None:
    """Adapters merged together are undone together, in whatever order they are named."""
    other = scaled(folder, "third", 0.03)
    merge(folder / "base", [folder / "small", other], tmp_path / "m", undo=True, weights=[0.7, -0.3])
    unmerge(tmp_path / "m", [other, folder / "small"], tmp_path / "b")
    assert same_bytes(tmp_path / "b", folder / "base")
    with pytest.raises(SurgeryError, match=r"third is not among those given"):
        unmerge(tmp_path / "m", [folder / "small"], tmp_path / "c")
    with pytest.raises(UsageError, match=r"third was merged with weight -0.3"):
        unmerge(tmp_path / "m", [other, folder / "small"], tmp_path / "c", weights=[0.7])


def changed_adapter(folder: Path) -> None:
    tensors = load_file(folder / "small/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, folder / "small/adapter_model.safetensors", {"format": "pt"})


def changed_alpha(folder: Path) -> None:
    config = json.loads((folder / "small/adapter_config.json").read_text()) | {"lora_alpha": 17}
    (folder / "small/adapter_config.json").write_text(json.dumps(config))


def changed_weight(folder: Path) -> None:
    file = folder / "merged/model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_record(folder: Path) -> None:
    file = folder / "merged/lorasurgery-undo/0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damaged_record(folder: Path) -> None:
    file = folder / "merged/lorasurgery-undo/0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-40] ^= 255
    file.write_bytes(data)


def other_file(folder: Path) -> None:
    shutil.copy(folder / "base/model-00001-of-00003.safetensors", folder / "merged/lorasurgery-undo/0001.safetensors")


REFUSED = {
    changed_adapter: "is not the adapter that was merged",
    changed_alpha: "is not the adapter that was merged",
    changed_weight: "is not what the merge of small wrote",
    cut_record: "cut short",
    damaged_record: "damaged|does not come back",
    other_file: "is not an undo record",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_refused(spoil: object, folder: Path, tmp_path: Path) -> None:
    """A changed adapter, checkpoint or record is named in one line; nothing is written, in place neither."""
    for name in ("base", "small", "merged"):
        shutil.copytree(folder / name, tmp_path / name)
    spoil(tmp_path)  # type: ignore[operator]
    before = hashes(tmp_path)
    for where in ({"out": tmp_path / "back"}, {"in_place": True}):
        with pytest.raises((SurgeryError, FormatError), match=REFUSED[spoil]) as raised:  # type: ignore[index]
            unmerge(tmp_path / "merged", [tmp_path / "small"], **where)
        assert "\n" not in str(raised.value)
    after = {k: v for k, v in hashes(tmp_path).items() if "lock" not in k}
    assert after == before


def test_without_the_record_it_rounds(folder: Path, tmp_path: Path) -> None:
    """--no-undo subtracts and rounds, as for a merge without a record: close to the base, and not equal."""
    unmerge(folder / "merged", [folder / "small"], tmp_path / "back", undo=False)
    assert not same_bytes(tmp_path / "back", folder / "base")
    a, b = (load_file(f / "model-00001-of-00003.safetensors") for f in (tmp_path / "back", folder / "base"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((a[name].float() - b[name].float()).norm() / b[name].float().norm()) < 1e-2
    assert not (tmp_path / "back/lorasurgery-undo").exists()


def test_stochastic_merges_come_back(folder: Path, tmp_path: Path) -> None:
    """A merge that rounded at random is undone to the bit as well."""
    merge(folder / "base", [folder / "small"], tmp_path / "m", undo=True, rounding="stochastic", seed=3)
    unmerge(tmp_path / "m", [folder / "small"], tmp_path / "b")
    assert same_bytes(tmp_path / "b", folder / "base")


def test_a_merge_without_undo_drops_the_records(folder: Path, tmp_path: Path) -> None:
    """Records speak of bytes: a further merge that keeps none leaves none that would be untrue."""
    merge(folder / "merged", [folder / "adapter"], tmp_path / "m")
    assert not (tmp_path / "m/lorasurgery-undo").exists()
    shutil.copytree(folder / "merged", tmp_path / "inside")
    merge(tmp_path / "inside", [folder / "adapter"], in_place=True, undo=False)
    assert not (tmp_path / "inside/lorasurgery-undo").exists()
    assert same_bytes(tmp_path / "inside", tmp_path / "m")


def test_undo_with_a_dtype_is_refused(folder: Path, tmp_path: Path) -> None:
    """What --dtype rounds away is in no record."""
    with pytest.raises(UsageError, match="undo=True: what dtype rounds away"):
        merge(folder / "base", [folder / "small"], tmp_path / "m", undo=True, dtype="F16")


def test_a_single_file(folder: Path, tmp_path: Path) -> None:
    """The records of a single file lie beside it."""
    base = tmp_path / "one.safetensors"
    save_file(load_file(folder / "base/model-00001-of-00003.safetensors"), base)
    keep = {k: v for k, v in load_file(folder / "small/adapter_model.safetensors").items() if ".layers.0." in k}
    (tmp_path / "a").mkdir()
    save_file(keep, tmp_path / "a/adapter_model.safetensors")
    shutil.copy(folder / "small/adapter_config.json", tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "m.safetensors", undo=True)
    assert (tmp_path / "m.safetensors.lorasurgery-undo/0001.safetensors").exists()
    unmerge(tmp_path / "m.safetensors", [tmp_path / "a"], tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == base.read_bytes()
    untouched = base.read_bytes()
    merge(base, [tmp_path / "a"], in_place=True)
    assert base.read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    unmerge(base, [tmp_path / "a"], in_place=True)
    assert base.read_bytes() == untouched
