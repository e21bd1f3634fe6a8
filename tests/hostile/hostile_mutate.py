"""Changes to JSON trees, names and bytes, drawn from a seeded generator: what an input may say that no program wrote."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 16, 255, 4096, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), -0.0, True, False, None, "8", "",
]  # fmt: skip
NAMES = [
    "", ".", "..", "../../x", "/etc/passwd", "a/b", "./a", "a//b", "a\\b", "\0", "a\0b", "a\nb", "\r", "\x1b[2J", "\ud800",
    "é", "\u202eabc", "💥", " ", "a b", "-", "a" * 255, "a" * 65536, "." * 3000, "x." * 2000, ".base_layer" * 3000,
    "model.layers.99999999999.q_proj", "layers." + "9" * 5000 + ".q_proj", "٣.q", "__metadata__", "lora_A", "alpha",
    "model.layers.0.self_attn.q_proj.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "lora_unet_a.lora_down.weight", "lora_unet_a.alpha", "x.lora_A.default.weight", "a.modules_to_save.b.weight",
    "[/b][red]x[bold", ":smile:", "aux", "config.json", "model.safetensors", "lorasurgery-undo/0001.safetensors",
]  # fmt: skip
PATTERNS = [
    "(a+)+$", "(.*)*x", "(a|a)*b", "(a|aa)+$", ".*.*.*.*.*.*x", "((((.*)*)*)*)*y", "(x+x+)+y", "a{99999999999999}",
    "(a{1,1000}){1,1000}", "(", ")", "[", "a)|(b", "(?i)q", "(?P<n>a)(?P=n)", r"(a)\1", "(?<=a+)b", "(?>a)", "a*+", "(?!)",
    "(" * 300 + ")" * 300, "[\u0000-\U0010ffff]*", r"\p{L}", "^", "$", "", "|", r".*\.layers\.[0-9]+\.q_proj", "(?=.*v).*",
    "(?:.*?(?:a|b).*?(?:c|d).*?(?:q_proj|v_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:mlp)\\.(?:up_proj))", "q" * 200_000,
]  # fmt: skip
WORDS = ["LORA", "lora", "all-linear", "pissa", "none", "true", "F32", "BF16", "I64", "F4", "F9", "U8", "gpt2", "changed",
         "resized", "added", "steps", "difference", "whole", "about", "ready", "ending", "applied", "done"]  # fmt: skip


def value(rng: random.Random) -> Any:
    """Something that may stand anywhere in a JSON text."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(NAMES)
    if kind < 8:
        return rng.choice(rng.choice((PATTERNS, WORDS)))
    if kind == 8:
        return [value(rng) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {rng.choice(NAMES): value(rng) for _ in range(rng.randrange(3))}
    if kind == 10:
        return nested(rng.choice((3, 63, 64, 65, 300)))
    return rng.choice(([], {}, [[]], [0] * 1000, {str(i): 8 for i in range(1000)}))


def nested(depth: int) -> Any:
    """Lists in lists."""
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def tree(found: Any, rng: random.Random) -> Any:
    """A JSON tree with a few places changed."""
    found = json.loads(json.dumps(found))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        found = _change(found, rng)
    return found


def _change(found: Any, rng: random.Random) -> Any:
    """One place, the nearer to the root the likelier."""
    if not isinstance(found, (dict, list)) or not found or rng.random() < 0.08:
        return _other(found, rng)
    if isinstance(found, list):
        place = rng.randrange(len(found))
        kind = rng.randrange(8)
        if kind == 0:
            del found[place]
        elif kind == 1:
            found.insert(place, value(rng))
        elif kind == 2:
            found.append(found[place])
        else:
            found[place] = _change(found[place], rng)
        return found
    key = rng.choice(list(found))
    kind = rng.randrange(10)
    if kind == 0:
        del found[key]
    elif kind == 1:
        found[_name(key, rng)] = found.pop(key)
    elif kind == 2:
        found[_name(key, rng)] = found[key]
    elif kind == 3:
        other = rng.choice(list(found))
        found[key], found[other] = found[other], found[key]
    else:
        found[key] = _change(found[key], rng)
    return found


def _name(name: str, rng: random.Random) -> str:
    if rng.random() < 0.5 or not name:
        return rng.choice(rng.choice((NAMES, PATTERNS)))
    place = rng.randrange(len(name) + 1)
    return name[:place] + rng.choice(("", ".", "\n", "x", "\0", ".lora_A", "_")) + name[place + rng.randrange(3) :]


def _other(found: Any, rng: random.Random) -> Any:
    if isinstance(found, str) and rng.random() < 0.4:
        return _name(found, rng)
    if type(found) is int and rng.random() < 0.6:
        return found + rng.choice((-1, 1, -8, 8, 4096, -(2**40), 2**40))
    return value(rng)


def text(found: Any, rng: random.Random) -> bytes:
    """A tree as JSON, now and then broken as text."""
    raw = json.dumps(found).encode()
    kind = rng.randrange(20)
    if kind == 0:
        return bytes_(raw, rng)
    if kind == 1:
        return raw[: rng.randrange(len(raw) + 1)]
    if kind == 2:
        return rng.choice((b"", b"null", b"[]", b"\xff\xfe", b"\xef\xbb\xbf" + raw, raw + raw, b"[" * 100_000, b"{" * 3000,
                           b'{"a":' * 100_000, b"9" * 5000, raw.decode().encode("utf-16")))  # fmt: skip
    if kind == 3 and raw[:1] == b"{" and len(raw) > 2:
        return b"{" + raw[1:-1] + b"," + raw[1:]  # every name twice
    return raw


def bytes_(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with a few flipped, cut, doubled or put in."""
    found = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(found):
            found[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del found[place : place + rng.choice((1, 2, 8, 1000))]
        elif kind == 3:
            found[place:place] = found[place : place + rng.randrange(64)]
        else:
            found[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
    return bytes(found)
