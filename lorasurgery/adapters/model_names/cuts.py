"""Where the rows of tensors on disk go that a library takes apart, joins or puts in another order when it loads them.

Read off from its own conversion, run on the numbers of rows in place of weights: whatever it is called, it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """Rows of one tensor on disk that stand together in one tensor in memory.

    Args:
        memory: The tensor's name in memory.
        rows: Which rows of the tensor on disk, in the order that memory has them in.
        into: Where they stand in memory.
        height: How many rows the tensor in memory has.
    """

    memory: str
    rows: range | tuple[int, ...]
    into: range
    height: int


def numbered(shapes: Shapes) -> tuple[dict[str, Tensor], dict[str, range]]:
    """For every tensor one that holds its rows' numbers, and which numbers they are: no two rows share one."""
    import torch

    numbers, owned, first = {}, {}, 0
    for name, shape in shapes.items():
        owned[name] = range(first, first + shape[0])
        numbers[name] = torch.tensor(owned[name]).reshape(shape[0], *[1] * (len(shape) - 1))
        first += shape[0]
    return numbers, owned


def read_cuts(
    loaded: Mapping[str, Tensor], owned: Mapping[str, range], shapes: Shapes, memory: Shapes
) -> dict[str, tuple[Cut, ...]]:
    """Where each tensor's rows have gone; nothing at all unless every row is somewhere, whole, and just once.

    >>> import torch
    >>> loaded = {"q": torch.tensor([[0], [2]]), "k": torch.tensor([[3], [1]])}
    >>> found = read_cuts(loaded, {"qk": range(4)}, {"qk": (4, 8)}, {"q": (2, 8), "k": (2, 8)})
    >>> [(c.memory, list(c.rows)) for c in found["qk"]]
    [('q', [0, 2]), ('k', [3, 1])]

    Args:
        loaded: What the conversion made of the numbers, by names in memory.
        owned: The numbers of each tensor's rows.
        shapes: The tensors' shapes on disk and in memory.
        memory: The tensors' shapes on disk and in memory.
    """
    widths = {shape[1:] for shape in shapes.values()}
    seen = [n for tensor in loaded.values() for n in tensor.flatten().tolist()]
    if len(widths) != 1 or sorted(seen) != list(range(sum(len(r) for r in owned.values()))):
        return {}
    if any(memory.get(name) != (tensor.numel(), *next(iter(widths))) for name, tensor in loaded.items()):
        return {}
    found: dict[str, list[Cut]] = {name: [] for name in owned}
    for name, tensor in loaded.items():
        for disk, cut in _cuts(name, tensor.flatten().tolist(), owned):
            found[disk].append(cut)
    return {disk: tuple(cuts) for disk, cuts in found.items()}


def _cuts(memory: str, numbers: Sequence[int], owned: Mapping[str, range]) -> list[tuple[str, Cut]]:
    owner = {n: disk for disk, rows in owned.items() for n in rows}
    found, at = [], 0
    for disk, group in groupby(numbers, key=owner.__getitem__):
        rows = [n - owned[disk].start for n in group]
        found.append((disk, Cut(memory, as_range(rows), range(at, at + len(rows)), len(numbers))))
        at += len(rows)
    return found


def as_range(rows: Sequence[int]) -> range | tuple[int, ...]:
    """The same rows as a range where they are one, which takes no memory."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and all(b - a == step for a, b in pairwise(rows)):
        return range(rows[0], rows[-1] + 1, step)
    return tuple(rows)
