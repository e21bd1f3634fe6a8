"""The best factors of some rank of a whole update, as they are stored: out of thin factors, or of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import InMemory
from lorasurgery.linalg.core import SMALLEST, Core, beyond, recompress
from lorasurgery.linalg.fit import Fitted, check_kept, keeping, narrowed, too_far
from lorasurgery.linalg.norms import losses, ranged, residual_norm, squared_norm
from lorasurgery.linalg.rank import EVERYTHING, RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, truncated_svd
from lorasurgery.linalg.thin import NOT_FINITE
from lorasurgery.lowrank import LowRank, Update

BEYOND = "its update is beyond what float32 holds; look at its alphas and weights"
_EXACT = 1e-14  # sums of σ² in float64 agree to this


@dataclass(frozen=True)
class Truncated(Fitted):
    """An update cut to some rank.

    Args:
        norm: ‖ΔW‖.
        left: ‖ΔW − BA‖² for the first r directions alone, for r from 0 up; empty where it was not asked for.
    """

    norm: float
    left: Sequence[float] = ()


def core_of(terms: Sequence[LowRank], choice: RankChoice) -> Core:
    """The sum of thin factors in few numbers, as far as a rule of rank needs it.

    Raises:
        SurgeryError: numbers too small to be squared, or not finite.
    """
    core = recompress(terms, choice.directions() or choice.max_rank)
    if 0 < core.size < SMALLEST:
        raise SurgeryError(beyond(core.size))
    return core


def rank_of(core: Core, choice: RankChoice) -> int:
    """How many directions a rule takes of a sum."""
    if choice is EVERYTHING or not core.total:
        return core.rank
    chosen = choice.choose(core.singular.square().tolist(), core.total, _EXACT)
    return min(core.rank, core.rank if chosen is None else chosen)


def truncated_core(
    core: Core, choice: RankChoice, shape: tuple[int, int], dtype: torch.dtype, *, stepwise: bool = False
) -> Truncated:
    """A sum of thin factors, cut to as many directions as the rule needs in the dtype of the file.

    >>> one = LowRank(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2))
    >>> choice = RankChoice(rank=1)
    >>> truncated_core(core_of([one], choice), choice, (2, 2), torch.float32).error
    1.0

    Args:
        shape: (m, n) of the sum.
        stepwise: Whether what every smaller rank leaves is wanted too.

    Raises:
        SurgeryError: the factors do not fit the dtype.
    """
    rank = rank_of(core, choice)

    def fit(found: TruncatedSVD) -> Fitted:
        kept = core.truncate(len(found.s))
        written = narrowed(kept, dtype)
        lost = _losses(core, written)[-1]
        check_kept(written, lost - core.tail(kept.rank), core.total)
        return Fitted(written, core.singular[: kept.rank].square().tolist(), math.sqrt(lost))

    # the directions themselves are the core's: here they are only counted
    up, down = torch.empty(shape[0], 0), torch.empty(0, shape[1])
    found = TruncatedSVD(up, core.singular[: core.rank], down, core.total)
    if choice is EVERYTHING:
        made = fit(found.truncate(rank))
    else:
        made = keeping(choice, replace(found.truncate(rank), beyond=found), fit, found.truncate)
    left = _losses(core, made.update) if stepwise else ()
    return Truncated(made.update, made.squares, made.error, math.sqrt(core.total), left)


def _losses(core: Core, written: LowRank) -> list[float]:
    """What the first r directions leave, for every r; in float32 rounding is too little to be measured."""
    if written.up.dtype == torch.float32 and core.is_plain and not core.terms:
        return [core.tail(r) for r in range(written.rank + 1)]
    return core.losses(written)


def truncated_matrix(
    dense: Tensor, choice: RankChoice, dtype: torch.dtype, *, seed: int = 0, stepwise: bool = False
) -> Truncated:
    """A matrix, cut to as many directions as the rule needs in the dtype of the file.

    >>> truncated_matrix(torch.diag(torch.tensor([4.0, 3.0])), RankChoice(rank=1), torch.float32).error
    3.0

    Args:
        dense: (m, n), float32.
        seed: Of the randomized SVD.
        stepwise: Whether what every smaller rank leaves is wanted too.

    Raises:
        SurgeryError: values that float32 does not hold, or factors that do not fit the dtype.
    """
    delta, power = ranged(InMemory(dense))
    if not math.isfinite(squared_norm(delta)):
        raise SurgeryError(BEYOND)
    found = truncated_svd(delta, choice, seed=seed)
    norm = math.ldexp(math.sqrt(found.total), power)
    if not found.total:
        return Truncated(LowRank(found.u.to(dtype), found.vt.to(dtype)), [], 0.0, 0.0)

    def fit(found: TruncatedSVD) -> Fitted:
        root = (found.s * 2.0**power).sqrt().to(found.u)
        written = narrowed(LowRank(found.u * root, root[:, None] * found.vt), dtype)
        error = residual_norm(delta, written.with_scale(2.0**-power))
        check_kept(written, error**2 - max(0.0, found.total - float(found.s.square().sum())), found.total)
        return Fitted(written, (found.s * 2.0**power).square().tolist(), error)

    made = keeping(choice, found, fit, lambda rank: truncated_svd(delta, RankChoice(rank=rank), seed=seed))
    scaled = made.update.with_scale(2.0**-power)
    left = [math.ldexp(x, 2 * power) for x in losses(delta, scaled)] if stepwise else ()
    return Truncated(made.update, made.squares, math.ldexp(made.error, power), norm, left)


def to_store(update: LowRank, norm: float) -> LowRank:
    """Factors on the CPU, ready to be written.

    Args:
        norm: ‖ΔW‖ of what they stand for.

    Raises:
        SurgeryError: one of these is not finite.
    """
    if not math.isfinite(norm):
        raise SurgeryError(NOT_FINITE)
    if not all_finite(update):
        raise SurgeryError(too_far(update.up.dtype, 1.0, math.sqrt(norm)))
    return LowRank(update.up.cpu().contiguous(), update.down.cpu().contiguous(), update.scale)


def all_finite(update: Update) -> bool:
    """Whether no number in an update is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in update.tensors)
