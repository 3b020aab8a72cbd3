"""Contract: the reference profile, and window counts that merge by addition and nothing else.

Rules:
* bins are fixed when the profile is made, from reference quantiles, and never depend on later data;
* the same comparison (`>=` on float32) bins the training data and the device's rows, so a value can't fall
  into different bins on the two sides;
* per feature the layout is [under, bin 0 … bin m, over, missing]; ties are merged, so m ≤ 19;
* of a categorical feature, bin i is category i (its code in the tensor), and `over` is "a new one";
* counts are integers and merge is `+`: associative, commutative, bit-exact;
* what an older profile or window does not have is absent, and absent is the neutral element of merge.

Source of the design: reference-quantile bins with two-sample tests on counts, `docs/concepts.md#drift`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from .categories import MAX_CATEGORIES
from .codes import DataError
from .moments import MAX_JOINT, Moments, Products, Scales, merge_moments
from .projection import Projection
from .quality import Quality, merge_quality
from .vectors import Vector, add, total

MAX_BINS: Final = 20  # per feature, before ties are merged
SCORE_BINS: Final = 21  # of the top class's score, per predicted class
#: under, over, missing
EXTRA_CELLS: Final = 3


class FeatureBins(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Cut points of one feature: bin i holds edges[i-1] <= x < edges[i], within [low, high].

    With `categories`, the edges are 1, 2, … and bin i holds the code i of categories[i]: bins that have no order, and
    are not to be merged with their neighbours.
    """

    name: str
    low: float
    high: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Cut points ascend and the counts fit them.

        Raises:
            DataError: data.profile-mismatch.
        """
        cuts = (self.low, *self.edges, self.high)
        ordered = all(a < b for a, b in itertools.pairwise(cuts[:-1])) and cuts[-2] <= cuts[-1]
        if self.categories:
            ordered = cuts == category_cuts(self.categories)
        most = MAX_CATEGORIES + 1 if self.categories else MAX_BINS
        if not ordered or len(self.edges) >= most or len(self.counts) != self.cells:
            raise DataError("data.profile-mismatch", f"Feature {self.name!r}: edges or counts are inconsistent.")
        if min(self.counts) < 0:
            raise DataError("data.profile-mismatch", f"Feature {self.name!r}: negative count.")

    @property
    def cells(self) -> int:
        """The number of counts of this feature."""
        return len(self.edges) + 1 + EXTRA_CELLS


class MomentReference(msgspec.Struct, frozen=True, kw_only=True):
    """How the reference features moved together: what a window's moments, products and distances are compared with.

    `inverse` and `distance` are absent where the model is wider than `MAX_JOINT`; `distance` was counted by inverse
    covariances that the rows had no part in, since by their own all rows are too near. The moments' `lags` speak
    of the order of the training rows: of a dataset that was shuffled they say nothing.
    """

    scales: Scales
    moments: Moments
    runs: tuple[int, ...] = ()  # per feature, the longest run of one value, in the order of the training rows
    products: Products | None = None
    inverse: bytes = b""  # of the covariance of z; float32 little-endian, upper triangle
    distance: FeatureBins | None = None  # D², named "distance"

    def __post_init__(self) -> None:
        """All parts are of one width.

        Raises:
            DataError: data.profile-mismatch.
        """
        width = self.scales.width
        triangle = width * (width + 1) // 2
        parts = [len(self.moments.sums), len(self.moments.squares), len(self.moments.lags)]
        joint = self.products is not None
        fits = not joint or (width <= MAX_JOINT and len(self.inverse) == 4 * triangle and self.distance is not None)
        if (
            parts != [width] * 3
            or len(self.runs) not in (0, width)
            or not fits
            or (self.products is not None and len(self.products.sums) != triangle)
        ):
            raise DataError("data.profile-mismatch", "The profile's moments are not of one width.")


class ResidualReference(msgspec.Struct, frozen=True, kw_only=True):
    """How far a regressor was from the truth (truth - prediction) on held-out rows.

    A label counts as an error when the residual is beyond ±`bound`, which on held-out rows it was in the share
    `errors / labelled` of the profile. Its steps are residual / `scale` in the `moments` module's sense.
    """

    bins: FeatureBins  # of the residual, named "residual"
    scale: float
    bound: float

    def __post_init__(self) -> None:
        """Scale and bound are positive.

        Raises:
            DataError: data.profile-mismatch.
        """
        if not (0 < self.scale < np.inf and 0 < self.bound < np.inf):
            raise DataError("data.profile-mismatch", "The profile's residuals: scale and bound are positive numbers.")


class ReferenceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What the model saw and said on reference data."""

    rows: int
    features: tuple[FeatureBins, ...]
    labels: tuple[str, ...] = ()
    predictions: tuple[int, ...] = ()  # per class
    scores: tuple[int, ...] = ()  # [classes × SCORE_BINS], flat
    labelled: int = 0  # held-out rows the error rate was measured on
    errors: int = 0
    hits: tuple[int, ...] = ()  # of `scores`, how many were right: what a score was worth on held-out rows
    values: FeatureBins | None = None  # a regressor's predictions on held-out rows, named "value"
    residuals: ResidualReference | None = None  # of a regressor
    moments: MomentReference | None = None
    projections: tuple[Projection, ...] = ()  # of inputs that are tensors, whose numbers are among the features
    version: int = 1

    def __post_init__(self) -> None:
        """Moments speak of the profile's features.

        Raises:
            DataError: data.profile-mismatch.
        """
        names = tuple(f.name for f in self.features)
        if self.moments is not None and self.moments.scales.width != len(names):
            raise DataError("data.profile-mismatch", "The profile's moments are of another width than its features.")
        if self.hits and len(self.hits) != len(self.scores):
            raise DataError("data.profile-mismatch", "The profile has hits for other scores than it counts.")

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each feature's counts begin in a flat count vector; one more than features, the last is the end."""
        ends = np.cumsum([0, *(f.cells for f in self.features)])
        return tuple(int(e) for e in ends)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """All features' counts, flat."""
        return np.concatenate([np.asarray(f.counts, dtype=np.int64) for f in self.features])


class WindowCounts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Counts over some rows: of one device's window, or of many merged.

    The vectors are tuples, or `Vector`s, which are quicker to merge; it makes no difference otherwise.
    """

    rows: int
    counts: Sequence[int]
    predictions: Sequence[int] = ()
    scores: Sequence[int] = ()
    labelled: int = 0
    errors: int = 0
    invalid: int = 0  # rows refused
    distances: Sequence[int] = ()  # cells of `MomentReference.distance`
    values: Sequence[int] = ()  # cells of `ReferenceProfile.values`
    moments: Moments | None = None
    products: Products | None = None
    residuals: Sequence[int] = ()  # cells of `ResidualReference.bins`, as labels come
    residual_sums: Sequence[int] = ()  # of their steps: Σ, Σ²
    quality: Quality = ()

    def __add__(self, other: WindowCounts) -> WindowCounts:
        """Merge: addition, cell by cell.

        Raises:
            DataError: data.profile-mismatch when the layouts differ.
        """
        return WindowCounts(
            rows=self.rows + other.rows,
            counts=add(self.counts, other.counts),
            predictions=add(self.predictions, other.predictions),
            scores=add(self.scores, other.scores),
            labelled=self.labelled + other.labelled,
            errors=self.errors + other.errors,
            invalid=self.invalid + other.invalid,
            distances=_merge(self.distances, other.distances),
            values=_merge(self.values, other.values),
            moments=_both(self.moments, other.moments),
            products=_both(self.products, other.products),
            residuals=_merge(self.residuals, other.residuals),
            residual_sums=_merge(self.residual_sums, other.residual_sums),
            quality=merge_quality(self.quality, other.quality),
        )


_Part = TypeVar("_Part", Moments, Products)


def _both(a: _Part | None, b: _Part | None) -> _Part | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _merge(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    return add(a, b) if a and b else a or b


def merge(windows: Sequence[WindowCounts]) -> WindowCounts:
    """The sum of one or more, at once: what `+` makes of them one after the other.

    Raises:
        DataError: data.profile-mismatch when the layouts differ.
    """
    moments = [w.moments for w in windows if w.moments is not None]
    products = [w.products for w in windows if w.products is not None]
    return WindowCounts(
        rows=sum(w.rows for w in windows),
        counts=total([w.counts for w in windows]),
        predictions=total([w.predictions for w in windows]),
        scores=total([w.scores for w in windows]),
        labelled=sum(w.labelled for w in windows),
        errors=sum(w.errors for w in windows),
        invalid=sum(w.invalid for w in windows),
        distances=_total([w.distances for w in windows]),
        values=_total([w.values for w in windows]),
        moments=merge_moments(moments) if moments else None,
        products=reduce(operator.add, products) if products else None,
        residuals=_total([w.residuals for w in windows]),
        residual_sums=_total([w.residual_sums for w in windows]),
        quality=merge_quality(*(w.quality for w in windows)),
    )


#: Asked first: what a vector holds is not looked into for it.
_NONE: Final = ()


def _total(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The sum of those that are there."""
    there = [part for part in parts if part is not _NONE and part]
    return total(there) if there else ()


def empty_counts(profile: ReferenceProfile) -> WindowCounts:
    """The neutral element of merge for this profile."""
    return WindowCounts(
        rows=0,
        counts=Vector([0] * profile.offsets[-1]),
        predictions=Vector([0] * len(profile.predictions)),
        scores=Vector([0] * len(profile.scores)),
    )


def only_fitting(counts: WindowCounts, profile: ReferenceProfile) -> WindowCounts:
    """`counts` without the optional parts that are laid out otherwise than the profile's: they count something else."""
    moments = profile.moments
    width = len(profile.features)
    distance = moments.distance if moments is not None else None
    own, together, sums = counts.moments, counts.products, counts.residual_sums
    own_fits = own is not None and {len(own.sums), len(own.squares), len(own.lags)} == {width} and moments is not None
    together_fits = together is not None and distance is not None and len(together.sums) == width * (width + 1) // 2
    residuals = _fitting(counts.residuals, None if profile.residuals is None else profile.residuals.bins)
    return msgspec.structs.replace(
        counts,
        distances=_fitting(counts.distances, distance),
        values=_fitting(counts.values, profile.values),
        moments=own if own_fits else None,
        products=together if together_fits else None,
        residuals=residuals,
        residual_sums=sums if residuals and len(sums) == 2 else (),
    )


def _fitting(counts: Sequence[int], bins: FeatureBins | None) -> Sequence[int]:
    return counts if bins is not None and len(counts) == bins.cells else ()


class Binner:
    """Counts float32 rows into the cells of a set of feature bins.

    The loop runs over the (at most 19) edges on the whole block, with one flat bincount at the end, and values lie
    feature by feature: that was measured faster than a searchsorted per feature, and it is exact.
    """

    def __init__(self, features: Sequence[FeatureBins | Cuts]) -> None:
        """Lay the cut points out as matrices padded with +inf."""
        self.width = len(features)
        # Where bins are codes, nothing is to be compared.
        edges = [() if isinstance(f, FeatureBins) and f.categories else f.edges for f in features]
        self._edges = np.full((max(map(len, edges)), self.width, 1), np.inf, dtype=np.float32)
        for j, cuts in enumerate(edges):
            self._edges[: len(cuts), j, 0] = cuts
        self._low = np.array([[f.low] for f in features], dtype=np.float32)
        self._high = np.array([[f.high] for f in features], dtype=np.float32)
        codes = [j for j, f in enumerate(features) if isinstance(f, FeatureBins) and f.categories]
        self._codes = np.array(codes, dtype=np.intp)
        cells = np.array([[len(f.edges) + 1 + EXTRA_CELLS] for f in features])
        self._cell: type[np.uint8 | np.uint16] = np.uint8 if cells.max() <= np.iinfo(np.uint8).max else np.uint16
        self._over = (cells - 2).astype(self._cell)
        self._missing = (cells - 1).astype(self._cell)
        self._start = (np.cumsum(cells)[:, None] - cells).astype(np.int64)
        self.cells = int(cells.sum())

    def count(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Counts of `rows` (float32 `[n, width]`), flat int64 `[cells]`."""
        return self.count_columns(np.ascontiguousarray(rows.T))

    def count_columns(self, columns: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The same of rows that lie feature by feature, float32 `[width, n]`."""
        if not columns.size:
            return np.zeros(self.cells, dtype=np.int64)
        cell = np.ones(columns.shape, dtype=self._cell)
        found = np.empty(columns.shape, dtype=np.bool_)
        ones = found.view(np.uint8)
        for edge in self._edges:
            np.greater_equal(columns, edge, out=found)
            cell += ones
        if len(self._codes):
            codes = np.nan_to_num(columns[self._codes], nan=0.0)
            cell[self._codes] = 1 + np.clip(codes, 0, self._over[self._codes] - 2).astype(self._cell)
        # What is below has no cell but the first; so has what is missing, which gets its own further down.
        np.greater_equal(columns, self._low, out=found)
        cell *= ones
        if np.greater(columns, self._high, out=found).any():
            np.copyto(cell, self._over, where=found)
        if np.isnan(columns, out=found).any():
            np.copyto(cell, self._missing, where=found)
        # +inf pads compare equal to an infinite value; `over` has already taken those cells.
        return np.bincount((cell + self._start).ravel(), minlength=self.cells)


class Cuts(msgspec.Struct, frozen=True):
    """Cut points before anything was counted."""

    low: float
    high: float
    edges: tuple[float, ...]


def category_cuts(categories: Sequence[str]) -> tuple[float, ...]:
    """Low, edges and high of categories: the codes 0, 1, 2 …, and none beyond the last."""
    last = float(len(categories) - 1)
    return (0.0, *(float(i) for i in range(1, len(categories))), last)


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


def profile_features(
    rows: npt.NDArray[np.float32], names: Sequence[str], categories: Mapping[str, Sequence[str]] | None = None
) -> tuple[FeatureBins, ...]:
    """Bins and counts of every column of `rows` (float32 `[n, features]`).

    Args:
        rows: the reference; of a categorical feature, the codes.
        names: in column order.
        categories: of the features that are categorical, by name.

    Raises:
        DataError: data.empty; data.profile-mismatch for too many categories.
    """
    empty = [_empty_bins(rows[:, j], name, (categories or {}).get(name, ())) for j, name in enumerate(names)]
    counts = Binner(empty).count(rows)
    out, at = [], 0
    for bins in empty:
        out.append(msgspec.structs.replace(bins, counts=tuple(counts[at : at + bins.cells].tolist())))
        at += bins.cells
    return tuple(out)


def _empty_bins(column: npt.NDArray[np.float32], name: str, categories: Sequence[str]) -> FeatureBins:
    if categories:
        low, *edges, high = category_cuts(categories)
        cuts = Cuts(low, high, tuple(edges))
    else:
        cuts = cut_points(column)
    cells = len(cuts.edges) + 1 + EXTRA_CELLS
    return FeatureBins(
        name=name, low=cuts.low, high=cuts.high, edges=cuts.edges, counts=(0,) * cells, categories=tuple(categories)
    )


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
