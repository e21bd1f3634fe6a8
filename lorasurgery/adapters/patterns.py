"""--target, --exclude and --full: which module paths a person means by a suffix, a regular expression or a preset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lorasurgery.adapters.naming import is_embedding, is_head
from lorasurgery.errors import UsageError, nearest, some

_ATTENTION = re.compile(r".*(attn|attention)[^.]*\..+", re.IGNORECASE)
_MLP = re.compile(
    r".*\.(mlp|ffn|feed_forward|densereludense|block_sparse_moe|experts|shared_expert|intermediate)\..+"
    r"|.*\.(fc1|fc2|fc_in|fc_out|wi|wi_0|wi_1)|(.*\.)?layers?\.\d+\.output\.dense",
    re.IGNORECASE,
)
PRESETS = ("attention", "mlp", "all-linear")


def matches(pattern: str, path: str) -> bool:
    """Whether a module path is meant by one pattern.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("proj", "a.q_proj")
    (True, False)
    >>> matches(r"model\\.layers\\.[0-3]\\..*", "model.layers.2.mlp.up_proj")
    True
    >>> matches("attention", "h.0.attn.c_attn"), matches("all-linear", "lm_head")
    (True, False)
    """
    linear = not is_embedding(path) and not is_head(path)
    if pattern in PRESETS:
        if pattern == "all-linear":
            return linear
        in_attention = _ATTENTION.fullmatch(path) is not None
        if pattern == "attention":
            return linear and in_attention
        return linear and not in_attention and _MLP.fullmatch(path) is not None
    if path == pattern or path.endswith("." + pattern):
        return True
    return re.fullmatch(pattern, path) is not None


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
            re.compile(pattern)
        except re.error as problem:
            raise UsageError(f"{option} {pattern}: not a regular expression ({problem})") from None
        if not any(matches(pattern, path) for path in known):
            leaves = {p.rpartition(".")[2] for p in known}
            near = nearest(pattern, leaves | set(PRESETS)) or nearest(pattern, known)
            raise UsageError(f"{option} {pattern}: matches no module" + (near or f"; there are {some(sorted(leaves))}"))
