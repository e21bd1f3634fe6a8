"""Whether two tensors of different dtypes can be roundings of the same numbers."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENT = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # where a float keeps it
_PART, _PART_ON_GPU = 1 << 16, 1 << 20  # elements at a time: in a core's cache; worth a kernel's launch


def same_but_rounded(a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether at every place there is a number that rounds to a's value in one dtype and to b's in the other.

    That is so where the two are at most half a step apart, of the dtype whose steps are wider there. A cast of one
    side would ask for too much: float16 and bfloat16 of one float32 weight are no casts of each other in one place of
    sixteen, for the cast meets half-way values that the weight was only near to. Half-way counts for both neighbours.

    >>> x = torch.tensor([0.1, -3.3, 1e-7])
    >>> same_but_rounded(x.half().float(), x, (torch.float16, torch.float32))
    True
    >>> same_but_rounded(x.half().float(), x * 1.001, (torch.float16, torch.float32))
    False

    Args:
        a, b: Of one shape, both float32 or both float64, contiguous; NaN and infinity are no roundings.
        dtypes: What a and b were stored in.
    """
    one = max(step_at_one(d) for d in dtypes) / 2
    least = max(_least_step(d) for d in dtypes) / 2
    part = _PART if a.device.type == "cpu" else _PART_ON_GPU
    # torch casts float64 to less than 32 bits by way of float32, and so rounds twice
    dtype = torch.float64 if {*dtypes} == {torch.float32, torch.float64} else torch.float32
    for x, y in zip(torch.split(a.reshape(-1), part), torch.split(b.reshape(-1), part), strict=True):
        x, y = x.to(dtype), y.to(dtype)
        if not ((x - y).abs_() <= _half_steps(x, y, one, least)).all():
            return False
    return True


def _half_steps(x: Tensor, y: Tensor, one: float, least: float) -> Tensor:
    """Half a step next to the smaller of two values, for below a power of two steps are half as wide as above it."""
    bits = torch.minimum(x.abs(), y.abs()).view(_WORDS[x.dtype.itemsize])
    return bits.bitwise_and_(_EXPONENT[x.dtype]).view(x.dtype).mul_(one).clamp_min_(least)


@cache
def step_at_one(dtype: torch.dtype) -> float:
    """From 1 to the next larger value: torch.finfo's eps, save for float8_e5m2fnuz, where that is half of it.

    >>> step_at_one(torch.bfloat16)
    0.0078125
    """
    one = torch.ones(1).to(dtype).view(_WORDS[dtype.itemsize])
    return (one + 1).view(dtype).double().item() - 1


@cache
def _least_step(dtype: torch.dtype) -> float:
    """From 0 to the least positive value."""
    return torch.ones(1, dtype=_WORDS[dtype.itemsize]).view(dtype).double().item()
