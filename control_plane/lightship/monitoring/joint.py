"""Monitoring: features that go together otherwise than before, while each alone looks the same.

Rules of this room:
* pure; sums of products in, a verdict out;
* every pair's correlation is compared by Fisher's z, and the largest difference is judged as the largest of all pairs
  (Bonferroni). D² (a stream of the ladder) sees what changes a little everywhere; this sees what changes in one place;
* Fisher's variance is that of normal rows. The device clips to steps, which tames heavy tails; `inflation` is what the
  device's own healthy windows show beyond it;
* two features whose correlations with all others are each other's have been swapped, and are named;
* of a device, products come with every eighth window, and each such stretch is tested once, on a share of the budget of
  its own. Nothing is said in the first `SETTLED` stretches: from them and the following healthy ones is learnt how far
  this device's correlations vary, all together and at the worst pair, and that is the measure.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.moments import Moments, Products
from lightship_agent.contract.profile import MomentReference

from .calibration import CORRELATED
from .drift_settings import DriftSettings
from .tails import chi2_sf, f_sf, ncx2_isf

Floats = npt.NDArray[np.float64]

#: Swapping two columns must explain this share of the change before they are named.
_EXPLAINED: Final = 0.5


#: Stretches that are learnt before anything is said, and at most.
SETTLED: Final = 6
LEARNT: Final = 42


class JointShift(msgspec.Struct, frozen=True, kw_only=True):
    """How the correlations differ from the reference's."""

    pair: tuple[str, str]  # where the difference is largest
    before: float  # its correlation
    now: float
    z: float
    p_value: float  # of the largest of all pairs
    swapped: tuple[str, str] | None  # two columns whose exchange explains it


class Together(NamedTuple):
    """Products over a stretch of windows, and the moments of the same rows."""

    first: int
    last: int
    products: Products
    moments: Moments


class JointHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a device's stretches."""

    window: int = -1  # the last one judged
    stretches: int = 0  # learnt
    spread: float = 0.0  # sum of the mean z² of all pairs, 1 each by chance
    worst: float = 0.0  # sum of the largest z² of all pairs, over the median of that by chance
    crossed: bool = False  # the last one crossed its line

    @property
    def inflation(self) -> float:
        """How much more this device's correlations vary than chance has it, at least 1."""
        return max(1.0, max(self.spread, self.worst) / max(self.stretches, 1))


class JudgedTogether(NamedTuple):
    """What a stretch led to."""

    shift: JointShift | None  # None: nothing to compare
    alarm: bool
    confirmed: bool  # the stretch before crossed its line too
    history: JointHistory


def judge_together(
    stretch: Together,
    reference: MomentReference,
    names: tuple[str, ...],
    history: JointHistory,
    settings: DriftSettings,
) -> JudgedTogether:
    """Judge a stretch of a device against the training data, by how far its healthy stretches were from it.

    Raises:
        DataError: data.profile-mismatch.
    """
    seen = msgspec.structs.replace(history, window=stretch.last)
    known, rows = reference.products, stretch.products.rows
    fits = known is not None and rows == stretch.moments.rows and rows >= settings.min_rows
    if known is None or not fits:  # a window of the stretch was lost: its middle is not known
        return JudgedTogether(None, alarm=False, confirmed=False, history=seen)
    now, then = _centred(stretch.products, stretch.moments), _centred(known, reference.moments)
    shift = judge_products(now, rows, then, known.rows, names)
    if shift is None:
        return JudgedTogether(None, alarm=False, confirmed=False, history=seen)
    z2, pairs = _all_squares(now, rows, then, known.rows)
    line = settings.joint_alpha(stretch.last + 1 - stretch.first)
    p = _p_value(shift.z, pairs, rows, known.rows, history, settings.effect_floor)
    alarm = history.stretches >= SETTLED and p < line
    if not alarm and history.stretches < LEARNT:
        seen = msgspec.structs.replace(
            seen,
            stretches=history.stretches + 1,
            spread=history.spread + float(z2.mean()),
            worst=history.worst + float(z2.max()) / _typical(pairs),
        )
    seen = msgspec.structs.replace(seen, crossed=alarm)
    shift = msgspec.structs.replace(shift, p_value=p)
    return JudgedTogether(shift, alarm=alarm, confirmed=alarm and history.crossed, history=seen)


@lru_cache
def _typical(pairs: int) -> float:
    """The median by chance of the largest z² of so many pairs."""
    return float(ncx2_isf(-math.expm1(math.log(0.5) / pairs), 1, 0.0))


def _p_value(z: float, pairs: int, rows: int, reference_rows: int, history: JointHistory, floor: float) -> float:
    """Of the largest of all pairs, when none has moved by more than the floor."""
    tolerated = np.sqrt(floor / (1 / max(rows - 3, 1) + 1 / max(reference_rows - 3, 1)))
    phi = history.inflation
    beyond = max(abs(z) - float(tolerated), 0.0) ** 2 / phi
    tail = chi2_sf(beyond, 1) if phi < CORRELATED else f_sf(beyond, 1.0, float(max(history.stretches, 1)))
    return min(1.0, float(tail) * pairs)


def _centred(products: Products, moments: Moments) -> Floats:
    """About the middle of the rows: a mean that has shifted is no correlation."""
    total = np.asarray(moments.sums, dtype=np.float64)
    return np.asarray(products.matrix(len(total)) - np.outer(total, total) / max(products.rows, 1))


def _all_squares(now: Floats, rows: int, then: Floats, reference_rows: int) -> tuple[Floats, int]:
    """z² of every pair that is measured on both sides, and how many there are."""
    measured = np.flatnonzero((np.diag(now) > 0) & (np.diag(then) > 0))
    current, known = (_correlations(m[np.ix_(measured, measured)]) for m in (now, then))
    z2 = _differences(current, known, rows, reference_rows, 1.0)[np.triu_indices(len(measured), 1)] ** 2
    return np.asarray(z2), len(z2)


def judge_products(
    now: npt.ArrayLike,
    rows: int,
    reference: npt.ArrayLike,
    reference_rows: int,
    names: tuple[str, ...],
    inflation: float = 1.0,
) -> JointShift | None:
    """Compare second moments; None where there is nothing to compare.

    Args:
        now: Σ z·z' over `rows`, `[features, features]`.
        rows: how many rows.
        reference: the same over the reference's rows.
        reference_rows: how many.
        names: of the features.
        inflation: variance of the healthy differences over Fisher's, at least 1.
    """
    a, b = np.asarray(now, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    measured = np.flatnonzero((np.diag(a) > 0) & (np.diag(b) > 0))
    if len(measured) < 2 or min(rows, reference_rows) < 10:
        return None
    current, known = (_correlations(m[np.ix_(measured, measured)]) for m in (a, b))
    z = _differences(current, known, rows, reference_rows, inflation)
    upper = np.triu_indices(len(measured), 1)
    worst = int(np.argmax(np.abs(z[upper])))
    i, j = int(upper[0][worst]), int(upper[1][worst])
    p = min(1.0, float(chi2_sf(z[i, j] ** 2, 1)) * len(upper[0]))
    labels = [names[m] for m in measured]
    swapped = _swapped(current, known, z) if p < 0.01 else None
    return JointShift(
        pair=(labels[i], labels[j]),
        before=float(known[i, j]),
        now=float(current[i, j]),
        z=float(z[i, j]),
        p_value=p,
        swapped=(labels[swapped[0]], labels[swapped[1]]) if swapped else None,
    )


def inflation(healthy: list[tuple[npt.ArrayLike, int]], reference: npt.ArrayLike, reference_rows: int) -> float:
    """How much more healthy windows' correlations vary than Fisher says, over all pairs; at least 1."""
    squares: list[Floats] = []
    for products, rows in healthy:
        current, known = (
            _correlations(np.asarray(products, np.float64)),
            _correlations(np.asarray(reference, np.float64)),
        )
        z = _differences(current, known, rows, reference_rows, 1.0)
        squares.append(z[np.triu_indices(len(z), 1)] ** 2)
    return max(1.0, float(np.mean(squares))) if squares else 1.0


def _correlations(products: Floats) -> Floats:
    scale = np.sqrt(np.maximum(np.diag(products), 1e-9))
    return np.asarray(np.clip(products / np.outer(scale, scale), -0.9999, 0.9999))


def _differences(current: Floats, known: Floats, rows: int, reference_rows: int, inflation_: float) -> Floats:
    spread = np.sqrt(inflation_ * (1 / max(rows - 3, 1) + 1 / max(reference_rows - 3, 1)))
    return np.asarray((np.arctanh(current) - np.arctanh(known)) / spread)


def _swapped(current: Floats, known: Floats, z: Floats) -> tuple[int, int] | None:
    """The two columns whose exchange takes away most of the change, if it takes away enough."""
    size = len(z)
    unlike = ((current - known) ** 2).sum() / 2
    order = np.argsort(-(z**2).sum(axis=1))[: min(size, 12)]
    best, pair = unlike, None
    for n, i in enumerate(order):
        for j in order[n + 1 :]:
            turned = np.arange(size)
            turned[[i, j]] = j, i
            left = ((current[np.ix_(turned, turned)] - known) ** 2).sum() / 2
            if left < best:
                best, pair = left, (int(min(i, j)), int(max(i, j)))
    return pair if pair is not None and best < (1 - _EXPLAINED) * unlike else None
