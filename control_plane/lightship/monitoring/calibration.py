"""Monitoring: what a device's own healthy windows say about the test statistic.

Rules of this room:
* pure arrays in, arrays out;
* iid theory breaks on real streams: correlated rows make every statistic too large. So per stream and block length the
  mean and variance of T over the device's first windows replace those of χ²: T ≈ a·χ²_ν with a = var/2mean and
  ν = 2mean²/var, and an F tail with as many degrees of freedom as there were blocks pays for estimating them;
* a calibrated p-value is never below the uncalibrated one: calibration silences, it never alarms;
* the baseline is frozen when it is full, doesn't learn from a window in an alarm or a data-quality fault, and counts
  only if all its windows together are within the floor of the training data: a device that was drifting already
  when it was looked at first is not the measure of health.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .tails import f_sf, ncx2_sf
from .two_sample import TwoSample, two_sample

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Blocks of a length that are needed before its own moments are used; longer blocks take those of the length below.
MIN_BLOCKS: Final = 8
#: Windows that must have been seen before a shift of their stream can be told from its nature.
SETTLED: Final = 6
#: During the warm-up, how far above χ²'s a stream's median window is before rows are taken for correlated.
DISPERSED: Final = 1.5
#: Above this φ rows are correlated, or every window has an effect of its own: thin them, if you can.
CORRELATED: Final = 1.3
#: Standard errors by which blocks may differ from windows and still be taken for sums of independent ones,
_LUCK: Final = 2.5
#: and how many blocks' worth of windows counts beside each block then.
_LENT: Final = 3.0
#: Degrees of freedom from which the scale of a statistic counts as known within a tangent.
KNOWN: Final = 32
#: How unlikely a baseline within the floor must look before it is taken for one that isn't.
AWAY_ALPHA: Final = 1e-6


class Calibration(NamedTuple):
    """Moments per block length and stream; arrays `[levels, streams]` unless said otherwise."""

    mean: Floats
    freedom: Floats  # ν
    blocks: Floats  # degrees of freedom of the estimate
    settled: Bools  # [streams]: seen often enough for anything to be said
    used: Bools  # [streams]: there is something to calibrate with
    ready: Bools  # [streams]: and it is long enough, and healthy
    away: Bools  # [streams]: the baseline itself is not the training data
    phi: Floats  # [streams]: mean of T over its degrees of freedom; 1 for independent rows

    def p_value(self, level: int, statistic: Floats, noncentrality: Floats) -> Floats:
        """P(T > statistic) at a block length; the larger of two p-values counts.

        0 where a stream isn't calibrated: then the other one does. 1 where it has hardly been seen.
        """
        mean, freedom, blocks = self.mean[level], self.freedom[level], self.blocks[level]
        scale, two, three = mean / freedom, mean + 2 * noncentrality, mean + 3 * noncentrality
        # a·χ²_ν(λ/a) is nearly a multiple of a χ², moved: three moments agree (Pearson 1959). At λ = 0 it is one.
        moved = statistic + noncentrality**2 / three
        shape = two**3 / (scale * three**2)
        # What the blocks could not say is a. A tolerated shift is known, so less than all of T varies with a: the share
        # d ln Q / d ln a of its quantiles Q. That is a tangent, and good only where a is known fairly well.
        beyond = np.maximum(statistic - mean - noncentrality, 0.0)
        varies = mean + beyond * (mean + noncentrality) / two - mean * (noncentrality / three) ** 2
        share = np.where(blocks >= KNOWN, np.minimum(varies / np.maximum(moved, 1e-9), 1.0), 1.0)
        p = f_sf(moved * three / two**2, shape, blocks / np.maximum(share, 0.05) ** 2)
        return np.where(self.settled, np.where(self.used, p, 0.0), 1.0)

    def mixed(self, other: Calibration, chosen: Bools) -> Calibration:
        """This one, and of the chosen streams the other."""
        return Calibration(*(np.where(chosen, b, a) for a, b in zip(self, other, strict=True)))


def calibrate(
    moments: Floats,
    learnt: npt.NDArray[np.int64],
    seen: npt.NDArray[np.int64],
    typical: Floats,
    pooled: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    warm_up: int,
    floor: float,
) -> Calibration:
    """The calibration that a baseline amounts to.

    During the warm-up a stream whose median window is well above χ²'s is held to that instead: enough to be quiet about
    correlated rows, while a change in less than half of the windows doesn't move it.

    Args:
        moments: count, sum and sum of squares of T, float `[levels, streams, 3]`.
        learnt: windows learnt per stream, int `[streams]`.
        seen: windows ranked per stream, int `[streams]`.
        typical: the median T of a window so far, float `[streams]`.
        pooled: counts over all learnt windows, int `[streams, cells]`.
        reference: counts of the training data, the same shape.
        warm_up: windows needed.
        floor: the effect w0² within which the baseline must be.
    """
    count = moments[..., 0]
    safe = np.maximum(count, 1.0)
    mean = np.maximum(moments[..., 1] / safe, 1e-3)
    variance = np.maximum(moments[..., 2] / safe - mean**2, 0.0) * safe / np.maximum(safe - 1, 1.0)
    # Less spread than a χ² of this mean has is luck, or many ties: don't count on it.
    freedom = np.minimum(2 * mean**2 / np.maximum(variance, 1e-9), mean)
    mean, freedom, blocks = _filled(mean, np.maximum(freedom, 0.05), count)
    tests = two_sample(pooled, reference)
    mean, freedom, blocks = _shared(mean, freedom, blocks, tests, learnt)
    df = np.maximum(tests.df, 1.0)
    long = learnt >= warm_up
    ratio = np.maximum(typical / (df * (1 - 2 / (9 * df)) ** 3), 1.0)  # Wilson and Hilferty's median of χ²
    early = ~long & (learnt >= SETTLED) & (ratio >= DISPERSED)
    phi = np.where(long, mean[0] / df, np.where(early, ratio, 1.0))
    mean, freedom = np.where(early, ratio * df, mean), np.where(early, df / ratio, freedom)
    blocks = np.where(early, learnt, blocks)
    shrunk = np.maximum(phi, 1.0)
    beyond = ncx2_sf(tests.statistic / shrunk, df, tests.noncentrality(floor) / shrunk) < AWAY_ALPHA
    away = (long | early) & (tests.df > 0) & beyond
    return Calibration(
        mean=mean,
        freedom=freedom,
        # Were ν known, the mean of m blocks would have m·ν degrees of freedom; where rows look independent, half of
        # them pay for not knowing it. Where they don't, T's tail is longer than χ²'s: m/φ.
        blocks=np.maximum(np.where(phi < CORRELATED, np.maximum(blocks, blocks * freedom / 2), blocks / phi), 1.0),
        settled=seen >= SETTLED,
        used=(long | early) & ~away,
        ready=long & ~away,
        away=away & long,
        phi=phi,
    )


def _shared(
    mean: Floats, freedom: Floats, blocks: Floats, tests: TwoSample, learnt: npt.NDArray[np.int64]
) -> tuple[Floats, Floats, Floats]:
    """Where windows look independent of each other, what single windows say goes for blocks of them too.

    Then the mean of T is the same at every length; blocks show it by a mean that is not above that of windows by more
    than their own luck and that of the reference, of which the longest of them feel the most.
    """
    rows = tests.current / np.maximum(learnt, 1) * 2.0 ** np.arange(len(mean))[:, None]
    of_reference = (rows / np.maximum(rows + tests.reference, 1.0)) ** 2
    luck = np.sqrt(2 / np.maximum(mean[0], 1.0) * (of_reference + (1 - of_reference) / np.maximum(blocks, 1.0)))
    even = (mean <= mean[0] * (1 + _LUCK * luck)).all(axis=0) & (mean[0] < CORRELATED * np.maximum(tests.df, 1.0))
    lent = np.where(even, np.minimum(_LENT * blocks, blocks[0] - blocks), 0.0)
    share = lent / np.maximum(blocks + lent, 1.0)
    return (1 - share) * mean + share * mean[0], (1 - share) * freedom + share * freedom[0], blocks + lent


def _filled(mean: Floats, freedom: Floats, count: Floats) -> tuple[Floats, Floats, Floats]:
    """Lengths with too few blocks take the moments of the longest that has enough, and never a smaller mean."""
    mean, freedom, blocks = mean.copy(), freedom.copy(), count.copy()
    for j in range(1, len(mean)):
        few = count[j] < MIN_BLOCKS
        larger = np.where(count[j] >= 2, np.maximum(mean[j], mean[j - 1]), mean[j - 1])
        mean[j] = np.where(few, larger, mean[j])
        freedom[j] = np.where(few, freedom[j - 1], freedom[j])
        blocks[j] = np.where(few, blocks[j - 1], blocks[j])
    return mean, freedom, blocks
