"""Counting parameters from headers: what is trained, without the buffers that models recompute."""

from __future__ import annotations

from collections import Counter
from math import prod

from lorasurgery.adapters.naming import is_buffer
from lorasurgery.checkpoint.reader import Checkpoint


def count_parameters(model: Checkpoint) -> int:
    """How many parameters a checkpoint has; tied tensors are on the disk once, and count once."""
    return sum(prod(info.shape) for name, info in model.tensors.items() if info.is_float and not is_buffer(name))


def commonest_dtype(model: Checkpoint) -> str:
    """The floating dtype that takes the most bytes; F32 where there is none."""
    sizes: Counter[str] = Counter()
    for info in model.tensors.values():
        if info.is_float:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"
