"""The factors of a truncated SVD as they are stored: one side refitted, the error measured, the rank that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, blocked, times, transposed_times
from lorasurgery.linalg.norms import residual_norm, squared_norm
from lorasurgery.linalg.rank import SLACK, RankChoice
from lorasurgery.linalg.svd import TruncatedSVD
from lorasurgery.linalg.thin import mixed, products
from lorasurgery.lowrank import LowRank

# Of less than this share of ‖ΔW‖², or with fewer entries over which float32's rounding evens out, what is left is too
# close a difference of two sums: it is measured entry by entry.
_TOLD_APART, _MANY = 0.01, 1 << 20
_WASTED = 0.1  # of ‖ΔW‖² lost to rounding alone: the numbers vanish in the dtype, for else it costs 10⁻⁵ at most
_DEPENDENT = 1e-10
FIT = 0.5  # passes that fitting is worth, for `truncated_svd` to count on


@dataclass(frozen=True)
class Fitted:
    """ΔW ≈ update, in the dtype of the file.

    Args:
        update: up (m, r), down (r, n), the directions in the order of falling size.
        squares: ‖scale·upᵢ·downᵢ‖_F² of each direction.
        error: ‖ΔW − scale·up@down‖_F.
    """

    update: LowRank
    squares: list[float]
    error: float


def fitted(delta: Tensor | Blocks, found: TruncatedSVD, scale: float, dtype: torch.dtype) -> Fitted:
    """Balanced factors √σ·U and √σ·Vᵀ of ΔW ≈ scale·up@down in `dtype`, with the error measured on what is stored.

    One side is rounded first; the other is the least-squares solution for what was stored. That takes one product
    with ΔW, which is half a pass more of power iteration, makes up for the rounding of the first side, and holds all
    that the error is made of: ‖ΔW‖² − 2⟨ΔW, s·BA⟩ + ‖s·BA‖², summed in float64 (docs/maths.md).

    >>> from lorasurgery.linalg.svd import exact_svd
    >>> delta = torch.diag(torch.tensor([4.0, 3.0]))
    >>> fitted(delta, exact_svd(delta).truncate(1), 1.0, torch.float32).error
    3.0

    Args:
        delta: (m, n), float32 or float64.
        found: Its leading directions, at least one.
        scale: What up@down will be multiplied by, positive.

    Raises:
        SurgeryError: the factors are too large or too small for the dtype.
    """
    matrix = blocked(delta)
    root = (found.s.to(torch.float64) / scale).sqrt()
    tall = _tall(matrix)  # the side that the Krylov basis knows better is the longer one
    one, two = (found.u, found.vt.mT) if tall else (found.vt.mT, found.u)
    if not _fits(root, max(matrix.shape), dtype):
        shift = _shift(_peak(one, root), _peak(two, root), dtype)
        sizes = _peak(one, root) * 2.0**shift, _peak(two, root) * 2.0**-shift
        if max(sizes) > torch.finfo(dtype).max or min(sizes) < torch.finfo(dtype).smallest_normal * 2**-10:
            raise SurgeryError(too_far(dtype, scale, max(sizes)))
        root = root * 2.0**shift
    made = _completed(matrix, (one * root.to(one)).to(dtype), scale, found.total)
    check_kept(made.update, made.error**2 - max(0.0, found.total - float(found.s.square().sum())), found.total)
    return made


def refitted(delta: Tensor | Blocks, update: LowRank, scale: float, total: float | None = None) -> Fitted:
    """The same directions for another scale: one side times a power of two, the other fitted to it again.

    >>> delta = torch.diag(torch.tensor([4.0, 3.0]))
    >>> found = refitted(delta, LowRank(torch.eye(2)[:, :1], 4 * torch.eye(2)[:1]), 0.5)
    >>> found.update.dense().tolist(), found.error
    ([[4.0, 0.0], [0.0, 0.0]], 3.0)

    Args:
        update: As `fitted` gave it for its own scale, or the first of its directions.
        total: ‖ΔW‖² where it is known already.
    """
    matrix = blocked(delta)
    kept = update.up if _tall(matrix) else update.down.mT
    kept = kept.to(matrix.device) * 2.0 ** round(math.log2(update.scale / scale) / 2)
    return _completed(matrix, kept.contiguous(), scale, squared_norm(matrix) if total is None else total)


def narrowed(update: LowRank, dtype: torch.dtype) -> LowRank:
    """Factors in the dtype of the file; where it does not hold one side, a power of two goes over to the other.

    >>> found = narrowed(LowRank(torch.tensor([[2.0**20]]), torch.tensor([[1.0]])), torch.float16)
    >>> found.up.item(), found.down.item()
    (1024.0, 1024.0)

    Raises:
        SurgeryError: the factors are too large for it.
    """
    up, down = update.up, update.down
    if (up.dtype == dtype and down.dtype == dtype) or not update.rank:
        return LowRank(up.to(dtype), down.to(dtype), update.scale)
    peaks = float(up.abs().max()), float(down.abs().max())
    shift = _shift(*peaks, dtype) if all(map(math.isfinite, peaks)) else 0
    if shift:
        up, down = up * 2.0**shift, down * 2.0**-shift
    largest = max(peaks[0] * 2.0**shift, peaks[1] * 2.0**-shift)
    if math.isfinite(max(peaks)) and largest > torch.finfo(dtype).max:
        raise SurgeryError(too_far(dtype, update.scale, largest))
    return LowRank(up.to(dtype), down.to(dtype), update.scale)


def check_kept(update: LowRank, wasted: float, total: float) -> None:
    """Refuse factors of which rounding has lost a large part: their numbers vanish in the dtype.

    Args:
        wasted: The part of ‖ΔW‖² that they have not, though its directions are there.

    Raises:
        SurgeryError: more than a tenth of `total` is lost.
    """
    if wasted > _WASTED * total:
        raise SurgeryError(too_far(update.up.dtype, update.scale, (total / update.scale**2) ** 0.25))


def scale_within(scale: float, power: int) -> float:
    """The scale of a difference that was divided by 2^power.

    >>> scale_within(4.0, 3)
    0.5

    Raises:
        SurgeryError: PEFT, which computes in float32, could not multiply by it.
    """
    info = torch.finfo(torch.float32)
    if not info.tiny <= scale <= info.max:
        raise SurgeryError(f"alpha makes the scale {scale:.3g}, which float32 does not hold; try another --alpha")
    return math.ldexp(scale, -power)


def too_far(dtype: torch.dtype, scale: float, size: float) -> str:
    """What is said of factors that a dtype does not hold.

    >>> too_far(torch.float16, 1.0, 1e6)
    'the factors do not fit float16: their numbers would be about 1.0e+06; try --dtype float32'
    """
    name = str(dtype).removeprefix("torch.")
    advice = "try --dtype float32" if dtype.itemsize < 4 else "its update can't be held in such factors"
    if scale != 1:
        advice = f"try another --alpha{' or --dtype float32' if dtype.itemsize < 4 else ''}"
    at = f" at a scale of {scale:.3g}" if scale != 1 else ""
    return f"the factors do not fit {name}{at}: their numbers would be about {size:.1e}; {advice}"


def _tall(matrix: Blocks) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _fits(root: Tensor, longest: int, dtype: torch.dtype) -> bool:
    """Whether both sides' numbers are the dtype's own, whatever they are: of unit columns, the largest is 1/√m to 1."""
    info = torch.finfo(dtype)
    return info.tiny * math.sqrt(longest) < float(root.max()) < info.max / 2


def _peak(side: Tensor, root: Tensor) -> float:
    """About the largest number of side·diag(root)."""
    largest: Tensor = side.abs().amax(0).cpu().to(torch.float64) * root
    return float(largest.max())


def _shift(one: float, two: float, dtype: torch.dtype) -> int:
    """By which power of two to multiply one side, and divide the other, where the dtype does not hold both as they are.

    >>> _shift(1e5, 10.0, torch.float16), _shift(1.0, 1.0, torch.float16)
    (-7, 0)
    """
    info = torch.finfo(dtype)
    fine = all(info.tiny < x < info.max / 2 for x in (one, two))
    return 0 if fine or not (one and two) else round((math.log2(two) - math.log2(one)) / 2)


def _completed(matrix: Blocks, kept: Tensor, scale: float, total: float) -> Fitted:
    """The factors with `kept` as the one side and the other fitted to it."""
    tall, wide = _tall(matrix), kept.to(matrix.dtype)
    y = transposed_times(matrix, wide) if tall else times(matrix, wide)
    other, squares, rest = _other_side(y, kept, scale)
    if not bool(torch.isfinite(squares).all()):
        raise SurgeryError(too_far(kept.dtype, scale, math.inf))
    up, down = (kept, other.mT) if tall else (other, kept.mT)
    order = squares.argsort(descending=True, stable=True)  # neighbours may have changed places by a little
    update = LowRank(up[:, order], down[order], scale)
    square = total + rest
    told = square > _TOLD_APART * total and matrix.shape[0] * matrix.shape[1] >= _MANY
    return Fitted(update, squares[order].tolist(), math.sqrt(square) if told else residual_norm(matrix, update))


def _other_side(y: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """The side (m, r) that fits `kept` (n, r) best, given Y = A·kept; the directions' squares; ‖A − s·B·Kᵀ‖² − ‖A‖²."""
    gram = products([kept], kept)
    size = gram.diagonal().sqrt()
    shrink = torch.where(size > 0, 1 / size, 0.0)  # a column may have come out as zero in a narrow dtype
    cosines = (shrink[:, None] * gram * shrink).fill_diagonal_(1)
    mix = shrink[:, None] * _inverse(cosines) * shrink / scale
    other = mixed([y], mix).to(kept.dtype)  # (m, r) @ (r, r) -> (m, r)
    both = products([y, other], other)
    inner, own = both[: len(gram)], both[len(gram) :]
    rest = float(scale * (scale * (own * gram).sum() - 2 * inner.diagonal().sum()))
    return other, (scale**2 * own.diagonal() * gram.diagonal()).cpu(), rest


def _inverse(cosines: Tensor) -> Tensor:
    """The inverse; where rounding has made columns dependent, of the directions that are left."""
    lower, failed = torch.linalg.cholesky_ex(cosines)
    if not int(failed):
        solved: Tensor = torch.cholesky_solve(torch.eye(len(cosines)).to(cosines), lower)
        return solved
    if not bool(torch.isfinite(cosines).all()):  # what does not fit the dtype is found out by what comes of it
        return torch.full_like(cosines, math.nan)
    values, vectors = torch.linalg.eigh(cosines)
    kept = torch.where(values > _DEPENDENT * values[-1], 1 / values, 0.0)
    inverse: Tensor = (vectors * kept) @ vectors.mT
    return inverse


def keeping(
    choice: RankChoice, found: TruncatedSVD, fit: Callable[[TruncatedSVD], Fitted], more: Callable[[int], TruncatedSVD]
) -> Fitted:
    """The factors of as many directions as keep the rule; where none do, of those that would without rounding.

    >>> import torch
    >>> from lorasurgery.linalg.fit import fitted
    >>> from lorasurgery.linalg.svd import truncated_svd
    >>> delta, choice = torch.diag(torch.tensor([1.0, 3e-4, 2e-4])), RankChoice(tolerance=2.5e-4)
    >>> found = truncated_svd(delta, choice)
    >>> kept = keeping(choice, found, lambda f: fitted(delta, f, 1.0, torch.float32), lambda rank: found)
    >>> len(found.s), kept.update.rank
    (1, 2)

    Args:
        found: The directions that the rule chose by their σ, with those beyond.
        fit: Makes factors of some directions.
        more: The first so many directions, where those at hand are not enough.
    """
    made = first = fit(found)
    if choice.allowed is None or not found.total:
        return first
    return _Search(choice, found, fit, more).go(first) if not _holds(choice, made, found.total) else first


class _Search:
    """Goes from rank to rank; what rounding costs is known only when factors are made."""

    def __init__(
        self, choice: RankChoice, found: TruncatedSVD, fit: Callable[[TruncatedSVD], Fitted],
        more: Callable[[int], TruncatedSVD],
    ) -> None:  # fmt: skip
        self.choice, self.fit, self.more, self.total = choice, fit, more, found.total
        self.rank, self.whole = len(found.s), found.beyond or found
        self.upper = choice.upper(found.u.shape[0], found.vt.shape[1])
        self.complete = found.passes == 0  # LAPACK gives all
        self.target = (choice.allowed or 0.0) * found.total

    def go(self, made: Fitted) -> Fitted:
        """On from factors that do not hold."""
        least = 1
        while not self._is_hopeless(made.error**2):
            squares = self.whole.s.square().tolist()
            rank = self.choice.further(squares, self.total, self.rank, made.error**2)
            if rank is None:
                if self._widen():
                    continue
                break
            self.rank, least = max(rank, min(self.rank + least, len(squares), self.upper)), 2 * least
            made = self.fit(self.whole.truncate(self.rank))
            if _holds(self.choice, made, self.total):
                return made
        return self._nearest(made)

    def _is_hopeless(self, lost: float) -> bool:
        """Whether rounding alone loses more than is allowed, as far as the energy of what is left out can be told."""
        squares = self.whole.s.square().tolist()
        if self.complete:
            return lost - math.fsum(squares[self.rank :]) > self.target
        tail = max(0.0, self.total - math.fsum(squares[: self.rank]))
        return lost - tail - 2 * SLACK * self.total > self.target

    def _widen(self) -> bool:
        """Decompose again, to more directions."""
        wanted = min(self.upper, 2 * self.rank + 8)
        if self.complete or wanted <= len(self.whole.s):
            return False
        self.whole = self.more(wanted)
        self.complete = len(self.whole.s) < wanted or wanted == self.upper
        return True

    def _nearest(self, made: Fitted) -> Fitted:
        """Where nothing holds: as many directions as would without rounding, or all."""
        squares = self.whole.s[: self.upper].square().tolist()
        rank = next(r for r in range(len(squares) + 1) if math.fsum(squares[r:]) <= self.target)
        return self.fit(self.whole.truncate(rank)) if self.complete and rank > self.rank else made


def _holds(choice: RankChoice, made: Fitted, total: float) -> bool:
    return choice.holds(made.error / math.sqrt(total))
