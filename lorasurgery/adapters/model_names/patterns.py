"""--target, --exclude and --full: which module paths a person means by a suffix, a regular expression or a preset.

A name comes from a file and an expression from a person: neither may make the other take for ever (path_regex.py).
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache

from lorasurgery.adapters.model_names.naming import is_embedding, is_head
from lorasurgery.adapters.path_regex import PathRegex, PatternError
from lorasurgery.errors import UsageError, nearest, some

_MLP = re.compile(
    r".*\.(mlp|ffn|feed_forward|densereludense|block_sparse_moe|experts|shared_expert|intermediate)\..+"
    r"|.*\.(fc1|fc2|fc_in|fc_out|wi|wi_0|wi_1)|(.*\.)?layers?\.\d+\.output\.dense",
    re.IGNORECASE,
)
_STEPS = 20_000  # that a pattern may cost on one path, ten milliseconds or so; real ones take dozens
PRESETS = ("attention", "mlp", "all-linear")


def matches(pattern: str, path: str) -> bool:
    """Whether a module path is meant by one pattern.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("proj", "a.q_proj")
    (True, False)
    >>> matches(r"model\\.layers\\.[0-3]\\..*", "model.layers.2.mlp.up_proj")
    True
    >>> matches("attention", "h.0.attn.c_attn"), matches("all-linear", "lm_head")
    (True, False)

    Raises:
        UsageError: no regular expression, or one that takes too long.
    """
    if pattern in PRESETS:
        return _is_preset(pattern, path)
    if path == pattern or path.endswith("." + pattern):
        return True
    try:
        return _regex(pattern).means(path, _STEPS + 20 * len(pattern))
    except PatternError as problem:
        raise UsageError(f"{pattern}: {problem} ({path}); write it more simply") from None


def _is_preset(pattern: str, path: str) -> bool:
    if is_embedding(path) or is_head(path):
        return False
    in_attention = any("attn" in part or "attention" in part for part in path.lower().split(".")[:-1])
    if pattern == "mlp":
        return not in_attention and _MLP.fullmatch(path) is not None
    return in_attention or pattern == "all-linear"


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> PathRegex:
    return PathRegex(pattern)


def any_match(patterns: Sequence[str], path: str) -> bool:
    """Whether any of the patterns means this path."""
    return any(matches(p, path) for p in patterns)


def check_patterns(option: str, patterns: Sequence[str], paths: Iterable[str]) -> None:
    """Refuse patterns that are not regular expressions or that mean no module at all.

    Raises:
        UsageError: with the nearest names that exist.
    """
    known = list(paths)
    for pattern in patterns:
        try:
            _regex(pattern)
        except PatternError as problem:
            raise UsageError(f"{option} {pattern}: {problem}") from None
        if not any(matches(pattern, path) for path in known):
            leaves = {p.rpartition(".")[2] for p in known}
            near = nearest(pattern, leaves | set(PRESETS)) or nearest(pattern, known)
            raise UsageError(f"{option} {pattern}: matches no module" + (near or f"; there are {some(sorted(leaves))}"))


_MOST = 12  # patterns that a person may be asked to give
_ENDING = 4  # parts of a path's end


def exclude_only(meant: Collection[str], others: Iterable[str]) -> str:
    """The options that leave out these modules and nothing else, as they are typed; "" if there would be too many.

    >>> exclude_only(["mtp.fc", "mtp.layers.0.q_proj"], ["layers.0.q_proj", "lm_head"])
    '--exclude mtp.+'
    >>> exclude_only(["conv.0"], ["conv.0.0", "to_out.0"])
    '--exclude conv.0'

    Args:
        meant: Paths that are to be left out.
        others: All the other paths that a pattern could mean.
    """
    rest, patterns = sorted(set(meant)), list[str]()
    spared = set(others) - set(meant)
    taken = {key for path in spared for key in _keys(path)}
    while rest:
        if len(patterns) == _MOST:
            return ""
        pattern = _widest(rest, taken)
        if _means_any(pattern, spared):
            pattern = _exact(pattern if pattern.endswith(".+") else rest[0])
        left = [path for path in rest if not matches(pattern, path)]
        if len(left) == len(rest):
            return ""
        patterns.append(pattern)
        rest = left
    return " ".join(f"--exclude {shlex.quote(p)}" for p in patterns)


def _widest(paths: list[str], taken: set[str]) -> str:
    """The pattern that means the most of these paths and, as far as words go, none of the others."""
    counts: Counter[str] = Counter(key for path in paths for key in _keys(path) if key not in taken)
    best = max(counts.values(), default=0)
    if best <= 1:
        return paths[0]
    return min((p for p, n in counts.items() if n == best), key=lambda p: (len(p), p))


def _keys(path: str) -> Iterator[str]:
    """What may stand for a path: everything inside one of its parents, or its ending."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i]) + ".+"
    for i in range(max(0, len(parts) - _ENDING), len(parts)):
        ending = ".".join(parts[i:])
        if ending not in PRESETS and not ending[:1].isdecimal():
            yield ending


def _exact(pattern: str) -> str:
    """The same as a regular expression on the whole path, in which a dot is a dot."""
    if pattern.endswith(".+"):
        return re.escape(pattern.removesuffix(".+")) + r"\..+"
    return f"({re.escape(pattern)})"


def _means_any(pattern: str, paths: Iterable[str]) -> bool:
    try:
        return any(any_match([pattern], path) for path in paths)
    except UsageError:  # a name that is not a regular expression
        return True
