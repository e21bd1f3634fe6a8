"""How updates go into a checkpoint: what merge, unmerge and switch have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from lorasurgery.engine.runtime import check_memory_limit
from lorasurgery.errors import UsageError
from lorasurgery.ops.merging.recipe import Rounding
from lorasurgery.ops.placement.block_weight import check_weights


@dataclass(frozen=True)
class MergeOptions:
    """How adapters are merged, taken out again or switched.

    Args:
        weights: One strength per adapter, any finite number; the rest are 1.
        block_weights: `[N:]PATTERN=W`, an LBW preset or list: strengths by module, for all adapters or the N-th.
        dtype: safetensors name (BF16, F32 …) of floating tensors written, 8-bit ones only where an adapter
            touches them; None keeps each tensor's own.
        rounding: `nearest` (even), or `stochastic`, which is unbiased and seeded by `seed`.
        max_shard_size: Bytes per shard, as the keyword also a size such as "5GB"; None keeps the base's layout.
        allow_loss: Write the result even when rounding keeps less than half of the update.
        allow_nonfinite: Go on where a weight, an update or their sum is NaN or infinite, instead of naming it.
        memory_limit: Bytes that weights on their way may take, as the keyword also a size such as "2GB".
    """

    weights: Sequence[float] = ()
    block_weights: Sequence[str] = ()
    dtype: str | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    max_shard_size: int | None = None
    allow_loss: bool = False
    allow_nonfinite: bool = False
    memory_limit: int | None = None

    def check(self, adapters: int) -> list[float]:
        """The weight of each adapter.

        Raises:
            UsageError: more weights than adapters, one that is not finite, an unknown rounding, or no room to work in.
        """
        check_memory_limit(self.memory_limit)
        if self.rounding not in get_args(Rounding):
            raise UsageError(f"--rounding {self.rounding}: expected one of {', '.join(get_args(Rounding))}")
        return check_weights(self.weights, adapters)
