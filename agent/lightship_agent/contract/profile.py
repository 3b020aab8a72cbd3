"""Contract: the reference profile, and window counts that merge by addition and nothing else.

Rules:
* bins are fixed when the profile is made, from reference quantiles, and never depend on later data;
* the same comparison (`>=` on float32) bins the training data and the device's rows, so a value can't fall
  into different bins on the two sides;
* per feature the layout is [under, bin 0 … bin m, over, missing]; ties are merged, so m ≤ 19;
* counts are integers and merge is `+`: associative, commutative, bit-exact.

Source of the design: reference-quantile bins with two-sample tests on counts, `docs/concepts.md#drift`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import DataError

MAX_BINS: Final = 20  # per feature, before ties are merged
SCORE_BINS: Final = 21  # of the top class's score, per predicted class
#: under, over, missing
EXTRA_CELLS: Final = 3


class FeatureBins(msgspec.Struct, frozen=True, kw_only=True):
    """Cut points of one feature: bin i holds edges[i-1] <= x < edges[i], within [low, high]."""

    name: str
    low: float
    high: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Cut points ascend and the counts fit them.

        Raises:
            DataError: data.profile-mismatch.
        """
        cuts = (self.low, *self.edges, self.high)
        ordered = all(a < b for a, b in itertools.pairwise(cuts[:-1])) and cuts[-2] <= cuts[-1]
        if not ordered or len(self.edges) >= MAX_BINS or len(self.counts) != self.cells:
            raise DataError("data.profile-mismatch", f"Feature {self.name!r}: edges or counts are inconsistent.")
        if min(self.counts) < 0:
            raise DataError("data.profile-mismatch", f"Feature {self.name!r}: negative count.")

    @property
    def cells(self) -> int:
        """The number of counts of this feature."""
        return len(self.edges) + 1 + EXTRA_CELLS


class ReferenceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What the model saw and said on reference data."""

    rows: int
    features: tuple[FeatureBins, ...]
    labels: tuple[str, ...] = ()
    predictions: tuple[int, ...] = ()  # per class
    scores: tuple[int, ...] = ()  # [classes × SCORE_BINS], flat
    labelled: int = 0  # held-out rows the error rate was measured on
    errors: int = 0
    version: int = 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each feature's counts begin in a flat count vector; one more than features, the last is the end."""
        ends = np.cumsum([0, *(f.cells for f in self.features)])
        return tuple(int(e) for e in ends)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """All features' counts, flat."""
        return np.concatenate([np.asarray(f.counts, dtype=np.int64) for f in self.features])


class WindowCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts over some rows: of one device's window, or of many merged."""

    rows: int
    counts: tuple[int, ...]
    predictions: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    labelled: int = 0
    errors: int = 0

    def __add__(self, other: WindowCounts) -> WindowCounts:
        """Merge: addition, cell by cell.

        Raises:
            DataError: data.profile-mismatch when the layouts differ.
        """
        return WindowCounts(
            rows=self.rows + other.rows,
            counts=_add(self.counts, other.counts),
            predictions=_add(self.predictions, other.predictions),
            scores=_add(self.scores, other.scores),
            labelled=self.labelled + other.labelled,
            errors=self.errors + other.errors,
        )


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if len(a) != len(b):
        raise DataError("data.profile-mismatch", f"Can't merge {len(a)} counts with {len(b)}.")
    return tuple(x + y for x, y in zip(a, b, strict=True))


def empty_counts(profile: ReferenceProfile) -> WindowCounts:
    """The neutral element of merge for this profile."""
    return WindowCounts(
        rows=0,
        counts=(0,) * profile.offsets[-1],
        predictions=(0,) * len(profile.predictions),
        scores=(0,) * len(profile.scores),
    )


class Binner:
    """Counts float32 rows into the cells of a set of feature bins.

    The loop runs over the (at most 19) edges on the whole block, with one flat bincount at the end; that was
    measured faster than a searchsorted per feature, and it is exact.
    """

    def __init__(self, features: Sequence[FeatureBins | Cuts]) -> None:
        """Lay the cut points out as matrices padded with +inf."""
        self.width = len(features)
        depth = max(len(f.edges) for f in features)
        self._edges = np.full((depth, self.width), np.inf, dtype=np.float32)
        for j, f in enumerate(features):
            self._edges[: len(f.edges), j] = f.edges
        self._low = np.array([f.low for f in features], dtype=np.float32)
        self._high = np.array([f.high for f in features], dtype=np.float32)
        cells = np.array([len(f.edges) + 1 + EXTRA_CELLS for f in features])
        self._over = (cells - 2).astype(np.uint8)
        self._missing = (cells - 1).astype(np.uint8)
        self._start = np.concatenate([[0], np.cumsum(cells)[:-1]]).astype(np.int64)
        self.cells = int(cells.sum())

    def count(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Counts of `rows` (float32 `[n, width]`), flat int64 `[cells]`."""
        if not len(rows):
            return np.zeros(self.cells, dtype=np.int64)
        cell = np.ones(rows.shape, dtype=np.uint8)
        for edge in self._edges:
            cell += rows >= edge
        cell[rows < self._low] = 0
        over = rows > self._high
        if over.any():
            cell[over] = np.broadcast_to(self._over, rows.shape)[over]
        missing = np.isnan(rows)
        if missing.any():
            cell[missing] = np.broadcast_to(self._missing, rows.shape)[missing]
        # +inf pads compare equal to an infinite row; `over` has already taken those cells.
        return np.bincount((cell + self._start).ravel(), minlength=self.cells)


class Cuts(msgspec.Struct, frozen=True):
    """Cut points before anything was counted."""

    low: float
    high: float
    edges: tuple[float, ...]


def cut_points(column: npt.NDArray[np.float32], bins: int = MAX_BINS) -> Cuts:
    """Reference-quantile cut points of a float32 column; ties merged, NaN ignored.

    Raises:
        DataError: data.empty when no finite value is there.
    """
    values = np.asarray(column, dtype=np.float32)
    values = values[np.isfinite(values)]
    if not len(values):
        raise DataError("data.empty", "A column without any value can't be profiled.")
    levels = np.arange(1, bins) / bins
    # inverted_cdf returns values of the sample itself: exact in float32 on both sides.
    cuts = np.unique(np.quantile(values, levels, method="inverted_cdf").astype(np.float32))
    low, high = float(values.min()), float(values.max())
    return Cuts(low, high, tuple(float(c) for c in cuts if c > low))


def profile_features(rows: npt.NDArray[np.float32], names: Sequence[str]) -> tuple[FeatureBins, ...]:
    """Bins and counts of every column of `rows` (float32 `[n, features]`).

    Raises:
        DataError: data.empty.
    """
    cuts = [cut_points(rows[:, j]) for j in range(rows.shape[1])]
    counts = Binner(cuts).count(rows)
    out, at = [], 0
    for name, c in zip(names, cuts, strict=True):
        end = at + len(c.edges) + 1 + EXTRA_CELLS
        cell_counts = tuple(int(v) for v in counts[at:end])
        out.append(FeatureBins(name=name, low=c.low, high=c.high, edges=c.edges, counts=cell_counts))
        at = end
    return tuple(out)


def count_outputs(
    labels: npt.NDArray[np.int64], scores: npt.NDArray[np.float32] | None, classes: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts per predicted class `[classes]`, and of the top score per predicted class `[classes × SCORE_BINS]`.

    Args:
        labels: predicted class indices, int64 `[n]`.
        scores: per-class scores, float32 `[n, classes]`, or None where the model gives no probabilities.
        classes: the number of classes.
    """
    predictions = np.bincount(labels, minlength=classes)
    if scores is None or not len(labels):
        return predictions, np.zeros(classes * SCORE_BINS, dtype=np.int64)
    top = scores.max(axis=1)
    cell = np.clip((top * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1)
    return predictions, np.bincount(labels * SCORE_BINS + cell, minlength=classes * SCORE_BINS)
