"""Our own tails are scipy's, to six digits, as far out as a yearly budget needs them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from lightship.monitoring.tails import (
    beta_binomial_sf,
    binom_sf,
    chi2_sf,
    fisher_greater,
    hypergeom_sf,
    ncx2_isf,
    ncx2_sf,
)
from lightship.monitoring.two_sample import two_sample

LEVELS = st.floats(-13, -0.01).map(lambda e: 10.0**e)


@settings(deadline=None)
@given(alpha=LEVELS, df=st.integers(1, 200))
def test_chi_square_tails_agree_with_scipy(alpha: float, df: int) -> None:
    x = stats.chi2.isf(alpha, df)
    assert float(chi2_sf(x, df)) == pytest.approx(stats.chi2.sf(x, df), rel=1e-6)


@settings(deadline=None)
@given(alpha=LEVELS, df=st.integers(1, 60), nc=st.floats(1e-3, 5_000))
def test_noncentral_chi_square_tails_agree_with_scipy(alpha: float, df: int, nc: float) -> None:
    x = stats.ncx2.isf(alpha, df, nc)
    expected = stats.ncx2.sf(x, df, nc)
    # scipy's own quantile now and then misses by far; what it says of the x it found is what counts.
    if 1e-13 <= expected < 1:
        assert float(ncx2_sf(x, df, nc)) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(alpha=LEVELS, df=st.integers(1, 40), nc=st.floats(0, 500))
def test_the_quantile_is_the_inverse_of_the_tail(alpha: float, df: int, nc: float) -> None:
    assert float(ncx2_sf(ncx2_isf(alpha, df, nc), df, nc)) == pytest.approx(alpha, rel=1e-8)


def test_a_whole_grid_of_features_and_levels_is_computed_at_once_and_in_shape() -> None:
    x = np.linspace(0, 300, 64 * 6).reshape(64, 6)
    nc = np.geomspace(1, 100, 6)
    got = ncx2_sf(x, 9, nc)
    assert got.shape == (64, 6)
    assert np.allclose(got, stats.ncx2.sf(x, 9, nc), rtol=1e-6, atol=1e-16)


def test_the_ends_of_the_range_are_certainties() -> None:
    assert float(ncx2_sf(0.0, 3, 5.0)) == 1.0
    assert float(ncx2_sf(1e6, 3, 5.0)) == 0.0
    assert float(ncx2_sf(10.0, 3, 1e6)) == 1.0
    assert chi2_sf(np.zeros(0), 3).shape == (0,)


@pytest.mark.parametrize(("x", "df", "nc"), [(np.nan, 3, 1), (1.0, 2.5, 1), (1.0, 0, 1), (1.0, 3, -1)])
def test_nonsense_is_refused_and_not_turned_into_a_probability(x: float, df: float, nc: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        ncx2_sf(x, df, nc)


def test_a_level_outside_zero_and_one_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="levels"):
        ncx2_isf(0.0, 3, 1.0)


@settings(deadline=None)
@given(n=st.integers(1, 3_000), p=st.floats(0.001, 0.999), at=st.floats(0, 1))
def test_binomial_tails_agree_with_scipy(n: int, p: float, at: float) -> None:
    x = int(at * n)
    expected = stats.binom.sf(x, n, p)
    if expected > 1e-200:
        assert binom_sf(x, n, p) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(n=st.integers(1, 3_000), a=st.floats(0.5, 500), b=st.floats(1, 20_000), at=st.floats(0, 1))
def test_beta_binomial_tails_agree_with_scipy(n: int, a: float, b: float, at: float) -> None:
    x = int(at * n)
    k = np.arange(x + 1, n + 1)
    expected = float(stats.betabinom.pmf(k, n, a, b).sum())
    if expected > 1e-150:
        assert beta_binomial_sf(x, n, a, b) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(
    errors=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    right=st.tuples(st.integers(1, 2_000), st.integers(1, 2_000)),
)
def test_fishers_exact_test_agrees_with_scipy(errors: tuple[int, int], right: tuple[int, int]) -> None:
    table = [[errors[0], right[0]], [errors[1], right[1]]]
    expected = stats.fisher_exact(table, alternative="greater").pvalue
    got = fisher_greater(errors[0], errors[0] + right[0], errors[1], errors[1] + right[1])
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-200)


def test_counts_outside_their_support_have_certain_tails() -> None:
    assert binom_sf(-1, 10, 0.3) == 1.0
    assert binom_sf(10, 10, 0.3) == 0.0
    assert binom_sf(3, 10, 0.0) == 0.0
    assert binom_sf(3, 10, 1.0) == 1.0
    assert hypergeom_sf(-1, 10, 4, 5) == 1.0
    assert hypergeom_sf(0, 10, 8, 5) == 1.0  # at least three of the drawn are marked


def test_a_beta_that_may_have_two_peaks_is_refused() -> None:
    with pytest.raises(ValueError, match="b >= 1"):
        beta_binomial_sf(1, 10, 0.5, 0.5)


# -- the two-sample test under the null ---------------------------------------------------------------------------


def compositions(rows: int, cells: int) -> npt.NDArray[np.int64]:
    """Every way in which `rows` rows may fall into `cells` cells."""
    if cells == 1:
        return np.array([[rows]])
    rest = [compositions(rows - first, cells - 1) for first in range(rows + 1)]
    return np.concatenate([np.insert(r, 0, first, axis=1) for first, r in enumerate(rest)])


def chances(counts: npt.NDArray[np.int64], shares: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Multinomial probabilities."""
    return np.asarray(stats.multinomial(int(counts[0].sum()), shares).pmf(counts))


@pytest.mark.parametrize(
    ("shares", "rows", "reference"),
    [
        ((0.5, 0.5), 50, 500),
        ((0.3, 0.7), 200, 1_000),
        ((0.1, 0.9), 50, 500),
        ((0.01, 0.99), 100, 1_000),  # a rare cell: one row is expected
        ((0.001, 0.999), 200, 2_000),  # and a fifth of one
        ((0.02, 0.98), 400, 800),
        ((1 / 3, 1 / 3, 1 / 3), 30, 60),
        ((0.02, 0.18, 0.8), 40, 60),
        ((0.25, 0.25, 0.25, 0.25), 12, 16),
    ],
)
def test_the_null_p_value_is_conservative_down_to_one_in_a_million(
    shares: tuple[float, ...], rows: int, reference: int
) -> None:
    """Exactly: all outcomes of both samples are enumerated, and the chances of those that would alarm add up."""
    current, known = compositions(rows, len(shares)), compositions(reference, len(shares))
    weight, known_weight = chances(current, shares), chances(known, shares)
    levels = np.array([10.0**-e for e in range(2, 8)])
    total = np.zeros(len(levels))
    for counts, w in zip(current, weight, strict=True):
        p = two_sample(counts, known).p_value()
        total += w * np.array([known_weight[p <= level].sum() for level in levels])
    assert (total <= levels).all()
