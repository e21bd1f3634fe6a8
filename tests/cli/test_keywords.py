"""What a call from Python is told names keywords; what a command is told names options."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import click
import models
import pytest
from click.testing import CliRunner
from import_graph import FILES, PACKAGE

import lorasurgery as ls
from lorasurgery.cli.main import COMMANDS, main
from lorasurgery.errors import SurgeryError
from lorasurgery.keywords import FLAGS, ONLY_TYPED, VALUED, in_keywords

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS = {"--local-dir", "--nproc-per-node", "--enable-lora", "--lora-modules"}  # of hf, torchrun and vLLM


def options() -> dict[str, dict[str, click.Option]]:
    """Command -> option as it is typed -> the option."""
    group = main
    assert isinstance(group, click.Group)
    context = click.Context(group)
    commands = {name: group.get_command(context, name) for name in COMMANDS}
    return {
        name: {o: p for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
        for name, command in commands.items()
        if command is not None
    }


def accepted(verb: str) -> set[str]:
    """The keywords of a public function, and the fields of its options object."""
    found = set(inspect.signature(getattr(ls, verb)).parameters)
    kinds = {"extract": (ls.ExtractOptions, ls.Selection), "blend": (ls.BlendOptions, ls.RankChoice),
             "rerank": (ls.RankChoice,)}  # fmt: skip
    return found | {f.name for kind in kinds.get(verb, ()) for f in fields(kind)}


def test_every_option_has_its_keyword() -> None:
    """Each option of each command is in the table, with a keyword that the function takes; flags as True or False."""
    for verb, known in options().items():
        for typed, option in known.items():
            if typed in ONLY_TYPED or (typed == "--private" and verb != "push"):  # which belongs to --push there
                continue
            said = in_keywords(typed, verb)
            assert said == (FLAGS[typed] if option.is_flag else said), (verb, typed)
            assert said.partition("=")[0] in accepted(verb), (verb, typed, said)
    typed = {o for known in options().values() for o in known}
    assert {*VALUED, *FLAGS} - {"--sv"} <= typed


def test_no_message_speaks_of_an_option_without_a_keyword() -> None:
    """Every --option in a string of the package, but in docstrings and in cli/, is in the table."""
    for path in FILES:
        if path.is_relative_to(PACKAGE / "cli") or path.name == "keywords.py":
            continue
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        strings = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
        ]
        for text in strings:
            assert {*_FLAG.findall(text)} - OTHERS <= {*VALUED, *FLAGS}, (path, text)
            assert not {*_FLAG.findall(in_keywords(text))} - OTHERS, (path, text)


@pytest.mark.parametrize(("typed", "said"), [
    ("give either -o OUT or --in-place", "give either out=OUT or in_place=True"),
    ("--rank 0: expected at least 1", "rank=0: expected at least 1"),
    ("; --keep-rounding takes it", "; keep_rounding=True takes it"),
    ("--rounding stochastic keeps it right on average", "rounding='stochastic' keeps it right on average"),
    ("extract with --full auto --full lm_head.weight stores it", "extract with full=['auto', 'lm_head.weight'] stores it"),
    ("--exclude 'mtp.+' --exclude conv.0", "exclude=['mtp.+', 'conv.0']"),
    ("subtracted; -w 0.7 takes all of it out", "subtracted; weights=0.7 takes all of it out"),
    ("the n-th -w belongs to the n-th adapter", "the n-th weight belongs to the n-th adapter"),
    ("`lorasurgery push … --base-model ORG/NAME` names it", "`push(…, base_model=ORG/NAME)` names it"),
    ("lorasurgery convert --portable --base BASE makes a LoRA of it",
     "convert(portable=True, base=BASE) makes a LoRA of it"),
    ("  lorasurgery rerank /a/b -o OUT --rank 16", "  rerank('/a/b', out=OUT, rank=16)"),
    ("lorasurgery rerank gives them the least rank", "lorasurgery rerank gives them the least rank"),
    ("which lorasurgery does not merge", "which lorasurgery does not merge"),
    ("download it first: hf download a/b --local-dir DIR", "download it first: hf download a/b --local-dir DIR"),
    ("use `torchrun --nproc-per-node 2 -m lorasurgery …` or --device cuda:0",
     "use `torchrun --nproc-per-node 2 -m lorasurgery …` or device='cuda:0'"),
    ("is in the middle of `merge base topic --in-place`", "is in the middle of `merge base topic --in-place`"),
    ("my--rank.safetensors: is empty", "my--rank.safetensors: is empty"),
])  # fmt: skip
def test_how_a_message_is_said(typed: str, said: str) -> None:
    """Values become Python's, commands become calls, and what is not an option stays."""
    assert in_keywords(typed) == said
    assert in_keywords(said) == said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter."""
    root = tmp_path_factory.mktemp("keywords")
    models.save(models.make("llama"), root / "base")
    models.peft_adapter("llama", root / "adapter", r=4)
    return root


def test_a_call_is_told_of_keywords_and_a_command_of_options(world: Path, tmp_path: Path) -> None:
    """The same mistakes both ways: errors, warnings and summaries."""
    base, adapter = str(world / "base"), str(world / "adapter")
    calls = [
        (lambda: ls.merge(base, adapter, tmp_path / "m", in_place=True), ["merge", base, adapter, "-o", "m", "--in-place"]),
        (lambda: ls.merge(base, adapter, base), ["merge", base, adapter, "-o", base]),
        (lambda: ls.check(adapter, "nobody"), None),
        (lambda: ls.RankChoice(rank=0), None),
        (lambda: ls.rerank(adapter, tmp_path / "r", rank=0), ["rerank", adapter, "-o", "r", "--rank", "0"]),
        (lambda: ls.merge(base, adapter, tmp_path / "m", memory_limit="1KB"),
         ["merge", base, adapter, "-o", "m", "--memory-limit", "1KB"]),
        (lambda: ls.switch(base, adapter), ["switch", base, "--to", adapter]),
        (lambda: ls.extract(base, base, tmp_path / "x", target="nothing"),
         ["extract", base, base, "-o", "x", "--target", "nothing"]),
        (lambda: ls.verify(base, adapters=adapter), ["verify", base, "--adapter", adapter]),
        (lambda: ls.push(adapter, "no name"), None),
    ]  # fmt: skip
    for call, words in calls:
        with pytest.raises(SurgeryError) as caught:
            call()
        assert not _FLAG.search(str(caught.value)), caught.value
        if words is not None:
            told = CliRunner().invoke(main, words).stderr
            assert told.startswith("lorasurgery: ")
            assert (
                in_keywords(told.strip().removeprefix("lorasurgery: "), words[0]) == str(caught.value)
                or "Python" in told
            )


def test_warnings_and_summaries_too(world: Path, tmp_path: Path) -> None:
    """A report of a call names keywords, that of a command options."""
    merged = ls.merge(world / "base", world / "adapter", tmp_path / "m", weights=1e-3, dtype="bf16", allow_loss=True)
    assert any("dtype='float32'" in text for text in merged.warnings), merged.warnings
    assert not _FLAG.search(" ".join([*merged.warnings, merged.summary]))
    words = ["merge", str(world / "base"), str(world / "adapter"), "-w", "1e-3", "--dtype", "bf16", "--allow-loss"]
    told = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "n")])
    assert "--dtype float32" in told.stderr
