"""Monitoring: tail probabilities, in numpy and the standard library alone.

Rules of this room:
* pure functions of numbers; scipy appears only in the tests, which hold these to 1e-6 relative down to p = 1e-13;
* survival functions follow scipy's convention: `sf(x)` is P(X > x), strictly, also for counts;
* sums have only positive terms, so a small tail loses no digits; what underflows is 0.

Sources: Johnson, Kotz, Balakrishnan, Continuous Univariate Distributions vol. 2, ch. 29 (the noncentral χ² as a
Poisson mixture); Abramowitz & Stegun 26.4.4–5 (χ² tails as finite sums), 26.5.8 (the incomplete beta function) and
6.1.40 (Stirling's series).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Elements of the largest matrix a call may build; longer inputs go in slices.
_SLICE: Final = 1_000_000
#: Standard deviations below the mean from which P(X > x) is 1 in double precision.
_CERTAIN: Final = 12.0
#: A noncentrality below this changes no digit that matters, and its logarithm may not exist.
_CENTRAL: Final = 1e-12


def chi2_sf(x: npt.ArrayLike, df: npt.ArrayLike) -> Floats:
    """P(χ²_df > x), elementwise; `df` are integers ≥ 1, broadcast against `x`.

    Raises:
        ValueError: for a `df` that is no positive integer, or a NaN.
    """
    values, freedom = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(df, dtype=np.float64))
    _check(values, freedom)
    flat = _chi2_flat(np.maximum(values.ravel(), 0.0), freedom.ravel())
    return flat.reshape(values.shape)


def ncx2_sf(x: npt.ArrayLike, df: npt.ArrayLike, nc: npt.ArrayLike) -> Floats:
    """P(χ²_df(nc) > x), elementwise, for integers `df` ≥ 1 and noncentralities `nc` ≥ 0.

    The Poisson mixture Σ_j Pois(j; nc/2)·Q(df/2 + j, x/2) is summed only where its terms are: around
    j = nc/2, or around the root of j(df/2 + j) = nc·x/4 when x lies in the upper tail.

    Raises:
        ValueError: for a `df` that is no positive integer, a negative `nc`, or a NaN.
    """
    arrays = (np.asarray(x, dtype=np.float64), np.asarray(df, dtype=np.float64), np.asarray(nc, dtype=np.float64))
    values, freedom, noncentral = np.broadcast_arrays(*arrays)
    _check(values, freedom)
    if not (noncentral >= 0).all():
        raise ValueError("expected noncentralities ≥ 0")
    shape = values.shape
    values, freedom, noncentral = values.ravel(), freedom.ravel(), noncentral.ravel()
    out = np.ones(values.shape)
    sd = np.sqrt(2 * (freedom + 2 * noncentral))
    open_ = (values > 1e-300) & (values > freedom + noncentral - _CERTAIN * sd)
    central = open_ & (noncentral < _CENTRAL)
    out[central] = _chi2_flat(values[central], freedom[central])
    mixed = np.flatnonzero(open_ & (noncentral >= _CENTRAL))
    # Neighbours in noncentrality need windows of like width.
    mixed = mixed[np.argsort(noncentral[mixed], kind="stable")]
    for part in _parts(values, freedom, noncentral, mixed):
        out[part] = _mixture(values[part], freedom[part], noncentral[part])
    return out.reshape(shape)


def ncx2_isf(alpha: npt.ArrayLike, df: npt.ArrayLike, nc: npt.ArrayLike) -> Floats:
    """The x with P(χ²_df(nc) > x) = `alpha`, elementwise, by bisection to 1e-12 relative; `alpha` in (0, 1].

    Raises:
        ValueError: for an `alpha` outside (0, 1], and as `ncx2_sf` does.
    """
    arrays = (np.asarray(alpha, dtype=np.float64), np.asarray(df, dtype=np.float64), np.asarray(nc, dtype=np.float64))
    level, freedom, noncentral = np.broadcast_arrays(*arrays)
    if not ((level > 0) & (level <= 1)).all():
        raise ValueError("expected levels in (0, 1]")
    low = np.zeros(level.shape)
    high = freedom + noncentral + 10.0
    while (above := ncx2_sf(high, freedom, noncentral) > level).any():
        low, high = np.where(above, high, low), np.where(above, 2 * high, high)
    while np.any(high - low > 1e-12 * high):
        middle = (low + high) / 2
        if np.array_equal(middle, low) or np.array_equal(middle, high):
            break
        above = ncx2_sf(middle, freedom, noncentral) > level
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)


def f_sf(x: npt.ArrayLike, d1: npt.ArrayLike, d2: npt.ArrayLike) -> Floats:
    """P(F_{d1,d2} > x), elementwise, for degrees of freedom > 0, whole or not.

    It is the incomplete beta function I_z(d2/2, d1/2) at z = d2/(d2 + d1·x), by its continued fraction.

    Raises:
        ValueError: for degrees of freedom that are not positive, or a NaN.
    """
    arrays = (np.asarray(v, dtype=np.float64) for v in (x, d1, d2))
    values, first, second = np.broadcast_arrays(*arrays)
    if np.isnan(values).any() or not ((first > 0) & (second > 0)).all():
        raise ValueError("expected numbers, and degrees of freedom > 0")
    values = np.maximum(values, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        z = second / (second + first * values)
        # Where x is tiny, 1 - z would keep few of its digits.
        rest = np.where(np.isinf(first * values), 1.0, first * values / (second + first * values))
    return np.asarray(beta_inc(second / 2, first / 2, z, rest))


def beta_inc(a: Floats, b: Floats, z: Floats, rest: Floats) -> Floats:
    """The regularised incomplete beta function I_z(a, b), elementwise, for a, b > 0, z in [0, 1], `rest` = 1 - z."""
    a, b, z, rest = (np.asarray(v, dtype=np.float64) for v in np.broadcast_arrays(a, b, z, rest))
    swapped = z > (a + 1) / (a + b + 2)
    p, q, y = np.where(swapped, b, a), np.where(swapped, a, b), np.where(swapped, rest, z)
    inside = (y > 0) & (y < 1)
    safe = np.where(inside, y, 0.5)
    logs = p * np.log(safe) + q * np.log1p(-safe) - _log_betas(p, q)
    tail = np.where(inside, np.exp(logs) * _beta_fraction(p, q, safe) / p, np.where(y <= 0, 0.0, 1.0))
    return np.asarray(np.clip(np.where(swapped, 1 - tail, tail), 0.0, 1.0))


def binom_sf(x: int, n: int, p: float) -> float:
    """P(X > x) of a binomial count of `n` trials with chance `p` in [0, 1]."""
    if p <= 0 or p >= 1:
        return float(p >= 1 and x < n)

    def log_pmf(k: int) -> float:
        return _log_choose(n, k) + k * math.log(p) + (n - k) * math.log1p(-p)

    return _count_sf(x, (0, n), n * p, log_pmf, lambda k: (n - k) * p / ((k + 1) * (1 - p)))


def beta_binomial_sf(x: int, n: int, a: float, b: float) -> float:
    """P(X > x) of a binomial count of `n` trials whose chance is Beta(`a`, `b`), with `a` > 0 and `b` ≥ 1.

    With a = r + ½ and b = N − r + ½ it is the predictive tail of a count after r were seen in N reference rows.

    Raises:
        ValueError: for parameters outside these bounds.
    """
    if not (a > 0 and b >= 1):
        raise ValueError("expected a > 0 and b >= 1")

    def log_pmf(k: int) -> float:
        return _log_choose(n, k) + _log_beta(a + k, b + n - k) - _log_beta(a, b)

    return _count_sf(
        x, (0, n), n * a / (a + b), log_pmf, lambda k: (n - k) * (a + k) / ((k + 1) * (b + n - k - 1)) if k < n else 0.0
    )


def hypergeom_sf(x: int, population: int, marked: int, drawn: int) -> float:
    """P(X > x) of the number of marked items among `drawn` of a `population` that holds `marked` of them."""
    low, high = max(0, drawn + marked - population), min(drawn, marked)

    def log_pmf(k: int) -> float:
        return _log_choose(marked, k) + _log_choose(population - marked, drawn - k) - _log_choose(population, drawn)

    def ratio(k: int) -> float:
        return (marked - k) * (drawn - k) / ((k + 1) * (population - marked - drawn + k + 1))

    return _count_sf(x, (low, high), drawn * marked / max(population, 1), log_pmf, ratio)


def fisher_greater(events_a: int, trials_a: int, events_b: int, trials_b: int) -> float:
    """Fisher's exact one-sided p: how often group a would show at least `events_a` if both had the same rate."""
    return hypergeom_sf(events_a - 1, trials_a + trials_b, events_a + events_b, trials_a)


def _check(x: Floats, df: Floats) -> None:
    if np.isnan(x).any():
        raise ValueError("expected numbers, found NaN")
    if not ((df >= 1) & (df == np.floor(df))).all():
        raise ValueError("expected degrees of freedom that are integers ≥ 1")


def _chi2_flat(x: Floats, df: Floats) -> Floats:
    """Even df: e^-y Σ y^k/k!; odd df: erfc(√y) + e^-y Σ y^(k+½)/Γ(k+3/2), with y = x/2."""
    if not len(x):
        return np.zeros(0)
    y = x / 2
    odd = df % 2
    terms = (df - odd) / 2
    k = np.arange(max(int(terms.max()), 1))
    index = 2 * k[None, :] + odd.astype(np.int64)[:, None]  # twice the power of y
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.where(index == 0, 0.0, (index / 2) * np.log(y)[:, None])
    logs = power - y[:, None] - _half_lgamma(int(index.max()) + 2)[index + 2]
    total = np.where(k[None, :] < terms[:, None], np.exp(logs), 0.0).sum(axis=1)
    tail = np.array([math.erfc(math.sqrt(v)) if o else 0.0 for v, o in zip(y.tolist(), odd.tolist(), strict=True)])
    return np.asarray(np.minimum(total + tail, 1.0))


def _window(x: Floats, df: Floats, nc: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and last index of the mixture's terms that matter, element by element."""
    a, y, mu = df / 2, x / 2, nc / 2
    upper = y > a + mu
    peak = np.where(upper, (np.sqrt(a * a + 4 * mu * y) - a) / 2, mu)
    half = 8 * np.sqrt(peak + 1) + 12
    # Q(df/2 + j, y) is itself a running sum, of Poisson(y) terms: it must begin where those are nothing yet.
    first = np.minimum(np.maximum(peak - half, 0), y) - 8 * np.sqrt(y + 1) - 25
    return np.maximum(np.floor(first), 0).astype(np.int64), np.ceil(peak + half).astype(np.int64)


def _parts(x: Floats, df: Floats, nc: Floats, index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    if not len(index):
        return []
    first, last = _window(x[index], df[index], nc[index])
    rows = max(1, _SLICE // int((last - first).max() + 1))
    return [index[i : i + rows] for i in range(0, len(index), rows)]


def _mixture(x: Floats, df: Floats, nc: Floats) -> Floats:
    a, y, mu = df[:, None] / 2, x[:, None] / 2, nc[:, None] / 2
    first, last = _window(x, df, nc)
    k = first[:, None] + np.arange(int((last - first).max()) + 1)
    doubled = 2 * k
    table = _half_lgamma(int(doubled.max() + df.max()) + 2)
    steps = np.exp((a + k) * np.log(y) - y - table[doubled + df[:, None].astype(np.int64) + 2])
    base = np.where(first == 0, _chi2_flat(x, df), 0.0)
    tails = np.empty_like(steps)
    tails[:, 0] = base
    np.cumsum(steps[:, :-1], axis=1, out=tails[:, 1:])
    tails[:, 1:] += base[:, None]
    weights = np.exp(k * np.log(mu) - mu - table[doubled + 2])
    return np.asarray(np.minimum((weights * tails).sum(axis=1), 1.0))


def _half_lgamma(largest: int) -> Floats:
    """The logarithm of Γ(i/2) at index i, for i up to `largest` at least."""
    return _half_lgamma_table(1 << largest.bit_length())


@lru_cache(maxsize=32)
def _half_lgamma_table(size: int) -> Floats:
    z = np.arange(size, dtype=np.float64) / 2
    z[:32] = 16.0  # replaced below; the series needs large arguments
    inverse = 1 / z
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    table = (z - 0.5) * np.log(z) - z + 0.5 * math.log(2 * math.pi) + series
    table[:32] = [math.inf, *(math.lgamma(i / 2) for i in range(1, 32))][: len(table)]
    table.flags.writeable = False
    return table


def _log_betas(a: Floats, b: Floats) -> Floats:
    pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
    return np.array([_log_beta(x, y) for x, y in pairs]).reshape(a.shape)


def _beta_fraction(a: Floats, b: Floats, z: Floats) -> Floats:
    """Lentz's method for the continued fraction of the incomplete beta function (A&S 26.5.8)."""
    tiny = 1e-300
    c = np.ones(z.shape)
    d = 1 / _away_from_zero(1 - (a + b) * z / (a + 1), tiny)
    h = d.copy()
    for m in range(1, 400):
        even = m * (b - m) * z / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * z / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / _away_from_zero(1 + step * d, tiny)
            c = _away_from_zero(1 + step / c, tiny)
            delta = c * d
            h *= delta
        if np.all(np.abs(delta - 1) < 1e-13):
            break
    return h


def _away_from_zero(x: Floats, tiny: float) -> Floats:
    return np.where(np.abs(x) < tiny, tiny, x)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _count_sf(
    x: int,
    support: tuple[int, int],
    mean: float,
    log_pmf: Callable[[int], float],
    ratio: Callable[[int], float],
) -> float:
    """P(X > x) of a unimodal count by summing outwards from x; `ratio(k)` is pmf(k+1)/pmf(k)."""
    low, high = support
    if x < low:
        return 1.0
    if x >= high:
        return 0.0
    total, k = 0.0, x
    if x + 1 > mean:
        k, term = x + 1, math.exp(log_pmf(x + 1))
        while term > 1e-17 * total and k <= high:
            total += term
            term *= ratio(k)
            k += 1
        return min(total, 1.0)
    term = math.exp(log_pmf(x))
    while term > 1e-17 * total and k >= low:
        total += term
        k -= 1
        term = term / ratio(k) if k >= low else 0.0
    return max(0.0, 1.0 - total)
