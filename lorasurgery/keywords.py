"""Messages are written for the command line. A call from Python reads keywords instead: `--max-rank` is max_rank.

This is done in one place, where a public function raises or returns; what is said on a command line stays as it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lorasurgery.errors import SurgeryError
from lorasurgery.report import COMMAND_LINE, Report

VALUED = {
    "--adapter": "adapters", "--against": "against", "--alpha": "alpha", "--base": "base", "--base-model": "base_model",
    "--block-weight": "block_weights", "--budget": "budget", "--density": "density", "--device": "device",
    "--dtype": "dtype", "--energy": "energy", "--exclude": "exclude", "--for": "client", "--from": "from_",
    "--full": "full", "--max-lora-rank": "max_lora_rank", "--max-rank": "max_rank",
    "--max-shard-size": "max_shard_size", "--memory-limit": "memory_limit", "--message": "message", "-m": "message",
    "--method": "method", "--output": "out", "-o": "out", "--rank": "rank", "--revision": "revision",
    "--rounding": "rounding", "--seed": "seed", "--sv": "sv", "--sv-cumulative": "sv_cumulative",
    "--sv-ratio": "sv_ratio", "--svd": "svd", "--target": "target", "--to": "to", "--tolerance": "tolerance",
    "--undo-file": "undo_file", "--weight": "weights", "-w": "weights",
}  # fmt: skip
"""Options with a value, and the keyword that means the same."""

FLAGS = {
    **{f"--{name.replace('_', '-')}": f"{name}=True" for name in (
        "add", "allow_loss", "allow_nonfinite", "average_replaced", "common", "create_pr", "dry_run", "in_place",
        "keep_rounding", "normalize", "overwrite", "overwrite_card", "portable", "private", "resume", "rslora",
        "spectrum", "undo", "uniform_rank")},
    "--no-undo": "undo=False",
}  # fmt: skip
"""Options without one."""

ONLY_TYPED = {"--json", "--quiet", "-q", "--verbose", "-v", "--plot", "--push", "--sv-fro", "--help", "-h"}
"""What has no keyword: no message speaks of these."""

_BY_VERB = {"check": {"client": "server"}}  # `check --for` is the second argument
_PHRASES = {"the n-th -w belongs": "the n-th weight belongs"}
_VERBS = "extract|merge|unmerge|switch|rerank|blend|convert|inspect|check|verify|diff|plan|push"
_COMMAND = re.compile(rf"lorasurgery ({_VERBS})(?= )([^`\n]*)")
_WORD = re.compile(r"'[^']*'|[^\s,;]+|[,;]")
_WORDS = "auto|none|float32|float16|bfloat16|float8_e4m3fn|stochastic|nearest|randomized|exact|linear|kohya|peft|cpu"
_PATTERN = r"[^\s;:,()`']*[.*\[/+_][^\s;:,()`']*[^\s;:,.()`']"
_VALUE = rf"'[^']*'|(?:{_WORDS})\b|cuda:\d+|-?\d[\w.+-]*%?|[A-Z][A-Z/]*\b|{_PATTERN}"
_OPTION = re.compile(
    rf"(?<![\w-])({'|'.join(sorted({*VALUED, *FLAGS}, key=len, reverse=True))})(?![\w-])((?: (?:{_VALUE}))?)"
)
_REPEATED = re.compile(rf"(?<![\w-])(--exclude|--full) ({_VALUE})(?: \1 (?:{_VALUE}))+")


def in_keywords(text: str, verb: str = "") -> str:
    """A message as a caller from Python can act on it.

    >>> in_keywords("out: exists; --overwrite replaces it")
    'out: exists; overwrite=True replaces it'
    >>> in_keywords("--dtype float32 keeps all of it, a larger --max-rank too")
    "dtype='float32' keeps all of it, a larger max_rank too"
    >>> in_keywords("`lorasurgery merge BASE ADAPTER -o OUT` writes a new checkpoint")
    '`merge(BASE, ADAPTER, out=OUT)` writes a new checkpoint'

    Args:
        verb: The public function that was called, where a keyword has its own name in it.
    """
    for phrase, plain in _PHRASES.items():
        text = text.replace(phrase, plain)
    parts = text.split("`")
    return "`".join(_said(part, verb, quoted=n % 2 == 1 and n < len(parts) - 1) for n, part in enumerate(parts))


def _said(text: str, verb: str, *, quoted: bool) -> str:
    """A stretch of a message; of what is quoted, only our own commands, for others are typed as they stand."""
    text = _COMMAND.sub(_called, text)
    if quoted:
        return text
    text = _REPEATED.sub(_listed, text)
    return _OPTION.sub(lambda found: _keyword(found, verb), text)


def _keyword(found: re.Match[str], verb: str) -> str:
    option, value = found[1], found[2].strip()
    if option in FLAGS:
        return FLAGS[option] + found[2]
    name = _BY_VERB.get(verb, {}).get(VALUED[option], VALUED[option])
    return f"{name}={_literal(value)}" if value else name


def _literal(value: str) -> str:
    """A typed value as Python has it: numbers and placeholders bare, words in quotes.

    >>> _literal("0.5"), _literal("BASE"), _literal("float32"), _literal("'a b'")
    ('0.5', 'BASE', "'float32'", "'a b'")
    """
    with suppress(ValueError):
        float(value)
        return value
    return value if re.fullmatch(r"[A-Z][A-Z/]*|'.*'", value) else repr(value)


def _listed(found: re.Match[str]) -> str:
    """One option several times: a list."""
    values = [_literal(v) for v in re.findall(rf"{found[1]} ({_VALUE})", found[0])]
    return f"{VALUED[found[1]]}=[{', '.join(values)}]"


def _called(found: re.Match[str]) -> str:
    """A command as a call, as far as it goes: an option's words end it where it stands in a sentence."""
    verb, rest = found[1], found[2]
    words = list(_WORD.finditer(rest))
    given, end, at = list[str](), 0, 0
    named = dict[str, list[str]]()
    while at < len(words):
        word = words[at][0]
        if word in VALUED and at + 1 < len(words):
            at += 1
            value = words[at][0]
            named.setdefault(_BY_VERB.get(verb, {}).get(VALUED[word], VALUED[word]), []).append(_argument(value))
        elif word in FLAGS:
            name, _, value = FLAGS[word].partition("=")
            named[name] = [value]
        elif not named and not word.startswith(("-", ",", ";")):
            given.append(_argument(word))
        else:
            break
        end, at = words[at].end(), at + 1
    if not named:
        return found[0]
    keywords = [f"{name}={values[0] if len(values) == 1 else '[' + ', '.join(values) + ']'}"
                for name, values in named.items()]  # fmt: skip
    return f"{verb}({', '.join([*given, *keywords])}){rest[end:]}"


def _argument(word: str) -> str:
    plain = "".join(shlex.split(word)) if word.startswith("'") else word
    with suppress(ValueError):
        float(plain)
        return plain
    return plain if re.fullmatch(r"…|[A-Z][A-Z/]*", plain) else repr(plain)


def say(report: Report, verb: str = "") -> Report:
    """A report whose warnings and summary are as the caller can act on them; that of a command line as it is."""
    if COMMAND_LINE.get() is None:
        report.warnings = [in_keywords(text, verb) for text in report.warnings]
        report.summary = in_keywords(report.summary, verb)
        report.error = in_keywords(report.error, verb) if report.error else report.error
        for one in report.adapters or ():
            say(one, verb)
    return report


@contextmanager
def saying_keywords(verb: str = "") -> Iterator[None]:
    """Until its end, what fails is said in keywords; on a command line as it is."""
    try:
        yield
    except SurgeryError as problem:
        if COMMAND_LINE.get() is None:
            problem.args = tuple(in_keywords(a, verb) if isinstance(a, str) else a for a in problem.args)
        raise
