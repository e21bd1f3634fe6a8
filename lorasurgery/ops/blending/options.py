"""What blend makes of several adapters, and rerank of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasurgery.errors import UsageError
from lorasurgery.linalg.methods import METHODS, BlendMethod
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.placement.block_weight import check_weights

if TYPE_CHECKING:
    pass

DENSITY = 0.5


@dataclass(frozen=True)
class BlendOptions:
    """How adapters are brought together and at which rank the result is kept.

    Args:
        method: `linear` is the exact weighted sum, `cat` the same with all factors kept side by side; the others
            are defined in docs/maths.md.
        choice: Rank by number, energy, tolerance or budget (a share is of the inputs' bytes). None keeps everything:
            the minimal exact rank; for methods with a dense result, the highest rank of the inputs.
        weights: One strength per adapter, the rest are 1.
        block_weights: `[N:]PATTERN=W`, an LBW preset or list: strengths by module, for all adapters or the N-th.
        normalize: Divide the weights by their sum.
        density: Share of entries kept by TIES, DARE and pruning; None stands for 0.5.
        seed: Of DARE's masks and of the randomized SVD.
        uniform_rank: Zero-pad all factors to one rank.
        dtype: safetensors name of what factors are written in; None takes the inputs' widest, and at least float32
            for a blend that is to be exact.
        average_replaced: Take the weighted mean of tensors that several adapters store whole.
    """

    method: BlendMethod = "linear"
    choice: RankChoice | None = None
    weights: Sequence[float] = ()
    block_weights: Sequence[str] = ()
    normalize: bool = False
    density: float | None = None
    seed: int = 0
    uniform_rank: bool = False
    dtype: str | None = None
    average_replaced: bool = False
    command: str = field(default="blend", repr=False)

    @property
    def share(self) -> float:
        """The density in force."""
        return DENSITY if self.density is None else self.density

    def check(self) -> None:
        """Raise UsageError for options that contradict each other or have no meaning."""
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: expected one of {', '.join(METHODS)}")
        if self.density is not None and self.method in ("linear", "cat"):
            raise UsageError(f"--density: {self.method} keeps every entry; it belongs to the other methods")
        if not 0 < self.share <= 1:
            raise UsageError(f"--density {self.share}: expected a share above 0 and up to 1")
        if self.method == "cat" and self.choice is not None:
            raise UsageError("--method cat keeps every direction; --method linear is the same sum at a chosen rank")
        if self.dtype not in (None, "F32", "BF16", "F16"):
            raise UsageError("--dtype: an adapter is written as float32, bfloat16 or float16")

    def strengths(self, adapters: int) -> list[float]:
        """The weight of each adapter, normalised if asked for."""
        weights = check_weights(self.weights, adapters)
        if not self.normalize:
            return weights
        total = sum(weights) if math.isinf(sum(weights)) else math.fsum(weights)
        shares = [w / total for w in weights] if total else []
        if not shares or not all(map(math.isfinite, shares)) or not any(shares):
            raise UsageError(f"--normalize: the weights sum to {total:g}, so they can't be made to sum to 1")
        return shares
