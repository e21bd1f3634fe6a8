"""--target, --exclude and --full: which module paths a person means by a suffix, a regular expression or a preset.

A name comes from a file and an expression from a person: neither may make the other take for ever (path_regex.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from lorasurgery.adapters.naming import is_embedding, is_head
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
    """Refuse patterns that are no regular expression or that mean no module at all.

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
