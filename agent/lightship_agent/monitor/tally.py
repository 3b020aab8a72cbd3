"""Monitor: what is counted of the rows of one open window.

Rules:
* memory does not grow with rows: counts, sums, one row of steps, and two extremes per feature;
* numpy on whole blocks, and no more than that: this runs beside the serving of a small device;
* counting rows in two parts is counting them at once, to the bit;
* extremes stay here: they are values that somebody measured, and what leaves the device are counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.moments import Distance, Moments, Products, Standardiser, moments_of, products_of
from lightship_agent.contract.profile import (
    SCORE_BINS,
    Binner,
    FeatureBins,
    MomentReference,
    ReferenceProfile,
    WindowCounts,
    count_outputs,
)
from lightship_agent.contract.vectors import Vector

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Extremes(msgspec.Struct, frozen=True):
    """Of one window, per feature; NaN where nothing was measured.

    `magnitude` is the mean of log₂|x| over the values beyond the reference's range.
    """

    lowest: Floats
    highest: Floats
    magnitude: npt.NDArray[np.float64]


class Tally:
    """Counts rows of one stream, window after window."""

    def __init__(self, profile: ReferenceProfile) -> None:
        """Lay everything out once.

        Args:
            profile: of the model whose rows these are.
        """
        self._binner = Binner(profile.features)
        self._range = _Range(profile.features)
        self._outputs = _Outputs(profile)
        self._joint = None if profile.moments is None else _Joint(profile.moments)
        self._rows = 0
        self._counts = np.zeros(self._binner.cells, dtype=np.int64)

    @property
    def rows(self) -> int:
        """Rows counted since the last `take`."""
        return self._rows

    @property
    def state_bytes(self) -> int:
        """What is remembered of the rows: counts, sums and extremes, without the constants of the profile."""
        parts = [self._counts, *self._outputs.state(), *self._range.state()]
        return sum(part.nbytes for part in parts + ([] if self._joint is None else self._joint.state()))

    def count(self, rows: npt.NDArray[Any], labels: Ints, tops: Floats) -> None:
        """Count rows.

        Args:
            rows: float32 `[n, width]`.
            labels: predicted classes, int64 `[n]`; negative for a regressor.
            tops: float32 `[n]`: the highest score of a classifier, NaN without scores; the value of a regressor.
        """
        seen: Floats = rows
        self._rows += len(seen)
        columns = np.ascontiguousarray(seen.T)
        found = self._binner.count_columns(columns)
        self._counts += found
        self._range.count(columns, found)
        self._outputs.count(labels, tops)
        if self._joint is not None:
            self._joint.count(seen)

    def take(self) -> tuple[WindowCounts, Extremes]:
        """What was counted since the last `take`, and begin anew; neighbours and products go on over windows."""
        outputs = self._outputs
        counts = WindowCounts(
            rows=self._rows,
            counts=Vector(self._counts.copy()),
            predictions=Vector(outputs.predictions.copy()),
            scores=Vector(outputs.scores.copy()),
            values=Vector(outputs.values.copy()),
            distances=() if self._joint is None else self._joint.take_distances(),
            moments=None if self._joint is None else self._joint.take_moments(),
        )
        self._rows = 0
        self._counts[:] = 0
        outputs.clear()
        return counts, self._range.take()

    def take_products(self) -> Products | None:
        """Products since they were last taken; None without rows, or where there are none."""
        return None if self._joint is None else self._joint.take_products()


class _Outputs:
    """Classes and highest scores, or values."""

    def __init__(self, profile: ReferenceProfile) -> None:
        self._classes = len(profile.predictions)
        has_scores = len(profile.scores) == self._classes * SCORE_BINS and self._classes > 0
        self.predictions = np.zeros(self._classes, dtype=np.int64)
        self.scores = np.zeros(self._classes * SCORE_BINS if has_scores else 0, dtype=np.int64)
        self._binner = None if profile.values is None else Binner([profile.values])
        self.values = np.zeros(self._binner.cells if self._binner else 0, dtype=np.int64)

    def count(self, labels: Ints, tops: Floats) -> None:
        if self._binner is not None:
            self.values += self._binner.count(tops[:, None])
        if not self._classes:
            return
        known = labels >= 0
        scores = np.nan_to_num(tops[known, None]) if len(self.scores) else None
        predictions, cells = count_outputs(labels[known], scores, self._classes)
        self.predictions += predictions
        if len(self.scores):
            self.scores += cells

    def state(self) -> list[Ints]:
        return [self.predictions, self.scores, self.values]

    def clear(self) -> None:
        for counts in self.state():
            counts[:] = 0


class _Joint:
    """Moments and distances of a window, products of several."""

    def __init__(self, reference: MomentReference) -> None:
        width = reference.scales.width
        self._standardiser = Standardiser(reference.scales)
        self._before: Floats | None = None
        self._rows = self._pairs = self._product_rows = 0
        self._moments = np.zeros((3, width), dtype=np.int64)
        self._distance: Distance | None = None
        if reference.distance is not None:
            self._distance = Distance(reference.inverse, width)
            self._binner = Binner([reference.distance])
            self._distances = np.zeros(self._binner.cells, dtype=np.int64)
            self._products = np.zeros(width * (width + 1) // 2, dtype=np.int64)

    def count(self, rows: Floats) -> None:
        if not len(rows):
            return
        steps = self._standardiser.steps(rows)
        pairs, sums = moments_of(steps, self._before)
        self._before = steps[-1].copy()
        self._rows += len(rows)
        self._pairs += pairs
        self._moments += sums
        if self._distance is not None:
            self._distances += self._binner.count(self._distance.of(steps))
            self._products += products_of(steps)
            self._product_rows += len(rows)

    def state(self) -> list[npt.NDArray[Any]]:
        joint = [] if self._distance is None else [self._distances, self._products]
        return [self._moments, *joint, *([] if self._before is None else [self._before])]

    def take_moments(self) -> Moments:
        sums, squares, lags = (Vector(part) for part in self._moments.copy())
        moments = Moments(rows=self._rows, pairs=self._pairs, sums=sums, squares=squares, lags=lags)
        self._rows = self._pairs = 0
        self._moments[:] = 0
        return moments

    def take_distances(self) -> Sequence[int]:
        if self._distance is None:
            return ()
        counts = Vector(self._distances.copy())
        self._distances[:] = 0
        return counts

    def take_products(self) -> Products | None:
        if not self._product_rows:
            return None
        products = Products(rows=self._product_rows, sums=tuple(self._products.tolist()))
        self._product_rows = 0
        self._products[:] = 0
        return products


class _Range:
    """The extremes of a window, and the order of magnitude of what is beyond the reference's range."""

    def __init__(self, features: tuple[FeatureBins, ...]) -> None:
        ends = np.cumsum([f.cells for f in features])
        self._under = ends - [f.cells for f in features]
        self._over = ends - 2
        self._low = np.array([[f.low] for f in features], dtype=np.float32)
        self._high = np.array([[f.high] for f in features], dtype=np.float32)
        self._lowest = np.full(len(features), np.nan, dtype=np.float32)
        self._highest = self._lowest.copy()
        self._exponents = np.zeros(len(features), dtype=np.int64)
        self._beyond = np.zeros(len(features), dtype=np.int64)

    def count(self, columns: Floats, cells: Ints) -> None:
        """Count rows that lie feature by feature, which fell into these cells."""
        if not columns.size:
            return
        self._lowest = np.fmin(self._lowest, np.fmin.reduce(columns, axis=1))
        self._highest = np.fmax(self._highest, np.fmax.reduce(columns, axis=1))
        beyond = cells[self._under] + cells[self._over]
        self._beyond += beyond
        if beyond.any():
            outside = np.less(columns, self._low)
            outside |= columns > self._high
            features = np.nonzero(outside)[0]
            np.add.at(self._exponents, features, np.frexp(columns[outside])[1])

    def state(self) -> list[npt.NDArray[Any]]:
        return [self._lowest, self._highest, self._exponents, self._beyond]

    def take(self) -> Extremes:
        # A mantissa is in [½, 1): on the average, its logarithm is half of 1 below the exponent.
        magnitude = np.where(self._beyond > 0, self._exponents / np.maximum(self._beyond, 1) - 0.5, np.nan)
        found = Extremes(self._lowest, self._highest, magnitude)
        self._lowest = np.full_like(self._lowest, np.nan)
        self._highest = np.full_like(self._highest, np.nan)
        self._exponents[:] = 0
        self._beyond[:] = 0
        return found
