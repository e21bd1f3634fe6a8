"""Small pairs of one shape taken together, as on a GPU, against the same pairs one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.peft.read import read_peft
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.journal import Run
from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.engine.ranks import Ranks
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction import decompose as extraction
from lorasurgery.ops.extraction.decompose import plan_groups
from lorasurgery.ops.extraction.pairs import Pair, Treatment
from lorasurgery.ops.factors.workload import Workload
from lorasurgery.report import Report

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LAYERS = 3
SAME = "model.layers.1.self_attn.k_proj"  # unchanged amid those that are taken together


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """(base, tuned): three shapes with biases between them, an embedding, one matrix unchanged, one in other bits."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, Tensor] = {"model.embed_tokens.weight": torch.randn(64, 32, generator=generator)}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for kind, shape in {"q": (32, 32), "k": (32, 32), "o": (32, 32), "v": (16, 32)}.items():
            base[f"{path}.self_attn.{kind}_proj.weight"] = torch.randn(shape, generator=generator)
            base[f"{path}.self_attn.{kind}_proj.bias"] = torch.randn(shape[0], generator=generator)
        base[f"{path}.mlp.up_proj.weight"] = torch.randn(64, 32, generator=generator)
    tuned = {}
    for name, weight in base.items():
        spectrum = torch.arange(1, weight.shape[-1] + 1) ** -1.0
        tuned[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator) * spectrum
    tuned[f"{SAME}.weight"] = base[f"{SAME}.weight"]
    base["model.layers.2.self_attn.k_proj.weight"].zero_()
    tuned["model.layers.2.self_attn.k_proj.weight"] = -base["model.layers.2.self_attn.k_proj.weight"]  # a signed zero
    return _saved(tmp_path / "base", base), _saved(tmp_path / "tuned", tuned)


def _saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def both(
    world: tuple[Path, Path], out: Path, options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[Report, Report]:
    """The reports one by one and together, the adapters in out/alone and out/together."""
    alone = extract(*world, out / "alone", options, device="cpu", **more)
    monkeypatch.setattr(extraction, "BATCHED_DEVICES", ("cpu",))
    sizes: list[int] = []
    plain = extraction.batched_svd

    def counted(deltas: Tensor, choice: RankChoice) -> Any:
        sizes.append(len(deltas))
        return plain(deltas, choice)

    monkeypatch.setattr(extraction, "batched_svd", counted)
    together = extract(*world, out / "together", options, device="cpu", **more)
    assert sorted(sizes) == [3, 4, 9]  # v; up and the embedding; q, k and o of all layers
    return alone, together


def updates(adapter: Path) -> dict[str, Tensor]:
    """ΔW of each module in float64."""
    found = read_peft(adapter)
    return {path: found.load(delta).dense().double() for path, delta in found.deltas.items()}


OPTIONS = {
    "rank": {"choice": RankChoice(rank=4)},
    "energy": {"choice": RankChoice(energy=0.8)},
    "tolerance": {"choice": RankChoice(tolerance=0.2, max_rank=12)},
    "budget": {"choice": RankChoice(budget=Budget(size=30_000))},
    "alpha, rslora, one rank": {"choice": RankChoice(energy=0.5), "alpha": 7.0, "rslora": True, "uniform_rank": True},
    "bfloat16": {"choice": RankChoice(rank=4), "dtype": "BF16"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_together_as_alone(
    options: str, world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same modules in the same order with the same ranks, errors to 1e-6, and updates to 1e-5 of their norm."""
    chosen = ExtractOptions(**OPTIONS[options])
    alone, together = both(world, tmp_path, chosen, monkeypatch)
    assert [(m.name, m.rank, m.alpha, m.kind, m.shape) for m in together.modules] == [
        (m.name, m.rank, m.alpha, m.kind, m.shape) for m in alone.modules
    ]
    loose = chosen.dtype == "BF16"  # which of two neighbours a factor is rounded to can differ
    for one, other in zip(alone.modules, together.modules, strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-2 if loose else 1e-6)
        assert other.delta_norm == pytest.approx(one.delta_norm, rel=1e-6)
    expected, found = updates(tmp_path / "alone"), updates(tmp_path / "together")
    assert expected.keys() == found.keys()
    for path, update in expected.items():
        assert float((found[path] - update).norm() / update.norm()) < (2e-2 if loose else 1e-5)


def test_what_did_not_change_is_left_alone(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes and equal values inside a group count as unchanged and get no factors."""
    alone, together = both(world, tmp_path, ExtractOptions(RankChoice(rank=4)), monkeypatch)
    assert together.totals["unchanged"] == alone.totals["unchanged"] == 2
    names = {m.name for m in together.modules}
    assert SAME not in names
    assert "model.layers.2.self_attn.k_proj" not in names
    assert not any(SAME in key and "lora" in key for key in load_file(tmp_path / "together/adapter_model.safetensors"))


def test_stated_errors_are_measured(world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group too, the error of a module is that of its written factors."""
    _, together = both(world, tmp_path, ExtractOptions(RankChoice(rank=4), dtype="BF16"), monkeypatch)
    base, tuned = (load_file(folder / "model.safetensors") for folder in world)
    found = updates(tmp_path / "together")
    for module in together.modules:
        delta = tuned[f"{module.name}.weight"].double() - base[f"{module.name}.weight"].double()
        update = found[module.name]
        update = update if update.shape == delta.shape else update.T
        assert module.error == pytest.approx(float((delta - update).norm() / delta.norm()), rel=1e-5)


def test_the_one_that_is_not_finite_is_named(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in one matrix of a group stops the work with that one's name."""
    file = world[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(extraction, "BATCHED_DEVICES", ("cpu",))
    with pytest.raises(SurgeryError, match=r"tuned: model\.layers\.1\.self_attn\.o_proj\.weight: .*not finite"):
        extract(*world, tmp_path / "out", device="cpu")


def test_a_group_that_did_not_change_at_all(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no byte differs in a whole group, nothing is decomposed."""
    base, file = load_file(world[0] / "model.safetensors"), world[1] / "model.safetensors"
    tuned = load_file(file)
    save_file({n: base[n] if "v_proj" in n else t for n, t in tuned.items()}, file, {"format": "pt"})
    monkeypatch.setattr(extraction, "BATCHED_DEVICES", ("cpu",))
    report = extract(*world, tmp_path / "out", ExtractOptions(RankChoice(rank=4)), device="cpu")
    assert len(report.modules) == 3 * LAYERS - 2 + LAYERS + 1


def a_pair(
    name: str, shape: tuple[int, ...], treatment: Treatment = "linear", dtype: str = "F32", base: str | None = "F32"
) -> Pair:
    """A pair as its header tells it."""
    infos = [TensorInfo(name, d, shape, 0, 4) if d else None for d in (base, dtype)]
    assert infos[1] is not None
    return Pair(name, name, infos[0], infos[1], treatment)


def test_groups_go_by_shape_and_leave_alone_what_is_not_small() -> None:
    """Only float32 differences that are small and factored stand together; others are one by one, in order."""
    pairs = [a_pair("a", (8, 4)), a_pair("bias", (8,), "full"), a_pair("b", (8, 4), base="BF16"), a_pair("c", (4, 8)),
             a_pair("wide", (8, 4), dtype="F64"), a_pair("new", (8, 4), base=None), a_pair("d", (8, 2, 2), "conv"),
             a_pair("large", (2048, 1024)), a_pair("large", (2048, 1024)), a_pair("whole", (8, 4), "full"),
             a_pair("e", (8, 4), "embedding")]  # fmt: skip
    assert plan_groups(pairs, CUDA, "auto") == [[0, 2, 6, 10], [1], [3], [4], [5], [7], [8], [9]]


@pytest.mark.parametrize("device, method", [(CPU, "auto"), (CUDA, "exact"), (CUDA, "randomized")])
def test_one_by_one_on_a_cpu_and_where_a_method_is_asked_for(device: torch.device, method: Any) -> None:
    """Without a GPU, and with --svd exact or randomized, each pair is a group of its own."""
    assert plan_groups([a_pair(str(i), (8, 4)) for i in range(3)], device, method) == [[0], [1], [2]]


def test_groups_are_bounded() -> None:
    """In number, in the bytes of their differences, in the part of the checkpoint they reach over, and by the limit."""

    def sizes(pairs: list[Pair], limit: int | None = None) -> list[int]:
        return [len(g) for g in plan_groups(pairs, CUDA, "auto", limit)]

    assert sizes([a_pair(str(i), (8, 4)) for i in range(150)]) == [64, 64, 22]
    assert sizes([a_pair(str(i), (128, 8192)) for i in range(20)]) == [16, 4]
    assert sizes([a_pair(str(i), (128, 8192)) for i in range(4)], limit=40 << 20) == [1, 1, 1, 1]
    assert sizes([a_pair(str(i), (128, 8192)) for i in range(4)], limit=200 << 20) == [2, 2]
    far = Pair("far", "far", None, TensorInfo("far", "F32", (1 << 28,), 0, 1 << 30), "full")
    assert sizes([a_pair("a", (8, 4)), far, a_pair("b", (8, 4)), a_pair("c", (8, 4))]) == [1, 1, 2]


def test_a_group_that_was_cut_short_is_done_whole(tmp_path: Path) -> None:
    """After a break a group's work is that of a run without one; what is missing is noted, all is taken in order."""
    run = Run(tmp_path / "out.safetensors", {}, resume=False, ranks=Ranks())
    run.begin(lambda: None)
    run.done.update({"b": 20, "c": 30})
    asked: list[tuple[int, ...]] = []
    taken: list[tuple[int, int]] = []
    seen: list[tuple[str, int, int]] = []

    class Tenfold:
        cost, result = 1, None

        def __init__(self, *items: int) -> None:
            asked.append(items)
            self.items = items

        def read(self) -> None: ...

        def compute(self) -> None:
            found: Any = [10 * i for i in self.items]
            self.result = found if len(found) > 1 else found[0]

    load: Workload[int, int] = Workload(
        run, [1, 2, 3, 4, 5], list("abcde"), [1] * 5, int, int, lambda i, r: taken.append((i, r)), lambda: None,
        lambda name, done, total: seen.append((name, done, total)),
    )  # fmt: skip
    load.work(Pipeline(1), Tenfold, [[0, 1, 3], [2], [4]])
    run.end(committed=True)
    assert asked == [(1, 2, 4), (5,)]
    assert seen == [("a", 1, 3), ("d", 2, 3), ("e", 3, 3)]
    assert taken == [(i, 10 * i) for i in range(1, 6)]
