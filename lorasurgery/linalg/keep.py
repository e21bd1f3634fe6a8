"""Energy and tolerance hold for factors as they are written: rounding may make more directions necessary."""

from __future__ import annotations

import math
from collections.abc import Callable

from lorasurgery.linalg.fit import Fitted
from lorasurgery.linalg.rank import SLACK, RankChoice
from lorasurgery.linalg.svd import TruncatedSVD


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
        found: The directions that the rule chose by their σ, with those beyond. fit: Makes factors of some directions.
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
        """Decompose anew, to more directions."""
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
