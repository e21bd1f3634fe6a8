"""safetensors' dtype names, torch's dtypes and what people type. Torch is imported only when it is needed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lorasurgery.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
_TYPED = {
    "float32": "F32", "fp32": "F32", "bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16",
    "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    >>> torch_dtype("BF16")
    torch.bfloat16

    Raises:
        UnsupportedError: torch has no such dtype (F4, F6_E2M3 …).
    """
    import torch

    found = getattr(torch, _TORCH.get(name, ""), None)
    if found is None:
        raise UnsupportedError(f"dtype {name} can be copied but not computed with")
    assert isinstance(found, torch.dtype)
    return found


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    >>> import torch
    >>> dtype_name(torch.float16)
    'F16'
    """
    return {v: k for k, v in _TORCH.items()}[str(dtype).removeprefix("torch.")]


def typed_name(name: str) -> str:
    """What people type for a safetensors dtype name.

    >>> typed_name("BF16")
    'bfloat16'
    """
    return _TORCH.get(name, name)


def parse_dtype(text: str) -> str:
    """What a person types after --dtype, as a safetensors name.

    >>> parse_dtype("bf16")
    'BF16'

    Raises:
        UsageError: not one of the names.
    """
    if text.lower() not in _TYPED:
        raise UsageError(f"--dtype {text}: expected one of {', '.join(_TYPED)}")
    return _TYPED[text.lower()]
