"""How many singular directions to keep: a number, an energy, a tolerance or a budget. No torch: plans use it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasurgery.arguments import Kind, check_kinds
from lorasurgery.errors import UsageError
from lorasurgery.keywords import saying_keywords

# Σσ̂² and ‖ΔW‖² come out of float32 data, so they agree to about 1e-7 of ‖ΔW‖² at best.
SLACK = 2e-7


@dataclass(frozen=True)
class Budget:
    """Bytes for all factors together, given as they are or as a share of what there was.

    Examples:
        >>> Budget(share=0.25).bytes_of(1000), Budget(size=300).bytes_of(1000)
        (250, 300)
    """

    size: int | None = None
    share: float | None = None

    def bytes_of(self, whole: int) -> int:
        """The bytes allowed, at least one, where `whole` is what a share is taken of."""
        return max(1, self.size if self.size is not None else int((self.share or 0.0) * whole))


@dataclass(frozen=True)
class RankChoice:
    """Exactly one rule, under an optional cap.

    Examples:
        >>> RankChoice(energy=0.9).choose([8.0, 1.5, 0.5], total=10.0)
        2
        >>> RankChoice(tolerance=0.5, max_rank=1).choose([5.0, 4.0, 1.0], total=10.0)
        1

    Args:
        rank: This many directions.
        energy: The least r with Σ_{i≤r} σᵢ² ≥ energy · ‖ΔW‖².
        tolerance: The least r with ‖ΔW − BA‖ ≤ tolerance · ‖ΔW‖.
        budget: Directions of all modules compete until these bytes are spent (see `allocate`).
        sv_ratio: Directions with σ > σ₁/ratio, at least one.
        sv_cumulative: The least r with Σ_{i≤r} σᵢ at least this share of Σσ. Both are sd-scripts' names, and need all
            singular values: for factors, not for extract.
        max_rank: A cap on what the other rules may ask for.

    Raises:
        UsageError: no rule, several rules, or a value out of range.
    """

    rank: int | None = None
    energy: float | None = None
    tolerance: float | None = None
    budget: Budget | None = None
    max_rank: int | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None

    def __post_init__(self) -> None:
        with saying_keywords():
            self._check()

    def _check(self) -> None:
        check_kinds(vars(self), budget=Kind("a Budget", lambda value: isinstance(value, Budget)))
        given = (self.rank, self.energy, self.tolerance, self.budget, self.sv_ratio, self.sv_cumulative)
        if sum(r is not None for r in given) != 1:
            raise UsageError("give exactly one of --rank, --energy, --tolerance, --budget and the --sv rules")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: expected at least 1")
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"--max-rank {self.max_rank}: expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy}: expected a share above 0 and up to 1")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance}: expected a relative error from 0 to below 1")

        if self.sv_ratio is not None and not 1 <= self.sv_ratio < math.inf:
            raise UsageError(f"--sv-ratio {self.sv_ratio}: expected a number of at least 1")
        if self.sv_cumulative is not None and not 0 < self.sv_cumulative <= 1:
            raise UsageError(f"--sv-cumulative {self.sv_cumulative}: expected a share above 0 and up to 1")

    def upper(self, rows: int, columns: int) -> int:
        """The largest rank this rule can give for a matrix of this shape."""
        caps = [c for c in (self.rank, self.max_rank) if c is not None]
        return min(rows, columns, *caps)

    def choose(self, squares: Sequence[float], total: float, slack: float = SLACK) -> int | None:
        """The rank for singular values σᵢ² in falling order, of which `squares` may hold only the first.

        Args:
            slack: Share of the total below which a sum of σᵢ² can't be told from another.

        Returns:
            The rank, or None when the values given do not reach the asked-for energy yet.
        """
        cap = min(len(squares), self.max_rank or len(squares), self.rank or len(squares))
        if self.rank is not None or self.budget is not None:
            return cap
        if self.sv_ratio is not None or self.sv_cumulative is not None:
            return min(cap, self._by_values([math.sqrt(max(s, 0.0)) for s in squares]))
        share = self.energy if self.energy is not None else 1 - (self.tolerance or 0.0) ** 2
        target, found = (share - slack) * total, 0.0
        for i in range(cap):
            if found >= target:
                return i
            found += float(squares[i])
        return cap if found >= target or cap == self.max_rank else None

    @property
    def allowed(self) -> float | None:
        """The squared relative error that energy or tolerance allow; None for the other rules."""
        if self.energy is not None:
            return 1 - self.energy
        return None if self.tolerance is None else self.tolerance**2

    def holds(self, error: float) -> bool:
        """Whether a relative error, of factors as they are written, keeps to energy or tolerance.

        Examples:
            >>> RankChoice(tolerance=0.1).holds(0.1), RankChoice(energy=0.9).holds(0.4), RankChoice(rank=1).holds(0.9)
            (True, False, True)
        """
        if self.energy is not None:
            return 1 - error**2 >= self.energy
        return self.tolerance is None or error <= self.tolerance

    def further(self, squares: Sequence[float], total: float, rank: int, lost: float) -> int | None:
        """The least rank above `rank` that should hold, where the factors of that rank were found to lose `lost`.

        Rounding loses something beside the directions left out, and more directions lose it too.

        Examples:
            >>> RankChoice(tolerance=0.1).further([100.0, 1.0, 0.25, 0.25], 101.5, 1, 1.51)
            2
            >>> RankChoice(tolerance=0.1).further([100.0, 1.0, 0.25, 0.25], 101.5, 1, 2.6) is None
            True

        Args:
            squares: σᵢ² of all directions that are there.
            lost: ‖ΔW − BA‖² as measured.

        Returns:
            None where all of them are not enough, or --max-rank does not allow it.
        """
        target = (self.allowed or 0.0) * total
        for i in range(rank, min(len(squares), self.max_rank or len(squares))):
            lost -= squares[i]
            if lost <= target:
                return i + 1
        return None

    def _by_values(self, singular: Sequence[float]) -> int:
        """sd-scripts' rules, on all singular values in falling order."""
        if self.sv_ratio is not None:
            return max(1, sum(s > singular[0] / self.sv_ratio for s in singular)) if len(singular) else 0
        target, found = (self.sv_cumulative or 0.0) * math.fsum(singular), 0.0
        for i, s in enumerate(singular):
            if found >= target * (1 - 1e-12):
                return i
            found += s
        return len(singular)

    def directions(self) -> int | None:
        """The rank that is known in advance; None for energy and tolerance."""
        if self.rank is None:
            return None
        return min(self.rank, self.max_rank or self.rank)


# Every direction an update has: what an exact sum is written with.
EVERYTHING = RankChoice(tolerance=0.0)


def allocate(spectra: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks that keep the most energy within a budget: directions go by σ² for each byte (optimal, being convex).

    >>> allocate([[9.0, 1.0], [4.0, 3.0]], [10, 10], 30)
    [1, 2]
    >>> allocate([[9.0, 1.0], [4.0, 3.0]], [10, 2], 15)
    [1, 2]

    Args:
        spectra: σᵢ² of each module, falling.
        costs: Bytes of one direction of each module.
        budget: Bytes in all; a direction that no longer fits closes its module, and cheaper ones go on.
    """
    ranks = [0] * len(spectra)
    heap = [(-s[0] / c, i) for i, (s, c) in enumerate(zip(spectra, costs, strict=True)) if len(s) and s[0] > 0]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if costs[i] > budget:
            continue
        budget -= costs[i]
        ranks[i] += 1
        if ranks[i] < len(spectra[i]) and spectra[i][ranks[i]] > 0:
            heapq.heappush(heap, (-spectra[i][ranks[i]] / costs[i], i))
    return ranks


def numerical_rank(singular: Sequence[float], size: int, eps: float) -> int:
    """How many singular values stand above the rounding noise eps·√size·σ₁, size the longer side.

    >>> numerical_rank([1.0, 1e-3, 1e-12], 10, 1.2e-7)
    2
    """
    floor = eps * math.sqrt(size) * singular[0] if len(singular) else 0.0
    return sum(s > floor for s in singular)
