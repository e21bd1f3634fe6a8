"""The grammar of keys in adapter files that have no config: which module, and which part of its update.

Families: kohya (sd-scripts) and LyCORIS, diffusers old and new, ComfyUI and the original authors' own, XLabs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorasurgery.adapters.single_file.products import KINDS, read_lora
from lorasurgery.errors import FormatError, UnsupportedError

_ENDINGS = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "bias",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "diff_b": "diff_b", "w_norm": "w_norm", "b_norm": "b_norm", "set_weight": "set_weight",
    **{part: part for parts, read in KINDS if read is not read_lora for part in parts},
}  # fmt: skip
_MOST_PARTS = max(ending.count(".") for ending in _ENDINGS) + 1
# `lora_A.default.weight`: PEFT's adapter name has not been stripped.
_NAMED = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.[^.]+\.weight$")
# `attn1.processor.to_q_lora.down.weight`: diffusers before PEFT; `processor.qkv_lora1.down.weight`: XLabs.
_PROCESSOR = re.compile(
    r"(?P<path>.+?)\.(?:processor\.)?(?P<leaf>\w+)_lora(?P<stream>[12]?)\.(?P<side>down|up)\.weight$"
)
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_REFUSED = {
    ".oft_blocks": "OFT or BOFT (an orthogonal transformation, not an addition; its alpha is a constraint, no scale)",
    ".oft_diag": "OFT (an orthogonal transformation, not an addition)",
    ".on_input": "IA3 (a scaling of activations)",
    ".a1.weight": "GLoRA (a product with the base's own weight)",
    ".a2.weight": "GLoRA (a product with the base's own weight)",
    ".lambda_layer": "T-LoRA (a difference from factors that are not in the file)",
    "lora_controlnet": "a Control-LoRA",
    ".reshape_weight": "an adapter that reshapes the base's weight",
}


def parse_key(key: str) -> tuple[str, str] | None:
    """A key's module path, as the file writes it, and its part; None for a key of no known family.

    >>> parse_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'down')
    >>> parse_key("unet.mid_block.attentions.0.attn1.processor.to_out_lora.up.weight")
    ('unet.mid_block.attentions.0.attn1.to_out.0', 'up')
    >>> parse_key("double_blocks.3.processor.qkv_lora2.down.weight")
    ('double_blocks.3.txt_attn.qkv', 'down')
    """
    parts = key.rsplit(".", _MOST_PARTS)
    for start in range(1, len(parts)):  # the longest ending first
        ending = ".".join(parts[start:])
        if ending in _ENDINGS:
            return key[: -len(ending) - 1], _ENDINGS[ending]
    named = _NAMED.match(key)
    if named:
        return named["path"], "down" if named["side"] == "A" else "up"
    old = _PROCESSOR.match(key)
    return (_old_path(old), old["side"]) if old else None


def _old_path(match: re.Match[str]) -> str:
    path, leaf, stream = match["path"], match["leaf"], match["stream"]
    if "double_blocks." in path or "single_blocks." in path:
        if stream:
            return f"{path}.{'img' if stream == '1' else 'txt'}_attn.{leaf}"
        return f"{path}.{'linear2' if leaf == 'proj' else leaf}"
    if path.endswith("self_attn"):
        return f"{path}.{_OLD_TEXT.get(leaf, leaf)}"
    return f"{path}.{'to_out.0' if leaf == 'to_out' else leaf}"


def group_keys(keys: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """All keys by module path and part; every key is accounted for.

    Raises:
        UnsupportedError: a known family that has no additive update.
        FormatError: a key of no family, or one twice.
    """
    found: dict[str, dict[str, str]] = {}
    every = list(keys)
    for key in every:  # first, for a refused family may have keys that say nothing by themselves (IA3's `weight`)
        refuse(key, where)
    for key in every:
        parsed = parse_key(key)
        if parsed is None:
            raise FormatError(f"{where}: {key} is not an adapter tensor that lorasurgery knows")
        path, part = parsed
        parts = found.setdefault(path, {})
        if part in parts:
            raise FormatError(f"{where}: {parts[part]} and {key} are both {part} of {path}; keep one adapter in a file")
        parts[part] = key
    return found


def refuse(key: str, where: str) -> None:
    """Raise UnsupportedError for the families that are no sum, by name."""
    for part, meaning in _REFUSED.items():
        if part in key:
            raise UnsupportedError(f"{where}: {key} belongs to {meaning}, which lorasurgery does not merge")


def is_adapter_key(key: str) -> bool:
    """Whether a key belongs to any adapter family, refused ones included."""
    return parse_key(key) is not None or any(part in key for part in _REFUSED)
