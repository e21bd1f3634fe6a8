"""Which weights of a checkpoint mean something only together with a scale, as headers tell it.

Facts: ComfyUI's QUANTIZATION.md for `_quantization_metadata` and `.weight_scale`; its older files for `scaled_fp8` and
`.scale_weight`; transformers and compressed-tensors for `.weight_scale_inv` and `.weight_packed`.
"""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakKeyDictionary

from lorasurgery.adapters.config_values import endings
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.json_text import parse_object
from lorasurgery.checkpoint.tensor_reader import ModelHeaders
from lorasurgery.errors import FormatError

KEY, MARKER = "_quantization_metadata", "scaled_fp8"
_BESIDE = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "scale_weight", "scale_input",
           "input_scale", "pre_quant_scale", "comfy_quant")  # fmt: skip
_markers: WeakKeyDictionary[ModelHeaders, str | None] = WeakKeyDictionary()
_DEEPEST = 64  # dots in a layer's name
_AFTER = ("_scale", "_scale_inv")  # of parameters without a module: `experts.down_proj_scale`


def is_narrow(dtype: str) -> bool:
    """Whether a dtype has eight bits or fewer for a float, so that most updates are smaller than its steps.

    >>> is_narrow("F8_E4M3"), is_narrow("BF16")
    (True, False)
    """
    return dtype.startswith(("F8", "F6", "F4"))


def is_scale(name: str) -> bool:
    """Whether a tensor is the scale, or another part, of a quantized one; a cast of it would change the weight.

    >>> is_scale("blocks.0.attn.qkv.weight_scale"), is_scale("blocks.0.attn.qkv.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in (*_BESIDE, MARKER)


def scale_of(base: ModelHeaders, info: TensorInfo) -> str | None:
    """What in the checkpoint says that this weight is stored with a scale; None for a plain weight.

    Args:
        info: The weight's entry in the header.
    """
    stem = module_of(info.name)
    beside = [f"{stem}.{leaf}" for leaf in _BESIDE] if info.name.endswith(".weight") else []
    found = next((n for n in (*beside, *(info.name + end for end in _AFTER)) if n in base.tensors), None)
    if found or info.name not in base.file_of:
        return found
    narrow = is_narrow(info.dtype)
    marker = _marker(base) if narrow else None
    if marker:
        return marker
    file = base.file_of[info.name]
    layers = _layers(base.files[file].metadata.get(KEY))
    named = layers is not None and any(end in layers for end in endings(stem, _DEEPEST))
    unknown = narrow and layers is not None and not layers
    return f"{KEY} in the header of {file}" if named or unknown else None


def _marker(base: ModelHeaders) -> str | None:
    """The tensor that says that all 8-bit weights have scales; looked for once, for there may be 10⁵ names."""
    if base not in _markers:
        _markers[base] = next((n for n in base.tensors if n.rpartition(".")[2] == MARKER), None)
    return _markers[base]


@lru_cache(maxsize=16)
def _layers(text: str | None) -> frozenset[str] | None:
    """The layers that the header calls quantized: None without such a word, empty when it can't be understood.

    Parsed once, for it is asked for every tensor.
    """
    if text is None:
        return None
    try:
        layers = parse_object(text.encode(), KEY).get("layers")
    except FormatError:
        return frozenset()
    return frozenset(layers) if isinstance(layers, dict) else frozenset()
