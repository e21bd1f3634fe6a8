"""Regular expressions from configs: they mean what re says they mean, and none of them takes for ever."""

from __future__ import annotations

import re
import warnings

import pytest
from hostile_line import within
from hypothesis import example, given
from hypothesis import strategies as st

from lorasurgery.adapters import path_regex
from lorasurgery.adapters.path_regex import Budget, PathRegex, PathText, PatternError
from lorasurgery.adapters.peft.patterns import PatternTable, Selection
from lorasurgery.errors import FormatError, SurgeryError

_atom = st.sampled_from([
    "a", "b", "q_proj", ".", r"\.", "[ab]", "[^a.]", "[a-c0-9]", r"\d", r"\w", r"\W", r"\s", r"\b", r"\B", "^", "$", r"\Z",
    "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "(?i:A)", "(?s:.)", "(?m:^)", "(?m:$)", "1", "_", "[^\n]",
])  # fmt: skip
_repeat = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,1}", "{2,}", "{,3}"])


def _more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.builds("({}|{}){}".format, inner, inner, _repeat)
    look = st.builds("({}{})".format, st.sampled_from(["?=", "?!", "?:"]), inner)
    return st.builds("{}{}".format, inner, inner) | group | look


_pattern = st.recursive(st.builds("{}{}".format, _atom, _repeat), _more, max_leaves=8)
_path = st.text(st.sampled_from("ab.1_A\n"), max_size=8) | st.sampled_from(["a.q_proj", "q_proj.b", "1.q_proj"])


@given(_pattern, st.lists(_path, min_size=1, max_size=4))
@example(r"((a*)*b)*", ["aab", "aaa"])
@example(r"(?!.*b).*a", ["aa", "ba"])
@example(r"(a|ab)(c|bcd)?", ["abcd", "abc"])
def test_expressions_mean_what_re_says(pattern: str, paths: list[str]) -> None:
    """fullmatch agrees with re's on every path, for whatever is not refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = re.compile(pattern)
    except re.error:
        return
    ours = PathRegex(pattern)
    for path in filter(None, paths):  # the empty text has no boundary for re before Python 3.14, and no module's name
        assert ours.fullmatch(PathText(path)) == (theirs.fullmatch(path) is not None)


_word = st.sampled_from(["q", "k_proj", "layers", "1", "12", "a-b", "x/y"])
_plain = st.lists(_word, min_size=1, max_size=3).flatmap(
    lambda w: st.sampled_from([".", "_", r"\."]).map(lambda d: d.join(w))
)
_key = st.builds(
    "{}{}{}".format, st.sampled_from(["", "", "^"]), _plain, st.sampled_from(["", "", "", "$", "|q", ".*", "?"])
)
_module = st.lists(_word, min_size=1, max_size=4).flatmap(
    lambda w: st.sampled_from([".", ".", "_"]).map(lambda d: d.join(w))
)


@given(
    st.lists(_key | st.just(r".*\.layers\.[0-9]+\.q"), unique=True, max_size=6),
    st.lists(_module, min_size=1, max_size=4),
)
def test_tables_mean_what_peft_says(keys: list[str], paths: list[str]) -> None:
    """The first key that matches as PEFT matches it wins, looked up or not."""
    table = PatternTable({key: number for number, key in enumerate(keys)}, "adapter_config.json: rank_pattern")
    for path in paths:
        wanted = next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path)), -1)
        assert table.first(path, -1) == wanted


@pytest.mark.parametrize(
    "pattern", [r"(?a)x\b.", r"x\b.", r"(?a)x\B.", r"x\B.", r"(?a)\bé.*", r"\bé.*", r"(?a)\w+", r"\w+"]
)
def test_letters_of_other_alphabets(pattern: str) -> None:
    """Whether é is a letter, and so where a word ends, depends on the flag for ASCII as it does in re."""
    for text in ("xé", "xy", "x.", "é", "éx", ".é"):
        assert PathRegex(pattern).fullmatch(PathText(text)) == bool(re.fullmatch(pattern, text)), text


ENDLESS = ["(a+)+b", "(a*)*b", "(a|a)*b", "(a|aa)+b", "(.*a){30}b", "((((a*)*)*)*)*b", "(a{1,1000}){1,1000}b",
           ".*.*.*.*.*.*.*.*b", "(?:a?){500}a{500}b", "(?=(a+)+b)a", "(x+x+)+y|(a+a+)+b",
           f"({'(bc)*' * 50}a)+b"]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
def test_expressions_that_would_never_end(pattern: str) -> None:
    """What takes re longer than anyone lives is told in moments, on paths of 60 and of 5000 letters."""
    with within():
        for length in (60, 5000):
            assert not PathRegex(pattern).fullmatch(PathText("a" * length))
        table = PatternTable({pattern: 1}, "adapter_config.json: rank_pattern")
        assert all(table.first(f"{'a' * 100}.{i}", 0) == 0 for i in range(300))


@pytest.mark.parametrize("pattern", ["a{4000}b?", "a{0,4000}b?", "(ab?){4000}", "(ab?){0,4000}", "(ab?)*"])
def test_every_round_of_a_repetition_counts(pattern: str) -> None:
    """However a repetition is written, thousands of rounds cost thousands of steps of what a config may take."""
    with pytest.raises(PatternError, match="takes too long"):
        PathRegex(pattern).fullmatch(PathText("a" * 5000, Budget(10_000)))


REAL = {
    r".*\.layers\.[0-9]+\.self_attn\.(q|k|v)_proj": ("model.layers.11.self_attn.q_proj", "model.layers.x.self_attn.q_proj"),
    r"^(model\.language_model(?=\.).*\.(gate_proj|k_proj))$": ("model.language_model.layers.0.k_proj", "model.visual.k_proj"),
    r"^(?!.*patch_embed).*(?:linear|proj)$": ("vision.blocks.0.proj", "vision.patch_embed.proj"),
    r"(?:.*?(?:vision|image).*?(?:self_attn|mlp).*?(?:q_proj|fc1).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))":
        ("model.layers.3.mlp.up_proj", "model.layers.3.attn.up_proj"),
    r"(?i).*ATTN.*": ("h.0.attn.c_attn", "h.0.mlp.c_fc"),
}  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_expressions_of_real_adapters(pattern: str) -> None:
    """Those that trainers write for target_modules are matched, look-aheads included."""
    means, misses = REAL[pattern]
    chosen = Selection({"target_modules": pattern})
    assert chosen.means(means)
    assert not chosen.means(misses)


@pytest.mark.parametrize(("pattern", "said"), [
    (r"(a)\1", r"is not matched here \(groupref\)"), ("(?P<n>a)(?P=n)", r"is not matched here \(groupref\)"),
    ("(?(1)a|b)(c)", r"is not matched here \(groupref exists\)"), ("(", "missing \\), unterminated subpattern"),
    ("[", "unterminated character set"), ("*", "nothing to repeat"), ("(?<=a+)b", "look-behind requires fixed-width"),
    ("a{2,1}", "min repeat greater than max repeat"),
])  # fmt: skip
def test_expressions_that_are_refused(pattern: str, said: str) -> None:
    """Groups that refer back, and what is not an expression, are refused by name."""
    with pytest.raises(PatternError, match=said):
        PathRegex(pattern)
    with pytest.raises(FormatError, match="target_modules"):
        Selection({"target_modules": pattern}, "adapter")


def test_work_that_adds_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of expressions on thousands of modules end in one line, not in an hour."""
    monkeypatch.setattr(path_regex, "STEPS", 100_000)
    table = PatternTable({f"({'.*x' * 50}{i})*": 1 for i in range(200)}, "c.json: rank_pattern")
    with within(), pytest.raises(SurgeryError, match=r"c\.json: rank_pattern takes too long"):
        for i in range(10_000):
            table.first(f"model.layers.{i}.mlp.up_proj", 0)


def test_layers_are_chosen_by_number() -> None:
    """layers_to_transform with and without a layers_pattern, the first number counts."""
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    assert Selection(config).means("model.layers.1.self_attn.q_proj")
    assert not Selection(config).means("model.layers.2.experts.1.q_proj")
    named = Selection(config | {"layers_pattern": "blocks|h"})
    assert named.means("m.h.1.q_proj")
    assert not named.means("m.layers.1.q_proj")
