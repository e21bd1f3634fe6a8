"""The curves say what a direct computation says."""

from __future__ import annotations

import math

import families
import numpy as np
import pytest

from lorasurgery.plots.measures import (
    error_curve,
    falling,
    median_curve,
    size_at,
    spectra_of,
    storage,
    thinned,
)
from lorasurgery.report import ModuleReport, Report, Spectrum


def spectrum(values: list[float], shape: tuple[int, ...] = (8, 6)) -> Spectrum:
    return Spectrum("m", shape, singular_values=values)


def test_error_against_rank_is_that_of_truncated_matrices() -> None:
    """error(r) is ‖ΔW − best rank-r ΔW‖/‖ΔW‖ over all modules, as matrices say it."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(8, 6)) * 3, rng.normal(size=(5, 3)), np.zeros((4, 4))]
    parts = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    found = error_curve([spectrum(s.tolist(), m.shape) for m, (_, s, _) in zip(matrices, parts, strict=True)])
    whole = math.sqrt(sum(np.linalg.norm(m) ** 2 for m in matrices))
    for rank, error in enumerate(found):
        lost = [m - (u[:, :rank] * s[:rank]) @ vt[:rank] for m, (u, s, vt) in zip(matrices, parts, strict=True)]
        assert error == pytest.approx(math.sqrt(sum(np.linalg.norm(x) ** 2 for x in lost)) / whole, abs=1e-12)


def test_small_errors_are_no_rounding() -> None:
    """A tail of 1e-12 of the norm is told exactly, and the last rank loses nothing."""
    assert error_curve([spectrum([1.0, 1e-12])])[1:] == [pytest.approx(1e-12, rel=1e-9), 0.0]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_does_not_matter(scale: float) -> None:
    """Huge and tiny updates have the same curve."""
    values = [4.0, 3.0]
    assert error_curve([spectrum([v * scale for v in values])]) == pytest.approx(error_curve([spectrum(values)]))


def test_sizes_are_those_of_the_factors() -> None:
    """r·(m+n) parameters for each module, a convolution counted as its matrix, none beyond a module's own rank."""
    both = [spectrum([3.0, 2.0, 1.0], (8, 6)), spectrum([1.0], (4, 2, 3, 3))]
    assert [size_at(both, r, 2) for r in (1, 2, 3, 9)] == [2 * (14 + 22), 2 * (28 + 22), 2 * (42 + 22), 2 * (42 + 22)]


def test_bytes_follow_the_report() -> None:
    """float32 takes four bytes, half precision two; the widest counts where types are mixed."""
    assert storage(Report("inspect", [], "", totals={"dtypes": ["F32"]})) == ("F32", 4)
    assert storage(Report("inspect", [], "", totals={"dtypes": ["BF16", "F32", "I64"]})) == ("F32", 4)
    assert storage(Report("inspect", [], "")) == ("BF16", 2)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_has_no_curve_is_left_out(values: list[float]) -> None:
    """Zero updates and values that are not numbers have no spectrum to draw."""
    report = Report("inspect", [], "", modules=[spectrum(values), spectrum([1.0]), ModuleReport("x", (2, 2))])
    assert [falling(m) for m in spectra_of(report)] == [[1.0]]


def test_median_counts_missing_directions_as_zero() -> None:
    """Modules of lower rank pull the median down instead of leaving it to the others."""
    assert median_curve([[1.0, 0.8, 0.6], [1.0, 0.4], [1.0, 0.2]]) == [1.0, 0.4]
    assert median_curve([[1.0]]) == [1.0]


def test_thinning_keeps_the_ends() -> None:
    """Fewer points, each once, the first and the last among them."""
    found = thinned(18_432, 400)
    assert (len(set(found)), found[0], found[-1]) == (400, 0, 18_431)


def test_made_up_spectra_have_falling_values() -> None:
    """The tests' own reports are possible ones."""
    for module in spectra_of(families.spectra(families.bert())):
        assert module.singular_values == sorted(module.singular_values, reverse=True)
