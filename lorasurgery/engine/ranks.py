"""One command on several processes, as torchrun starts them: who am I, and waiting for one another.

Ranks share nothing but the file system and barriers: each does its own part, and rank 0 puts the parts together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from lorasurgery.errors import SurgeryError

T = TypeVar("T")
_GONE = "another rank is gone ({}); its own message says why"
_PATIENCE = timedelta(days=30)  # a rank may be busy for hours; when one dies, torchrun ends the others at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of one job.

    >>> Ranks().wait()  # alone: nobody to wait for

    Args:
        rank: 0 writes index, config and report.
        size: How many there are.
        local: Which of those on this machine, and so which of its GPUs.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that finishes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all have come as far as this.

        Raises:
            SurgeryError: another rank is gone.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            dist.barrier()
        except RuntimeError as problem:
            raise SurgeryError(_GONE.format(_line(problem))) from None

    def told(self, word: str) -> str:
        """Rank 0's word, for all; like wait() it takes until all are here.

        >>> Ranks().told("a")
        'a'

        Raises:
            SurgeryError: another rank is gone.
        """
        self.wait()
        if self.size == 1:
            return word
        import torch.distributed as dist

        found = [word]
        try:
            dist.broadcast_object_list(found, 0)
        except RuntimeError as problem:
            raise SurgeryError(_GONE.format(_line(problem))) from None
        return found[0]

    def mine(self, items: Sequence[T], costs: Sequence[int]) -> list[T]:
        """This rank's part of the items: neighbours, about an equal share of the costs.

        >>> [Ranks(r, 2).mine("abcd", [1, 1, 1, 3]) for r in (0, 1)]
        [['a', 'b', 'c'], ['d']]
        """
        total, before, found = max(sum(costs), 1), 0, []
        for item, cost in zip(items, costs, strict=True):
            if (2 * before + cost) * self.size // (2 * total) == self.rank:  # the share that holds its middle
                found.append(item)
            before += cost
        return found


def ranks() -> Ranks:
    """This process's place, from the variables that torchrun sets; alone where there are none.

    Raises:
        SurgeryError: the variables contradict each other.
    """
    try:
        rank, size, local = (int(os.environ.get(name, value)) for name, value in _VARIABLES)
    except ValueError:
        raise SurgeryError("RANK, WORLD_SIZE and LOCAL_RANK: expected the numbers that torchrun sets") from None
    if not 0 <= rank < size:
        raise SurgeryError(f"RANK={rank} but WORLD_SIZE={size}: start all ranks with torchrun")
    return Ranks(rank, size, local)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:120]
