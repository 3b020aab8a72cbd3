"""Monitoring: two samples of counts, are they alike, and how far are they apart?

Rules of this room:
* pure; counts in, numbers out;
* the test is T = min(X², G) with both samples' counts: conservative into the deep tail, rare cells included;
* the population stability index is debiased, carries its interval, and is for display: it never alarms.

Source of the design: `docs/concepts.md#drift`.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .tails import ncx2_sf

Floats = npt.NDArray[np.float64]

#: A statistic beyond this is so far out that the normal approximation of its interval is good to a few percent.
NORMAL_ABOVE: Final = 400.0
#: The interval of a displayed shift leaves this share out on each side.
INTERVAL_TAIL: Final = 0.025


class TwoSample(NamedTuple):
    """A test of two samples of counts: one value per leading index of what was compared."""

    statistic: Floats  # min(X², G)
    df: Floats  # cells that are not empty on both sides, less one; 0 where there is nothing to compare
    current: Floats  # rows
    reference: Floats  # rows

    def noncentrality(self, effect: float) -> Floats:
        """λ of a true effect w² = `effect` at these sample sizes: w²·nN/(n + N)."""
        return effect * _harmonic(self.current, self.reference)

    def p_value(self, floor: float = 0.0) -> Floats:
        """How likely so large a statistic is when the true effect is no larger than `floor`."""
        p: Floats = np.ones(np.shape(self.statistic))
        some = np.asarray(self.df > 0)
        p[some] = ncx2_sf(self.statistic[some], self.df[some], self.noncentrality(floor)[some])
        return p


def two_sample(current: npt.ArrayLike, reference: npt.ArrayLike) -> TwoSample:
    """Compare counts along the last axis; leading axes broadcast. int `[..., cells]` both.

    X² = Σ (√(N/n)·c − √(n/N)·r)²/(c + r) and G = 2Σ[c·ln(c(n+N)/(n(c+r))) + r·ln(r(n+N)/(N(c+r)))]. X² overstates
    rare cells and G middling ones; the smaller of the two is conservative for both, so no cells are pooled.
    """
    c, r = np.broadcast_arrays(np.asarray(current, dtype=np.float64), np.asarray(reference, dtype=np.float64))
    n, big = c.sum(axis=-1), r.sum(axis=-1)
    both = (n > 0) & (big > 0)
    share = np.where(both, n / np.where(both, n + big, 1.0), 0.5)[..., None]  # of the current sample
    total = c + r
    held = total > 0
    safe = np.where(held, total, 1.0)
    # (√(N/n)c − √(n/N)r)² = (c − s·(c+r))²/(s(1−s)) with s = n/(n+N): the same, without the roots.
    x2 = ((c - share * total) ** 2 / (share * (1 - share) * safe)).sum(axis=-1)
    g = 2 * (_xlog(c, c / (share * safe)) + _xlog(r, r / ((1 - share) * safe))).sum(axis=-1)
    df = np.where(both, np.maximum(held.sum(axis=-1) - 1, 0), 0).astype(np.float64)
    statistic = np.where(df > 0, np.maximum(np.minimum(x2, g), 0.0), 0.0)
    return TwoSample(statistic, df, n, big)


def psi_debiased(current: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The population stability index without its small-sample bias, and its 95 % interval; for display only.

    Args:
        current: counts, int `[..., cells]`.
        reference: counts, int `[..., cells]`.

    Returns:
        PSI less its expectation under no change, (K − 1)(1/n + 1/N), not below 0; lower end; upper end. Half a row
        is added to every cell, so that an empty one stays finite. PSI·nN/(n + N) is close to a noncentral χ².
    """
    statistic, df, scale = _psi_statistic(current, reference)
    low = _noncentrality_at(statistic, df, INTERVAL_TAIL) / scale
    high = _noncentrality_at(statistic, df, 1 - INTERVAL_TAIL) / scale
    psi = np.maximum(statistic - df, 0.0) / scale
    return psi, np.minimum(low, psi), np.maximum(high, psi)


def psi_exceeds(current: npt.ArrayLike, reference: npt.ArrayLike, floor: float) -> npt.NDArray[np.bool_]:
    """Whether the lower end of `psi_debiased` lies above `floor`, without computing it: one tail, no root finding."""
    statistic, df, scale = _psi_statistic(current, reference)
    return np.asarray(ncx2_sf(statistic, df, floor * scale) < INTERVAL_TAIL)


def _psi_statistic(current: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """PSI·nN/(n + N), its degrees of freedom, and nN/(n + N)."""
    c, r = np.broadcast_arrays(np.asarray(current, dtype=np.float64), np.asarray(reference, dtype=np.float64))
    test = two_sample(c, r)
    held = (c + r) > 0
    p = np.where(held, c + 0.5, 0.0)
    q = np.where(held, r + 0.5, 0.0)
    p, q = (v / np.maximum(v.sum(axis=-1, keepdims=True), 0.5) for v in (p, q))
    safe_p, safe_q = np.where(held, p, 1.0), np.where(held, q, 1.0)
    raw = ((p - q) * np.log(safe_p / safe_q)).sum(axis=-1)
    scale = np.maximum(_harmonic(test.current, test.reference), 1e-9)
    return np.where(test.df > 0, raw * scale, 0.0), np.maximum(test.df, 1.0), scale


def _harmonic(n: Floats, big: Floats) -> Floats:
    """nN/(n + N), 0 where both are 0."""
    return np.asarray(n * big / np.maximum(n + big, 1.0))


def _xlog(x: Floats, ratio: Floats) -> Floats:
    """x·ln(ratio), 0 where x is 0."""
    return x * np.log(np.where(x > 0, ratio, 1.0))


def _noncentrality_at(statistic: Floats, df: Floats, tail: float) -> Floats:
    """The λ with P(χ²_df(λ) > `statistic`) = `tail`, 0 where even λ = 0 gives more.

    By bisection where the statistic is small. Where it is large, χ²_df(λ) is nearly normal with mean df + λ and
    variance 2(df + 2λ), and the equation is a quadratic one: an exact interval around a shift that nobody can miss
    would cost a second, and tell nothing.
    """
    s, freedom = np.broadcast_arrays(np.atleast_1d(statistic), np.atleast_1d(df))
    z = NormalDist().inv_cdf(1 - tail)
    root = np.sqrt(np.maximum(2 * z * z + 2 * s - freedom, 0.0)) - z * math.sqrt(2)
    found = np.maximum((root * root - freedom) / 2, 0.0)
    exact = s <= NORMAL_ABOVE
    if exact.any():
        found[exact] = _bisected(s[exact], freedom[exact], tail)
    return np.asarray(found.reshape(np.shape(statistic)))


def _bisected(s: Floats, freedom: Floats, tail: float) -> Floats:
    spread = 6 * np.sqrt(2 * (freedom + 2 * s)) + 20
    low, high = np.maximum(s - freedom - spread, 0.0), s + spread
    for _ in range(24):
        middle = (low + high) / 2
        less = ncx2_sf(s, freedom, middle) < tail
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return np.asarray(low)
