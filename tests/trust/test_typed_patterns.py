"""Patterns from the command line: they mean what re says, none takes for ever, and whatever is odd about one is one line."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from undo_world import adapter, llama

from lorasurgery.adapters.model_names import patterns as typed
from lorasurgery.adapters.model_names.patterns import any_match, check_patterns, matches
from lorasurgery.adapters.path_regex import Budget, PathRegex
from lorasurgery.cli.main import main
from lorasurgery.errors import UsageError
from lorasurgery.nn import apply_lora
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction.options import Selection

NAMES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("typed")
    base = llama(root / "base", torch.float32, 32)
    adapter(base, root / "lora", 2, 0.1)
    done = CliRunner().invoke(main, ["merge", str(base), str(root / "lora"), "-o", str(root / "tuned"), "-q"])
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps that were taken by expressions that re is not asked about."""
    taken, take = [0], Budget.take

    def counted(self: Budget, steps: int) -> None:
        taken[0] += steps
        take(self, steps)

    monkeypatch.setattr(Budget, "take", counted)
    typed._regex.cache_clear()
    yield taken
    typed._regex.cache_clear()


_atom = st.sampled_from(
    ["a", "b", "q_proj", ".", r"\.", "[ab]", "[^a.]", r"\d", r"\w", r"\b", "^", "$", "(?=a)", "(?!b)"]
)
_piece = st.builds("{}{}".format, _atom, st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,3}"]))
_more = st.recursive(
    _piece, lambda p: st.builds("{}{}".format, p, p) | st.builds("({}|{}){}".format, p, p, st.sampled_from(["", "?", "+"])),
    max_leaves=8,
)  # fmt: skip
_path = st.lists(st.sampled_from(["a", "b", "q_proj", "1", "ab"]), min_size=1, max_size=4).map(".".join)


@given(_more, _path)
@example("(.*a){25}x", "a.b.a")
@example(".*.*.*.*", "ab.ab.ab")
def test_they_mean_what_re_says(pattern: str, path: str) -> None:
    """A suffix, or all of the path as re.fullmatch has it, whichever of the two matchers is asked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = re.compile(pattern).fullmatch(path) is not None
    except re.error:
        return
    assert matches(pattern, path) == (path == pattern or path.endswith(f".{pattern}") or whole)


ENDLESS = [
    "(.*a){25}x", "(a+)+b", "(.*)*x", "([a-z_.]+)+x", "(.|[a-z])*x", "(.*.*)*y", "((((.*)*)*)*)*y", "(x?){500}x{500}",
    "(" * 60 + ".*" + ")*" * 60 + "y", "(?:(?:a|b|.)*)*z", "(m(o(d(e(l.*)*)*)*)*)*!", ".*" * 40 + "y",
    "(a|b|.)(a|b|.)" * 40 + "y", "(?=(.*a){25}x).*", "(?!(.+)+y)(.+)+y",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize(
    "verb", ["plan --target", "plan --exclude", "extract --target", "extract --exclude", "extract --full"]
)
def test_none_takes_for_ever(verb: str, pattern: str, world: Path, tmp_path: Path, spent: list[int]) -> None:
    """Each is told within steps that are counted: it means no module, or is refused by name; never more than a line."""
    command, option = verb.split()
    inputs = [world / "base"] if command == "plan" else [world / "base", world / "tuned", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [command, *map(str, inputs), option, pattern])
    assert done.exit_code in (0, 2), done.output
    if done.exit_code:
        (line,) = done.stderr.splitlines()
        assert line.startswith((f"lorasurgery: {option} ", f"lorasurgery: {pattern}: takes too long"))
        assert re.search("matches no module|is nested too deeply|takes too long to be matched", line)
    assert spent[0] < 2_000_000


def test_re_is_asked_only_where_it_is_quick() -> None:
    """However long a path, the ways that re may go through an expression are bounded."""
    path = "a" * 1000
    for pattern in ENDLESS:
        count, degree = PathRegex(pattern)._ways if "(" * 60 not in pattern else (float("inf"), 0)
        assert count * (len(path) + 1) ** degree > 50_000
    for pattern, ways in {"q_proj": (1, 0), ".*q": (1, 1), "(ab|cd)c?": (4, 0), ".*(qa|kb|vc).*": (3, 2), "(ab)*": (float("inf"), 0),
                          "a{2,5}": (4, 0), "(?=.*b).*": (1, 2)}.items():  # fmt: skip
        assert PathRegex(pattern)._ways == ways


def test_a_hundred_thousand_modules(spent: list[int]) -> None:
    """Real expressions cost nothing but re; those that re is not asked about, dozens of steps a module; each is parsed once."""
    paths = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.{m}" for i in range(25_000) for m in "abcd"]
    real = [
        r".*\.layers\.[0-3]\..*",
        r"model\.layers\.\d+\.mlp\.experts\.\d+\.(a|b)",
        "mlp",
        "experts.7.c",
        "(?!.*vision).*d",
    ]
    for path in paths:
        any_match([*real, "nothing"], path)
    assert spent[0] == 0
    assert typed._regex.cache_info().misses <= len(real) + 1
    slow = [r"(model\.)?(layers\.)+\d+.*[xyz]", "(.*a){25}x"]
    for path in paths[:10_000]:
        any_match(slow, path)
    assert spent[0] < 10_000 * 500


WRONG = {
    "(": "is not a regular expression (missing ), unterminated subpattern at position 0)",
    "[": "is not a regular expression", "*": "is not a regular expression", "a{2,1}": "is not a regular expression",
    r"(a)\1": "has what is not matched here", "(?P<n>a)(?P=n)": "has what is not matched here",
    "(?<=a+)b": "look-behind requires fixed-width pattern", "(" * 300 + ")" * 300: "is nested too deeply",
    "q" * 120_000: "more than any real one",
}  # fmt: skip


@pytest.mark.parametrize("pattern", WRONG, ids=lambda p: p[:20])
def test_what_is_no_expression_is_one_line(pattern: str, world: Path) -> None:
    """The option, the pattern and what is wrong with it; status 2; the same of the API."""
    done = CliRunner().invoke(main, ["plan", str(world / "base"), "--target", pattern])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lorasurgery: --target ")
    assert WRONG[pattern] in done.stderr
    with pytest.raises(UsageError, match=re.escape(WRONG[pattern])):
        check_patterns("--exclude", [pattern], NAMES)
    with pytest.raises(UsageError, match="target_modules"):
        apply_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), target_modules=[pattern])


@pytest.mark.parametrize("length", [255, 256, 300, 20_000])
def test_long_patterns_are_patterns(length: int, world: Path, tmp_path: Path) -> None:
    """More characters than a file's name may have: matched, written into the record as they were given, or no module's."""
    long = f"(q_proj|{'x' * (length - 9)})"
    good = f".*{long}"
    done = CliRunner().invoke(main, ["plan", str(world / "base"), "--target", good, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["totals"]["modules"] == 2
    done = CliRunner().invoke(main, ["plan", str(world / "base"), "--target", "x" * length])
    assert done.exit_code == 2
    assert "matches no module" in done.stderr
    words = ["extract", world / "base", world / "tuned", "-o", tmp_path / "a", "--rank", "2", "--target", good, "-q"]
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert long in json.loads((tmp_path / "a/lorasurgery.json").read_text())["call"]
    extract(world / "base", world / "tuned", tmp_path / "b", ExtractOptions(selection=Selection(target=(good,))))
    assert (tmp_path / "b/adapter_config.json").exists()


BLOCKS = {
    "*a" * 1000 + "x=1": "matches no module", "[" * 2000 + "*=1": "matches no module", "9" * 3000 + ":q=1": "matches no module",
    "x" * 5000 + "=1": "5,002 characters are more than any name of a module has", "q_proj=1e999": "not a finite number",
    "0:q_proj=1": "adapters are counted from 1", "99:q_proj=1": "so none is number 99",
}  # fmt: skip


@pytest.mark.parametrize("given", BLOCKS, ids=lambda p: p[:20])
def test_block_weights(given: str, world: Path, tmp_path: Path) -> None:
    """Globs and numbers of --block-weight: one line each, whatever their length."""
    words = ["merge", world / "base", world / "lora", "-o", tmp_path / "out", "--block-weight", given]
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1
    assert BLOCKS[given] in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["(", "a.(b", "q[", "x" * 900, "attn" * 200, "a\nb", "\u202eq", "*.*"])
def test_names_are_no_patterns(name: str) -> None:
    """What a module is called in a file is taken literally, and presets tell it in one look."""
    assert matches("q", f"{name}.q")
    for preset in typed.PRESETS:
        matches(preset, name)
    assert fnmatchcase("a", "a")
    with pytest.raises(UsageError) as problem:
        check_patterns("--target", ["nothing"], [name])
    assert str(problem.value).isprintable()
