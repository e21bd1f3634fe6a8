"""Calls made side by side from several threads: each does what it does alone, and one that fails harms no other."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from long_runs import LAYERS, SHAPES, hashes, world
from safetensors.torch import load_file, save_file

import lorasurgery as ls
from lorasurgery.adapters.model_names.library import installed_model
from lorasurgery.engine.process import use_threads, workers
from lorasurgery.errors import SurgeryError
from lorasurgery.report import Progress, Report

PATIENCE = 300  # seconds, after which a call counts as hanging; none takes one
RANK = ls.RankChoice(rank=4)


def in_place(call: Callable[..., Report], start: str) -> Callable[..., Report]:
    """A verb that works on a copy, made before it begins."""

    def verb(w: Path, out: Path, progress: Progress) -> Report:
        if not out.exists():
            shutil.copytree(w / start, out)
        return call(w, out, progress)

    return verb


VERBS: dict[str, Callable[[Path, Path, Progress], Report]] = {
    "extract": lambda w, out, p: ls.extract(w / "base", w / "tuned", out, ls.ExtractOptions(RANK), progress=p),
    "merge": lambda w, out, p: ls.merge(w / "base", [w / "adapter"], out, undo=True, progress=p),
    "merge in place": in_place(lambda w, out, p: ls.merge(out, [w / "adapter"], in_place=True, progress=p), "base"),
    "unmerge": lambda w, out, p: ls.unmerge(w / "merged", [w / "adapter"], out, progress=p),
    "switch": in_place(
        lambda w, out, p: ls.switch(out, [w / "small"], from_=[w / "adapter"], progress=p), "merged"
    ),
    "rerank": lambda w, out, p: ls.rerank(w / "adapter", out, RANK, progress=p),
    "blend": lambda w, out, p: ls.blend([w / "adapter", w / "small"], out, ls.BlendOptions(choice=RANK), progress=p),
    "convert": lambda w, out, p: ls.convert(w / "adapter", out, ls.ConvertOptions("peft", dtype="BF16"), progress=p),
    "verify": lambda w, out, p: ls.verify(w / "merged", against=w / "base", adapters=[w / "adapter"], progress=p),
    "verify alone": lambda w, out, p: ls.verify(w / "merged", progress=p),
    "diff": lambda w, out, p: ls.diff(w / "base", w / "tuned", progress=p),
    "diff of adapters": lambda w, out, p: ls.diff(w / "adapter", w / "small", progress=p),
    "check": lambda w, out, p: ls.check(w / "adapter", "vllm", base=w / "base"),
    "inspect": lambda w, out, p: ls.inspect(w / "adapter", spectrum=True, progress=p),
}  # fmt: skip
FAILING: dict[str, Callable[[Path, Path, Progress], Report]] = {
    "extract": lambda w, out, p: ls.extract(w / "base", w / "broken", out, ls.ExtractOptions(RANK), progress=p),
    "merge": lambda w, out, p: ls.merge(w / "broken", [w / "adapter"], out, progress=p),
    "blend": lambda w, out, p: ls.blend([w / "adapter", w / "bad"], out, ls.BlendOptions(choice=RANK), progress=p),
}
Outcome = tuple[dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, adapter, merged with a record; small, another adapter; broken and bad, which hold NaN at their end."""
    folder = tmp_path_factory.mktemp("models")
    world(folder)
    ls.merge(folder / "base", [folder / "adapter"], folder / "merged", undo=True)
    ls.rerank(folder / "adapter", folder / "small", ls.RankChoice(rank=2))
    for whole, copy in (("tuned", "broken"), ("adapter", "bad")):
        shutil.copytree(folder / whole, folder / copy)
        last = sorted((folder / copy).glob("*.safetensors"))[-1]
        tensors = load_file(last)
        max(tensors.items())[1].view(-1)[-1] = torch.nan
        save_file(tensors, last, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What a verb ends with when nothing runs beside it."""
    found: dict[str, Outcome] = {}

    def of(name: str) -> Outcome:
        if name not in found:
            found[name] = run(VERBS[name], models, tmp_path_factory.mktemp("alone") / "out", lambda *_: None)
        return found[name]

    return of


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(verb: Callable[[Path, Path, Progress], Report], models: Path, out: Path, progress: Progress) -> Outcome:
    """The hashes of what a verb wrote, and its report but for what is measured."""
    report = verb(models, out, progress).to_dict()
    for measured in ("seconds", "peak_memory_bytes"):
        del report[measured]
    return hashes(out), json.loads(json.dumps(report).replace(str(out), "OUT"))


class Meeting:
    """Two calls that overlap for certain: the first begins to work no sooner than the second, and ends before it."""

    def __init__(self) -> None:
        self.begun, self.ended = (threading.Event(), threading.Event()), threading.Event()

    def first(self, *_: object) -> None:
        """The progress of the first: it waits until the second is at work."""
        self.begun[1].wait(PATIENCE)

    def second(self, *_: object) -> None:
        """The progress of the second: it waits until the first has ended."""
        self.begun[1].set()
        self.ended.wait(PATIENCE)

    def both(self, one: Callable[[Progress], Any], other: Callable[[Progress], Any]) -> tuple[Any, Any]:
        """What both return, or raise."""

        def ending(event: threading.Event, call: Callable[[Progress], Any], progress: Progress) -> Any:
            try:
                return call(progress)
            except Exception as problem:
                return problem
            finally:
                event.set()

        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(ending, self.ended, one, self.first),
                     threads.submit(ending, self.begun[1], other, self.second)]  # fmt: skip
            return found[0].result(PATIENCE), found[1].result(PATIENCE)


def pairs() -> list[tuple[str, str]]:
    """Every verb beside itself and beside the next in the table, as the first to end and as the last."""
    names = list(VERBS)
    return [(n, n) for n in names] + list(zip(names, [*names[1:], names[0]], strict=True))


@pytest.mark.parametrize(("one", "other"), pairs())
def test_two_calls_do_what_each_does_alone(
    one: str, other: str, models: Path, alone: Callable[[str], Outcome], tmp_path: Path
) -> None:
    """The same bytes and the same report; torch has afterwards as many threads as before, in old threads and new ones."""
    expected = alone(one), alone(other)
    found = Meeting().both(
        lambda progress: run(VERBS[one], models, tmp_path / "1" / "out", progress),
        lambda progress: run(VERBS[other], models, tmp_path / "2" / "out", progress),
    )
    assert found == expected
    with ThreadPoolExecutor(1) as new:
        assert torch.get_num_threads() == new.submit(torch.get_num_threads).result(PATIENCE) == 2


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("name", ["extract", "merge", "merge in place", "switch", "rerank", "verify", "diff"])
def test_a_call_that_fails_does_not_harm_the_other(
    failing: str, name: str, models: Path, alone: Callable[[str], Outcome], tmp_path: Path
) -> None:
    """It raises what it raises alone, and leaves nothing; the other one ends as if it had been alone."""
    expected = alone(name)
    with pytest.raises(SurgeryError) as problem:
        FAILING[failing](models, tmp_path / "1" / "out", lambda *_: None)
    failed, found = Meeting().both(
        lambda progress: FAILING[failing](models, tmp_path / "1" / "out", progress),
        lambda progress: run(VERBS[name], models, tmp_path / "2" / "out", progress),
    )
    assert found == expected
    assert (type(failed), str(failed)) == (problem.type, str(problem.value))
    assert not (tmp_path / "1" / "out").exists()


def test_many_calls_at_once(models: Path, alone: Callable[[str], Outcome], tmp_path: Path) -> None:
    """All verbs twice on four threads, whoever meets whom."""
    names = [*VERBS, *reversed(VERBS)]
    expected = [alone(n) for n in names]
    with ThreadPoolExecutor(4) as threads:
        calls = [
            threads.submit(run, VERBS[n], models, tmp_path / str(i) / "out", lambda *_: None)
            for i, n in enumerate(names)
        ]
        assert [call.result(PATIENCE) for call in calls] == expected


def test_a_call_from_within_a_call(models: Path, alone: Callable[[str], Outcome], tmp_path: Path) -> None:
    """A progress callback may call the library: it is told from within the work of the outer call."""
    expected, inner = (alone("merge"), alone("extract")), []

    def progress(*_: object) -> None:
        if not inner:
            inner.append(None)  # the inner call's own progress comes here too
            inner[0] = run(VERBS["extract"], models, tmp_path / "2" / "out", progress)

    assert (run(VERBS["merge"], models, tmp_path / "1" / "out", progress), inner[0]) == expected


def test_a_thread_that_meets_torch_beside_our_workers_keeps_the_users_number() -> None:
    """torch tells each thread once how many threads it may use; beside threads of ours that must not be one."""
    with ThreadPoolExecutor(1) as first:
        users = first.submit(torch.get_num_threads).result(PATIENCE)
    with ThreadPoolExecutor(1) as call:

        def work() -> int:
            use_threads(1)
            with workers(2) as ours, ThreadPoolExecutor(1) as new:
                assert list(ours.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
                return new.submit(torch.get_num_threads).result(PATIENCE)

        assert call.submit(work).result(PATIENCE) == users


def test_a_thread_that_meets_torch_during_a_call_keeps_the_users_number(models: Path, tmp_path: Path) -> None:
    """The same in whole calls."""
    seen = []

    def progress(*_: object) -> None:
        with ThreadPoolExecutor(1) as new:
            seen.append(new.submit(torch.get_num_threads).result(PATIENCE))

    for name in ("extract", "merge", "rerank"):
        VERBS[name](models, tmp_path / name, progress)
    assert set(seen) == {2}


def test_settings_of_the_process_are_as_before() -> None:
    """Models of libraries are built without their chatter, from several threads too; the user's own is heard again."""
    before, filters = logging.root.manager.disable, list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        sizes = range(8, 72, 8)
        configs = [
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": n,
             "intermediate_size": n, "num_attention_heads": 1, "vocab_size": 8} for n in sizes
        ]  # fmt: skip
        found = [threads.submit(installed_model, config) for config in configs]
        assert all(f.result(PATIENCE) is not None for f in found)
    assert (logging.root.manager.disable, list(warnings.filters)) == (before, filters)


def test_models_in_memory_beside_calls(models: Path, alone: Callable[[str], Outcome], tmp_path: Path) -> None:
    """lorasurgery.nn merges and takes back in one thread while another extracts."""
    from lorasurgery.nn import load_adapter, merge, unmerge

    def merged() -> dict[str, torch.Tensor]:
        model = Layers()
        load_adapter(model, models / "adapter", "style")
        before = weights_of(model)
        merge(model)
        found = weights_of(model)
        unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
        return found

    expected = merged()
    ours, theirs = Meeting().both(lambda _: merged(), lambda p: run(VERBS["extract"], models, tmp_path / "out", p))
    assert theirs == alone("extract")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


class Layers(torch.nn.Module):
    """A model with the names of long_runs.world."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for layer in range(LAYERS):
            for kind, (out, into) in SHAPES.items():
                *rooms, leaf = f"model.layers.{layer}.{kind}".split(".")
                linear = torch.nn.Linear(into, out, bias=False)
                linear.weight.data = torch.randn(out, into, generator=generator)
                self._room(rooms).add_module(leaf, linear)

    def _room(self, names: list[str]) -> torch.nn.Module:
        room: torch.nn.Module = self
        for name in names:
            if name not in room._modules:
                room.add_module(name, torch.nn.Module())
            room = room._modules[name] or room
        return room


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters as they are now."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}
