"""What changes while a recipe is carried out; the recipe itself stays as it was settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.engine.device_memory import Fallback
from lorasurgery.report import Progress

if TYPE_CHECKING:
    import torch

    from lorasurgery.engine.buffers import Buffers


@dataclass
class RunState:
    """One run of a recipe.

    Args:
        device: Where tensors are computed.
        progress: Told of every tensor that is done.
        fallback: Notes where the device's memory does not suffice.
        carried: What else goes along into a new folder, as it was found when the run began: name -> source.
    """

    device: torch.device
    progress: Progress | None = None
    fallback: Fallback = field(default_factory=Fallback)
    carried: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def buffers(self) -> Buffers:
        """Memory that tensors on their way use one after the other."""
        from lorasurgery.engine.buffers import Buffers

        return Buffers(self.device)
