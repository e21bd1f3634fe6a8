"""The arithmetic of curves: how singular values fall, and what each rank would lose and weigh. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lorasurgery.report import Report, Spectrum

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def spectra_of(report: Report) -> list[Spectrum]:
    """The modules whose singular values are known, finite, and not all zero."""
    return [m for m in report.modules if isinstance(m, Spectrum) and falling(m)]


def falling(module: Spectrum) -> list[float]:
    """σᵢ/σ₁ of a module while it is above zero; nothing for zero updates and for values that are no numbers.

    >>> falling(Spectrum("m", (4, 4), singular_values=[2.0, 1.0, 0.0]))
    [1.0, 0.5]
    """
    values = module.singular_values
    if not all(map(math.isfinite, values)) or not values or values[0] <= 0:
        return []
    return [v / values[0] for v in values if v > 0]


def median_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median of each σᵢ/σ₁ over modules, with zero for those of lower rank, while it is above zero.

    >>> median_curve([[1.0, 0.5], [1.0, 0.3], [1.0]])
    [1.0, 0.3]
    """
    found = []
    for i in range(max(map(len, curves), default=0)):
        middle = median(c[i] if i < len(c) else 0.0 for c in curves)
        if middle <= 0:
            break
        found.append(middle)
    return found


def error_curve(modules: Sequence[Spectrum]) -> list[float]:
    """What is lost when every module keeps its r largest directions, for r = 0, 1, …: √(Σ_{i>r} σᵢ² / Σ σᵢ²).

    >>> [round(e, 3) for e in error_curve([Spectrum("m", (4, 4), singular_values=[4.0, 3.0])])]
    [1.0, 0.6, 0.0]
    """
    most = max((len(m.singular_values) for m in modules), default=0)
    largest = max((m.singular_values[0] for m in modules if m.singular_values), default=0.0) or 1.0
    energies = [0.0] * most  # of the i-th directions of all modules
    for module in modules:
        for i, v in enumerate(module.singular_values):
            energies[i] += (v / largest) ** 2
    tails = [0.0]  # summed from the small end, where a difference from the whole would leave only rounding
    for energy in reversed(energies):
        tails.append(tails[-1] + energy)
    whole = tails[-1] or 1.0
    return [math.sqrt(t / whole) for t in reversed(tails)]


def size_at(modules: Sequence[Spectrum], rank: int, nbytes: int) -> int:
    """Bytes of factors of this rank, lower where a module has fewer directions: Σ min(r, rᵢ)·(mᵢ+nᵢ)·bytes.

    >>> size_at([Spectrum("m", (4, 6), singular_values=[2.0, 1.0, 0.5])], 2, 4)
    80
    """
    return sum(min(rank, len(m.singular_values)) * (m.shape[0] + math.prod(m.shape[1:])) * nbytes for m in modules)


def storage(report: Report) -> tuple[str, int]:
    """The type an adapter is stored in and its bytes; the widest of several, bfloat16 when the report doesn't say."""
    known = [(_BYTES[d], d) for d in report.totals.get("dtypes", ()) if d in _BYTES]
    nbytes, name = max(known, default=(2, "BF16"))
    return name, nbytes


def doublings(most: int) -> list[int]:
    """1, 2, 4, … up to a rank.

    >>> doublings(20)
    [1, 2, 4, 8, 16]
    """
    return [1 << i for i in range(max(most, 1).bit_length())]


def thinned(count: int, most: int) -> list[int]:
    """At most so many of `count` positions, evenly chosen, both ends among them.

    >>> thinned(5, 10), thinned(101, 3)
    ([0, 1, 2, 3, 4], [0, 50, 100])
    """
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]
