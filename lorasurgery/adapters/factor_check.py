"""What every tensor of an update must be, whichever format it is stored in."""

from __future__ import annotations

from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.errors import FormatError, UnsupportedError


def check_float(info: TensorInfo, where: str) -> None:
    """Refuse a tensor that holds no floating-point numbers.

    Args:
        info: Its header entry.
        where: The adapter, for the message.

    Raises:
        FormatError: it holds integers, say.
    """
    if not info.is_float:
        raise FormatError(f"{where}: {info.name} is {info.dtype}; expected a floating-point tensor")


def check_factor(info: TensorInfo, where: str) -> None:
    """Refuse a tensor that can't be a factor: a matrix, or one with a kernel, of floating-point numbers.

    >>> check_factor(TensorInfo("a.lora_A.weight", "F32", (16,), 0, 64), "style")
    Traceback (most recent call last):
    lorasurgery.errors.UnsupportedError: style: a.lora_A.weight has shape [16], which is not a factor's

    Args:
        info: Its header entry.
        where: The adapter, for the message.

    Raises:
        FormatError: it is of another dtype, or empty.
        UnsupportedError: it is a vector, or has more than three axes of a kernel.
    """
    check_float(info, where)
    if not 2 <= len(info.shape) <= 5:
        raise UnsupportedError(f"{where}: {info.name} has shape {list(info.shape)}, which is not a factor's")
    if not info.nbytes:
        raise FormatError(f"{where}: {info.name} has shape {list(info.shape)}, so it holds no numbers")
