"""Monitor: hard faults of data, which need no history, no statistics of a fleet and no network to be told.

Rules:
* pure: a profile and one closed window in, findings out; `FaultBook` alone remembers, and only what stands;
* a finding is so unlikely by the reference that a device has less than one false one in ten years of hourly windows;
* one event is one fault: said when it begins, and once more when windows have been clean for a while;
* what drifts is not a fault. Drift is the control plane's question.

What is looked for:
* stuck: all values of the window are one, of a feature that had at least ten bins in training, and never half as long
  a run of one value;
* unit: nine in ten values are beyond what training saw, by half an order of magnitude or more, of a feature that was
  on one side of zero;
* swapped: two features are mostly beyond their own ranges, and each within the other's;
* missing, range, category: a rate above the reference's by more than `TOLERATED`, by exact beta-binomial tails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.profile import FeatureBins, ReferenceProfile, WindowCounts

from .tails import beta_binomial_tail
from .tally import Extremes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

#: What a device is degraded by, per kind.
FAULT_CODES: Final = {
    "stuck": "data.stuck",
    "unit": "data.unit",
    "swapped": "data.swapped",
    "missing": "data.gone",
    "range": "data.beyond",
    "category": "data.new-category",
}
MIN_ROWS: Final = 50  # a shorter window is no evidence
#: Rise of a rate that is drift, if anything, and no fault.
TOLERATED: Final = {"missing": 0.05, "category": 0.05, "range": 0.2}
FALSE_ALARMS: Final = 0.1  # per device and year of hourly windows, over all features and kinds
WINDOWS: Final = 8_760
CLEAN_WINDOWS: Final = 2  # in a row, until a fault is over
_CONTINUOUS: Final = 10  # bins
_NEARLY_ALL: Final = 0.9
_MOSTLY: Final = 0.5
_FACTOR: Final = 0.5 * math.log2(10)  # half an order of magnitude
_MARGIN: Final = 0.1  # of a range, for what is to be within another feature's


class Found(msgspec.Struct, frozen=True, order=True):
    """A fault of one feature in one window."""

    kind: str
    feature: int
    rate: float  # share of the window's rows


class Change(msgspec.Struct, frozen=True):
    """A fault that has begun or is over."""

    kind: str
    feature: int
    raised: bool
    rate: float


class FaultFinder:
    """Finds the hard faults of closed windows of one stream."""

    def __init__(self, profile: ReferenceProfile) -> None:
        """Lay out what most windows are cleared by, all features at a time."""
        self._profile = profile
        self._offsets = profile.offsets
        starts, ends = np.array(self._offsets[:-1]), np.array(self._offsets[1:])
        self._under, self._over, self._missing = starts, ends - 2, ends - 1
        reference = profile.counts
        missing, outside, rows = self._shares(reference, np.add.reduceat(reference, starts))
        is_category = np.array([bool(f.categories) for f in profile.features])
        tolerated = np.where(is_category, TOLERATED["category"], TOLERATED["range"])
        self._most_missing = np.where(rows > 0, missing + TOLERATED["missing"], np.inf)
        self._most_outside = np.where(rows > 0, outside + tolerated, np.inf)
        self._numeric = ~is_category
        self._alpha = FALSE_ALARMS / (WINDOWS * 3 * len(profile.features))

    def find(self, window: WindowCounts, extremes: Extremes) -> list[Found]:
        """The hard faults of a closed window, by kind and feature."""
        if window.rows < MIN_ROWS:
            return []
        counts = np.asarray(window.counts, dtype=np.int64)
        missing, outside, _ = self._shares(counts, np.full(len(self._under), window.rows))
        mostly = np.flatnonzero(self._numeric & (outside > _MOSTLY))
        swapped = _swapped(self._profile.features, mostly.tolist(), extremes)
        found = [Found("swapped", j, 1.0) for j in swapped]
        suspects = (missing > self._most_missing) | (outside > self._most_outside)
        suspects |= self._numeric & (extremes.lowest == extremes.highest)
        for j in np.flatnonzero(suspects).tolist():
            found += self._look_at(j, window, extremes)
        return sorted(found)

    def _shares(self, counts: Ints, rows: Ints) -> tuple[Floats, Floats, Ints]:
        """Per feature: missing of all rows, beyond the range of those that are present, and rows."""
        missing, outside = counts[self._missing], counts[self._under] + counts[self._over]
        return missing / np.maximum(rows, 1), outside / np.maximum(rows - missing, 1), rows

    def _look_at(self, j: int, window: WindowCounts, extremes: Extremes) -> Iterator[Found]:
        feature = self._profile.features[j]
        cells = window.counts[self._offsets[j] : self._offsets[j + 1]]
        for kind, rate in _rates(feature, cells, window.rows, self._alpha):
            yield Found(kind, j, rate)
        present, outside = window.rows - cells[-1], cells[0] + cells[-2]
        if present < MIN_ROWS or feature.categories:
            return
        if _is_stuck(self._profile, j, present, extremes):
            yield Found("stuck", j, present / window.rows)
        elif outside >= _NEARLY_ALL * present and _is_other_unit(feature, float(extremes.magnitude[j])):
            yield Found("unit", j, outside / window.rows)


class FaultBook:
    """Which faults of one stream stand."""

    def __init__(self) -> None:
        self._clean: dict[tuple[str, int], int] = {}  # clean windows since each was last found

    @property
    def standing(self) -> list[tuple[str, int]]:
        """Kind and feature of each, in order."""
        return sorted(self._clean)

    def note(self, found: Sequence[Found], *, telling: bool) -> list[Change]:
        """What begins and what is over with a window's findings.

        Args:
            found: in the window.
            telling: whether the window had rows enough to show a fault, and so to show that there is none.
        """
        rates = {(f.kind, f.feature): f.rate for f in found}
        changes = [Change(*key, raised=True, rate=rate) for key, rate in rates.items() if key not in self._clean]
        for key in self._clean:
            self._clean[key] += telling
        self._clean.update(dict.fromkeys(rates, 0))
        over = [key for key, clean in self._clean.items() if clean >= CLEAN_WINDOWS]
        for key in over:
            del self._clean[key]
        return changes + [Change(*key, raised=False, rate=0.0) for key in over]


def _rates(feature: FeatureBins, cells: Sequence[int], rows: int, alpha: float) -> Iterator[tuple[str, float]]:
    big = sum(feature.counts)
    counts = [("missing", cells[-1], feature.counts[-1], rows, big)]
    outside, was = cells[0] + cells[-2], feature.counts[0] + feature.counts[-2]
    present, present_then = rows - cells[-1], big - feature.counts[-1]
    counts.append(("category" if feature.categories else "range", outside, was, present, present_then))
    for kind, count, known, n, then in counts:
        tolerated = TOLERATED[kind]
        if not n or not then or count / n <= known / then + tolerated:
            continue
        # Beyond the extremes of N rows lies a share of 2/(N + 1) on the average, and never nothing.
        a = known + (2.0 if kind == "range" else 0.5) + tolerated * then
        if beta_binomial_tail(count, n, a, max(then - known - tolerated * then, 1.0)) < alpha:
            yield kind, count / rows


def _is_stuck(profile: ReferenceProfile, j: int, present: int, extremes: Extremes) -> bool:
    feature = profile.features[j]
    if extremes.lowest[j] != extremes.highest[j] or len(feature.edges) + 1 < _CONTINUOUS:
        return False
    runs = profile.moments.runs if profile.moments is not None else ()
    return present > 2 * (runs[j] if runs else 1)


def _is_other_unit(feature: FeatureBins, magnitude: float) -> bool:
    if len(feature.edges) < 2 or not feature.edges[0] * feature.edges[-1] > 0:
        return False
    middle = abs(feature.edges[len(feature.edges) // 2])
    return abs(magnitude - math.log2(middle)) >= _FACTOR


def _swapped(features: Sequence[FeatureBins], beyond: Sequence[int], extremes: Extremes) -> set[int]:
    """Of the features mostly `beyond` their ranges, those that fit in each other's."""

    def fits(i: int, j: int) -> bool:
        margin = _MARGIN * (features[j].high - features[j].low)
        return bool(
            extremes.lowest[i] >= features[j].low - margin and extremes.highest[i] <= features[j].high + margin
        )  # fmt: skip

    pairs = itertools.combinations(beyond[:32], 2)  # a whole row of other things is no swap
    return {k for i, j in pairs if fits(i, j) and fits(j, i) for k in (i, j)}
