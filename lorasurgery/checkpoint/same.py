"""Whether tensors are the same, byte for byte, whatever their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.engine.buffers import Buffers

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2 << 20  # bytes of one side: both stay in cache


class Filling(Protocol):
    """What tensors are read from: a checkpoint, or one as it was before a merge."""

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read `len(view)` bytes of a tensor, from its byte `start` on; see Checkpoint.fill."""
        ...


def same_tensors(
    one: Filling, first: TensorInfo, other: Filling, second: TensorInfo, memory: Buffers | None = None
) -> bool:
    """Tell whether two tensors have the same dtype, shape and bytes; in blocks, on the call's threads.

    Args:
        one: What `first` is read from.
        first: A tensor of any dtype.
        other: What `second` is read from.
        second: The tensor that it is compared with.
        memory: Lends the blocks; None takes memory of its own.

    Raises:
        FormatError: a file changed or ends too soon.
    """
    import torch

    from lorasurgery.engine.threads import parallel_for

    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    buffers = memory or Buffers(torch.device("cpu"))
    differing: list[int] = []

    def compare(start: int) -> None:
        size = min(_BLOCK, first.nbytes - start)
        if not differing:  # after the first block that differs none is read any more
            with _lent(buffers, size) as here, _lent(buffers, size) as there:
                one.fill(first.name, here.numpy().data, start)
                other.fill(second.name, there.numpy().data, start)
                if not same_bytes(here, there):
                    differing.append(start)

    parallel_for(compare, range(0, first.nbytes, _BLOCK))
    return not differing


@contextmanager
def _lent(buffers: Buffers, size: int) -> Iterator[Tensor]:
    buffer = buffers.take(size)
    try:
        yield buffer[:size]
    finally:
        buffers.give(buffer)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Tell whether two uint8 tensors of one length are equal, eight bytes at a time.

    >>> import torch
    >>> same_bytes(torch.arange(9, dtype=torch.uint8), torch.arange(9, dtype=torch.uint8))
    True
    """
    import torch

    whole = a.numel() // 8 * 8
    wide = torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64))
    return wide and torch.equal(a[whole:], b[whole:])
