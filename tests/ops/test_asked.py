"""What the public functions take: one path or several, plain keywords or an options object, and nothing of a wrong type."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasurgery as ls
from lorasurgery.errors import UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, a tuned one and an adapter, as safetensors files and PEFT folders."""
    root = tmp_path_factory.mktemp("asked")
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.self_attn.{n}.weight": torch.randn(24, 16, generator=generator)
            for i in range(2) for n in ("q_proj", "v_proj")}  # fmt: skip
    for name, weights in (
        ("base", base),
        ("tuned", {k: v + torch.randn(v.shape, generator=generator) / 8 for k, v in base.items()}),
    ):
        (root / name).mkdir()
        save_file(weights, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 16}))
    ls.extract(root / "base", root / "tuned", root / "style", rank=4)
    ls.extract(root / "base", root / "tuned", root / "topic", rank=2)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "lorasurgery.json"}


WRONG: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (ls.extract, (3, "t", "o"), {}, "base: expected a path, got 3"),
    (ls.extract, ("b", None, "o"), {}, "tuned: expected a path, got None"),
    (ls.extract, ("b", "t", b"o"), {}, "out: expected a path, got b'o'"),
    (ls.extract, ("b", "t", "o", 16), {}, "options: expected an ExtractOptions, got 16"),
    (ls.extract, ("b", "t", "o"), {"rank": "x"}, "rank: expected a whole number, got 'x'"),
    (ls.extract, ("b", "t", "o"), {"rank": 2.5}, "rank: expected a whole number, got 2.5"),
    (ls.extract, ("b", "t", "o"), {"rank": True}, "rank: expected a whole number, got True"),
    (ls.extract, ("b", "t", "o"), {"energy": "0.9"}, "energy: expected a number, got '0.9'"),
    (ls.extract, ("b", "t", "o"), {"budget": "lots"}, "size 'lots': expected a number with KB, MB, GB"),
    (ls.extract, ("b", "t", "o"), {"budget": [1]}, "budget: expected bytes, a share, or a size such as '100MB', got [1]"),
    (ls.extract, ("b", "t", "o"), {"budget": 1.5}, "budget '1.5': expected a share above 0 and up to 1"),
    (ls.extract, ("b", "t", "o"), {"alpha": "x"}, "alpha: expected a number, got 'x'"),
    (ls.extract, ("b", "t", "o"), {"dtype": 16}, "dtype: expected the name of a dtype such as 'bfloat16'"),
    (ls.extract, ("b", "t", "o"), {"target": 3}, "target: expected a string, or a list of strings, got 3"),
    (ls.extract, ("b", "t", "o"), {"client": 3}, "client: expected a string, got 3"),
    (ls.extract, ("b", "t", "o"), {"memory_limit": 1.5}, "memory_limit: expected bytes as a whole number"),
    (ls.extract, ("b", "t", "o"), {"overwrite": "no"}, "overwrite: expected True or False, got 'no'"),
    (ls.extract, ("b", "t", "o"), {"progress": 1}, "progress: expected a function of (name, done, total), got 1"),
    (ls.extract, ("b", "t", "o"), {"device": None}, "device: expected a string, got None"),
    (ls.extract, ("b", "t", "o", ls.ExtractOptions(seed="x")), {}, "seed: expected a whole number, got 'x'"),  # type: ignore[arg-type]
    (ls.extract, ("b", "t", "o", ls.ExtractOptions(choice=8)), {}, "choice: expected a RankChoice, got 8"),  # type: ignore[arg-type]
    (ls.merge, ("b", None, "o"), {}, "adapters: expected a path, or a list of paths, got None"),
    (ls.merge, ("b", 3, "o"), {}, "adapters: expected a path, or a list of paths, got 3"),
    (ls.merge, ("b", ["a", 3], "o"), {}, "adapters: expected a path, or a list of paths, got ['a', 3]"),
    (ls.merge, ("b", "a", "o"), {"weights": "0.5"}, "weights: expected a number, or a list of numbers, got '0.5'"),
    (ls.merge, ("b", "a", "o"), {"block_weights": 0.5}, "block_weights: expected a string, or a list of strings, got 0.5"),
    (ls.merge, ("b", "a", "o"), {"max_shard_size": "5 apples"}, "size '5 apples': expected a number with KB, MB, GB"),
    (ls.merge, ("b", "a", "o"), {"seed": "x"}, "seed: expected a whole number, got 'x'"),
    (ls.merge, ("b", "a", "o"), {"rounding": "up"}, "rounding up: expected one of nearest, stochastic"),
    (ls.merge, ("b", "a", "o", {"seed": 1}), {}, "options: expected a MergeOptions, got {'seed': 1}"),
    (ls.unmerge, (None, "a", "o"), {}, "merged: expected a path, got None"),
    (ls.unmerge, ("m", "a", "o"), {"undo_file": 3}, "undo_file: expected a path, got 3"),
    (ls.switch, ("c", None), {}, "to: expected a path, or a list of paths, got None"),
    (ls.switch, ("c", "a"), {"from_": 3}, "from_: expected a path, or a list of paths, got 3"),
    (ls.rerank, (3, "o"), {}, "adapter: expected a path, got 3"),
    (ls.rerank, ("a", "o", 16), {}, "choice: expected a RankChoice, got 16"),
    (ls.rerank, ("a", "o"), {"uniform_rank": 1}, "uniform_rank: expected True or False, got 1"),
    (ls.blend, (None, "o"), {}, "adapters: expected a path, or a list of paths, got None"),
    (ls.blend, ("a", "o"), {"weights": ["0.5"]}, "weights: expected a number, or a list of numbers, got ['0.5']"),
    (ls.blend, ("a", "o"), {"method": 3}, "method: expected a string, got 3"),
    (ls.convert, ("a", "o"), {}, "to: say which format comes out, one of peft, kohya, diffusers, comfyui"),
    (ls.convert, ("a", "o"), {"to": 3}, "to: expected a string, got 3"),
    (ls.convert, ("a", "o", "peft"), {}, "options: expected a ConvertOptions, got 'peft'"),
    (ls.inspect, (None,), {}, "path: expected a path, got None"),
    (ls.inspect, ("p",), {"spectrum": "yes"}, "spectrum: expected True or False, got 'yes'"),
    (ls.check, ("a", None), {}, "server: expected a string, got None"),
    (ls.check, ("a", "vllm"), {"max_lora_rank": "x"}, "max_lora_rank: expected a whole number, got 'x'"),
    (ls.verify, (3,), {}, "path: expected a path, got 3"),
    (ls.verify, ("p",), {"adapters": 3}, "adapters: expected a path, or a list of paths, got 3"),
    (ls.diff, ("a", None), {}, "b: expected a path, got None"),
    (ls.plan, (None,), {}, "model: expected a path, got None"),
    (ls.plan, ("m", "x"), {}, "rank: expected a whole number, got 'x'"),
    (ls.push, (None, "org/name"), {}, "path: expected a path, got None"),
    (ls.push, ("p", 3), {}, "target: expected a Target, got 3"),
    (ls.RankChoice, ("x",), {}, "rank: expected a whole number, got 'x'"),
    (ls.RankChoice, (), {"budget": 5}, "budget: expected a Budget, got 5"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "args", "kwargs", "says"), WRONG, ids=[f"{w[0].__name__}-{w[3][:30]}" for w in WRONG])
def test_a_wrong_type_is_one_line(
    verb: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], says: str
) -> None:
    """A UsageError that names the argument, what is expected and what was given, before anything is looked for."""
    with pytest.raises(UsageError) as caught:
        verb(*args, **kwargs)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_every_verb_has_a_wrong_type_in_the_table() -> None:
    """None of the public verbs is left out above."""
    verbs = {name for name in ls.__all__ if name.islower()} - {"draw", "open_adapter"}
    assert {w[0].__name__ for w in WRONG} >= verbs


def test_one_path_is_one_path(world: Path, tmp_path: Path) -> None:
    """A string or a Path where several are meant is one of them, never gone through letter by letter."""
    for i, one in enumerate((world / "style", str(world / "style"), [world / "style"], (str(world / "style"),))):
        ls.merge(world / "base", one, tmp_path / f"m{i}", weights=0.5 if i % 2 else [0.5])
        assert files(tmp_path / f"m{i}") == files(tmp_path / "m0")
    ls.unmerge(tmp_path / "m0", str(world / "style"), tmp_path / "r", weights=0.5)
    ls.blend(str(world / "style"), tmp_path / "b")
    assert ls.verify(tmp_path / "m0", against=world / "base", adapters=str(world / "style"), weights=0.5).totals[
        "holds"
    ]
    ls.merge(tmp_path / "r", str(world / "style"), in_place=True)
    assert ls.switch(tmp_path / "r", str(world / "topic")).totals["from"] == ["style"]


KEYWORDS: list[tuple[dict[str, Any], ls.ExtractOptions]] = [
    ({"rank": 3}, ls.ExtractOptions(ls.RankChoice(rank=3))),
    ({"energy": 0.7, "max_rank": 5}, ls.ExtractOptions(ls.RankChoice(energy=0.7, max_rank=5))),
    ({"tolerance": 0.4}, ls.ExtractOptions(ls.RankChoice(tolerance=0.4))),
    ({"budget": "4KB"}, ls.ExtractOptions(ls.RankChoice(budget=ls.Budget(size=4000)))),
    ({"budget": 4000}, ls.ExtractOptions(ls.RankChoice(budget=ls.Budget(size=4000)))),
    ({"budget": 0.5}, ls.ExtractOptions(ls.RankChoice(budget=ls.Budget(share=0.5)))),
    ({"budget": "50%"}, ls.ExtractOptions(ls.RankChoice(budget=ls.Budget(share=0.5)))),
    ({"rank": 3, "alpha": 6}, ls.ExtractOptions(ls.RankChoice(rank=3), alpha=6)),
    ({"rank": 3, "dtype": "bf16"}, ls.ExtractOptions(ls.RankChoice(rank=3), dtype="BF16")),
    ({"rank": 3, "target": "q_proj"}, ls.ExtractOptions(ls.RankChoice(rank=3), ls.Selection(("q_proj",)))),
    ({"rank": 3, "exclude": ["q_proj"], "full": "none"},
     ls.ExtractOptions(ls.RankChoice(rank=3), ls.Selection((), ("q_proj",), ("none",)))),
    ({"rank": 3, "client": "vllm"}, ls.ExtractOptions(ls.RankChoice(rank=3), client="vllm")),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "options"), KEYWORDS, ids=lambda value: str(value)[:40])
def test_keywords_of_extract_mean_the_options(
    keywords: dict[str, Any], options: ls.ExtractOptions, world: Path, tmp_path: Path
) -> None:
    """The same bytes either way."""
    ls.extract(world / "base", world / "tuned", tmp_path / "a", **keywords)
    ls.extract(world / "base", world / "tuned", tmp_path / "b", options)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "BF16", torch.bfloat16])
def test_dtypes_are_spelt_as_people_do(dtype: Any, world: Path, tmp_path: Path) -> None:
    """Every verb that writes takes the spellings of the command line, safetensors' names and torch's dtypes."""
    ls.merge(world / "base", world / "style", tmp_path / "m", dtype=dtype)
    ls.unmerge(tmp_path / "m", world / "style", tmp_path / "u", dtype=dtype)
    ls.rerank(world / "style", tmp_path / "r", rank=2, dtype=dtype)
    ls.blend([world / "style", world / "topic"], tmp_path / "b", dtype=dtype)
    ls.convert(world / "style", tmp_path / "c", to="peft", dtype=dtype)
    for name in "mu":
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {torch.bfloat16}
    for name in "rbc":
        assert {t.dtype for t in load_file(tmp_path / name / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert ls.plan(world / "base", 2, target="q_proj", dtype=dtype).totals["dtype"] == "BF16"


def test_sizes_are_spelt_as_people_do(world: Path, tmp_path: Path) -> None:
    """max_shard_size and memory_limit as text give the same files as in bytes."""
    ls.merge(world / "base", world / "style", tmp_path / "a", max_shard_size="4KB", memory_limit="64MB")
    ls.merge(world / "base", world / "style", tmp_path / "b", max_shard_size=4000, memory_limit=64_000_000)
    ls.merge(world / "base", world / "style", tmp_path / "c", ls.MergeOptions(max_shard_size="4KB"))  # type: ignore[arg-type]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_the_other_verbs_take_both_too(world: Path, tmp_path: Path) -> None:
    """merge, unmerge, blend, rerank and convert: keywords and options give the same bytes."""
    style, topic = world / "style", world / "topic"
    pairs: list[Callable[[Path, bool], Any]] = [
        lambda out, plain: ls.merge(world / "base", style, out, weights=[0.5], dtype="bf16") if plain
        else ls.merge(world / "base", style, out, ls.MergeOptions(weights=[0.5], dtype="BF16")),
        lambda out, plain: ls.unmerge(world / "tuned", style, out, weights=0.5) if plain
        else ls.unmerge(world / "tuned", style, out, ls.MergeOptions((0.5,))),
        lambda out, plain: ls.blend([style, topic], out, weights=[1, 0.5], method="ties", rank=2) if plain
        else ls.blend([style, topic], out, ls.BlendOptions("ties", ls.RankChoice(rank=2), (1, 0.5))),
        lambda out, plain: ls.rerank(style, out, energy=0.8, max_rank=3) if plain
        else ls.rerank(style, out, ls.RankChoice(energy=0.8, max_rank=3)),
        lambda out, plain: ls.convert(style, out, to="peft", portable=True) if plain
        else ls.convert(style, out, ls.ConvertOptions("peft", portable=True)),
    ]  # fmt: skip
    for i, call in enumerate(pairs):
        call(tmp_path / f"a{i}", True)
        call(tmp_path / f"b{i}", False)
        assert files(tmp_path / f"a{i}") == files(tmp_path / f"b{i}")


TWICE: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (ls.extract, ("b", "t", "o", ls.ExtractOptions(ls.RankChoice(energy=0.9))), {"rank": 16}, "rank: ExtractOptions has"),
    (ls.extract, ("b", "t", "o", ls.ExtractOptions(alpha=2.0)), {"alpha": 3}, "alpha: is given as a keyword and in Ex"),
    (ls.extract, ("b", "t", "o", ls.ExtractOptions(selection=ls.Selection(("mlp",)))), {"target": "q_proj"},
     "target: is given as a keyword and in Selection"),
    (ls.extract, ("b", "t", "o"), {"rank": 1, "energy": 0.5}, "give exactly one of "),
    (ls.merge, ("b", "a", "o", ls.MergeOptions(seed=1)), {"seed": 2}, "seed: is given as a keyword and in MergeOptions"),
    (ls.blend, ("a", "o", ls.BlendOptions("ties")), {"method": "cat"}, "method: is given as a keyword and in Blend"),
    (ls.rerank, ("a", "o", ls.RankChoice(rank=2)), {"rank": 3}, "rank: "),
    (ls.convert, ("a", "o", ls.ConvertOptions("peft")), {"to": "kohya"}, "to: is given as a keyword and in Convert"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "args", "kwargs", "says"), TWICE, ids=lambda v: getattr(v, "__name__", ""))
def test_nothing_is_said_both_ways(
    verb: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], says: str
) -> None:
    """A keyword beside an options object that says something else is refused; what is not in it is filled in."""
    with pytest.raises(UsageError) as caught:
        verb(*args, **kwargs)
    assert str(caught.value).startswith(says)


def test_options_and_keywords_go_together(world: Path, tmp_path: Path) -> None:
    """The rest in the object, the common choice as a keyword; options objects can't be changed."""
    options = ls.ExtractOptions(svd="exact", uniform_rank=True)
    ls.extract(world / "base", world / "tuned", tmp_path / "a", options, rank=3)
    whole = ls.ExtractOptions(ls.RankChoice(rank=3), svd="exact", uniform_rank=True)
    ls.extract(world / "base", world / "tuned", tmp_path / "b", whole)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with pytest.raises(FrozenInstanceError):
        ls.MergeOptions().seed = 3  # type: ignore[misc]
