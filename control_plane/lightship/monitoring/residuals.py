"""Monitoring: is a regressor off otherwise than it was on held-out rows?

Rules of this room:
* pure; residuals (truth less prediction) per window in, evidence out; like errors they are judged anew from all windows
  each time, in whatever order their labels came;
* three rates whose values on held-out rows the bundle knows: residuals above the upper quartile (up), below the lower
  one (down), and in the outer twentieths (wider). Each is watched by `rate`, and with the errors they share labels'
  budget. Residuals that have become narrower are no loss, and alarm nobody;
* what is tolerated is a bias, and a growth of the spread, of `residual_floor`; how many rows that moves is read off the
  held-out residuals themselves, which need not be normal. It is three standard errors of the share at least: there are
  three shares, and each is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.moments import STEPS
from lightship_agent.contract.profile import ReferenceProfile, ResidualReference

from .drift_settings import DriftSettings
from .performance import Labelled, merged
from .rate import Rate, Trial, watch_rate
from .verdict import ResidualShift, ResidualSide

#: Shares of the held-out rows on a side: wanted, and what may come of it where residuals are tied.
_QUARTER: Final = (0.25, 0.05, 0.45)
_OUTER: Final = (0.05, 0.01, 0.15)

Floats = npt.NDArray[np.float64]


class Side(NamedTuple):
    """A rate that may not rise."""

    name: ResidualSide
    cells: npt.NDArray[np.bool_]  # of the profile, without the one of what is missing
    known: float
    tolerated: float


def judge_residuals(
    labels: Iterable[Labelled], profile: ReferenceProfile, settings: DriftSettings
) -> tuple[ResidualShift, ...]:
    """Judge the residuals that labels have told of so far, the most evident first.

    Args:
        labels: per window; several entries of one window add up, their order doesn't matter.
        profile: of the bundle; of one that knows no residuals, nothing is said.
        settings: floor and budget.
    """
    reference = profile.residuals
    if reference is None:
        return ()
    fitting = [w for w in merged(labels) if len(w.residuals) == reference.bins.cells]
    told = [w for w in fitting if sum(w.residuals[:-1]) > 0]
    watched = sides(reference, settings)
    if not told:
        return ()
    line = settings.performance_line(len(watched) + 1)
    cells = np.array([w.residuals[:-1] for w in told], dtype=np.int64)
    return tuple(sorted((_shift(side, told, cells, reference, line) for side in watched), key=lambda s: -s.evidence))


def label_streams(profile: ReferenceProfile, settings: DriftSettings) -> int:
    """Streams of labels that share the budget: the errors, and what is watched of residuals."""
    return 1 + (len(sides(profile.residuals, settings)) if profile.residuals is not None else 0)


def _shift(
    side: Side, told: Sequence[Labelled], cells: npt.NDArray[np.int64], reference: ResidualReference, line: float
) -> ResidualShift:
    rows, hits = cells.sum(axis=1).tolist(), cells[:, side.cells].sum(axis=1).tolist()
    trials = [Trial(w.window, n, k) for w, n, k in zip(told, rows, hits, strict=True)]
    found: Rate = watch_rate(trials, side.tolerated, line)
    bias, spread = _moments([w for w in told if w.window >= found.since], reference)
    return ResidualShift(
        side=side.name,
        labelled=found.rows,
        share=found.hits / found.rows,
        expected=side.known,
        tolerated=side.tolerated,
        bias=bias,
        spread=spread,
        since=found.since,
        evidence=found.evidence,
        phi=found.phi,
        alarm=found.evidence >= 1,
    )


def _moments(told: Sequence[Labelled], reference: ResidualReference) -> tuple[float | None, float | None]:
    """Bias in standard deviations of the held-out residuals, and the spread in multiples of it."""
    known = [w for w in told if len(w.sums) == 2]
    rows = sum(sum(w.residuals[:-1]) for w in known)
    if not rows:
        return None, None
    mean, square = (sum(w.sums[i] for w in known) / rows for i in (0, 1))
    # Of the held-out rows only cells are known: their mean is about that of the middles.
    cuts, cumulative = _distribution(reference)
    middles = (cuts[1:] + cuts[:-1]) / 2
    before = float(np.diff(cumulative) @ middles) / reference.scale
    return mean / STEPS - before, math.sqrt(max(square - mean**2, 0.0)) / STEPS


def _distribution(reference: ResidualReference) -> tuple[Floats, Floats]:
    """Cut points, and the share of the held-out rows below each."""
    bins = reference.bins
    counts = np.array(bins.counts[1:-2], dtype=np.float64)  # nothing of its own sample is beyond its extremes
    cuts = np.array([bins.low, *bins.edges, bins.high])
    return cuts, np.concatenate([[0.0], np.cumsum(counts)]) / max(counts.sum(), 1.0)


def sides(reference: ResidualReference, settings: DriftSettings) -> list[Side]:
    """What can be watched: where too many residuals are alike, there may be no cut near a quarter."""
    cuts, below = _distribution(reference)
    rows = sum(reference.bins.counts[1:-2])
    if not rows:
        return []
    above = 1 - below
    floor, scale = settings.residual_floor, reference.scale
    cell = np.arange(reference.bins.cells - 1)  # cut i is between the cells i and i + 1

    def share_below(value: float) -> float:
        return float(np.interp(value, cuts, below))

    middle = float(np.interp(0.5, below, cuts))
    found: list[Side] = []
    up, down = _cut(above, *_QUARTER), _cut(below, *_QUARTER)
    if up is not None:
        tolerated = 1 - share_below(cuts[up] - floor * scale)
        found.append(_side("up", cell > up, float(above[up]), tolerated, rows))
    if down is not None:
        tolerated = share_below(cuts[down] + floor * scale)
        found.append(_side("down", cell <= down, float(below[down]), tolerated, rows))
    high, low = _cut(above, *_OUTER), _cut(below, *_OUTER)
    if high is not None and low is not None:
        ends = (middle + (cuts[i] - middle) / (1 + floor) for i in (low, high))
        inner = np.diff([share_below(end) for end in ends])[0]
        known = float(below[low] + above[high])
        found.append(_side("wider", (cell <= low) | (cell > high), known, 1 - float(inner), rows))
    return found


def _cut(shares: Floats, wanted: float, least: float, most: float) -> int | None:
    """The cut whose share is nearest to what is wanted, if that is near enough."""
    nearest = int(np.argmin(np.abs(shares - wanted)))
    return nearest if least <= shares[nearest] <= most else None


def _side(name: ResidualSide, cells: npt.NDArray[np.bool_], known: float, tolerated: float, rows: int) -> Side:
    error = math.sqrt(known * (1 - known) / rows)
    return Side(name, cells, known, min(max(tolerated, known + 3 * error), 0.99))
