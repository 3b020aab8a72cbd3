"""Data: how the reference features move together, for the profile.

Rules:
* pure; what turns values into steps and steps into sums is the contract's, this room only finds the constants;
* the center, the scale and the range of a feature come from its own clipped values: no outlier of the training data
  decides what a standard deviation is;
* a distance is counted by an inverse covariance that its row had no part in: by its own, every row is too near.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.moments import (
    MAX_JOINT,
    STEPS,
    Distance,
    Moments,
    Products,
    Scales,
    Standardiser,
    moments_of,
    pack_triangle,
    products_of,
    unpack_triangle,
)
from lightship_agent.contract.profile import FeatureBins, MomentReference, ResidualReference, profile_features

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: Distances of a tenth of the rows at a time, by the covariance of the others.
FOLDS: Final = 10
#: At least this share of the covariance is its diagonal: two copies of one column must not make it singular.
MIN_SHRINKAGE: Final = 0.01
#: A label of a regressor counts as an error when it is farther off than this share of the held-out rows.
USUAL: Final = 0.9


def reference_moments(features: Sequence[FeatureBins], rows: Floats) -> MomentReference:
    """What a window's moments, products and distances are to be compared with.

    Args:
        features: their bins.
        rows: the reference, float32 `[n, width]`, in the order in which they were measured, if that is known.
    """
    scales = _scales(features, rows)
    steps = Standardiser(scales).steps(rows)
    pairs, sums = moments_of(steps)
    s, q, lags = (tuple(part.tolist()) for part in sums)
    moments = Moments(rows=len(rows), pairs=pairs, sums=s, squares=q, lags=lags)
    runs = tuple(_longest_run(rows[:, j]) for j in range(rows.shape[1]))
    if len(features) > MAX_JOINT:
        return MomentReference(scales=scales, moments=moments, runs=runs)
    products = products_of(steps)
    inverse = _inverse(len(rows), sums[0], products)
    (distance,) = profile_features(_fresh_distances(steps, sums[0], products), ("distance",))
    return MomentReference(
        scales=scales,
        moments=moments,
        runs=runs,
        products=Products(rows=len(rows), sums=tuple(products.tolist())),
        inverse=inverse,
        distance=distance,
    )


def _fresh_distances(steps: Floats, sums: Ints, products: Ints) -> Floats:
    """D² of every row by the inverse covariance of the nine tenths of the rows it is not among, float32 `[n, 1]`."""
    out = np.empty((len(steps), 1), dtype=np.float32)
    for fold in range(FOLDS):
        part = steps[fold::FOLDS]
        others = len(steps) - len(part)
        if len(part):
            rest = sums - part.sum(axis=0, dtype=np.float64).astype(np.int64), products - products_of(part)
            inverse = _inverse(others, *rest) if others else _inverse(len(steps), sums, products)
            out[fold::FOLDS] = Distance(inverse, steps.shape[1]).of(part)
    return out


def reference_residuals(predicted: Floats, truth: Floats) -> ResidualReference | None:
    """How far a regressor was off on held-out rows; None where it was not, or there are none."""
    residuals = (truth.astype(np.float64) - predicted).astype(np.float32)
    residuals = residuals[np.isfinite(residuals)]
    bound = float(np.quantile(np.abs(residuals), USUAL, method="inverted_cdf")) if len(residuals) else 0.0
    if not bound > 0:
        return None
    (bins,) = profile_features(residuals[:, None], ("residual",))
    return ResidualReference(bins=bins, scale=float(np.clip(residuals, -2 * bound, 2 * bound).std()), bound=bound)


def _scales(features: Sequence[FeatureBins], rows: Floats) -> Scales:
    found = [_scale(f, rows[:, j]) for j, f in enumerate(features)]
    low, high, center, scale = (tuple(c) for c in zip(*found, strict=True))
    return Scales(low=low, high=high, center=center, scale=scale)


def _scale(feature: FeatureBins, column: Floats) -> tuple[float, float, float, float]:
    """Low, high, center and scale; the scale 0 of a category and of a constant.

    The range goes half a span beyond the outermost quantiles: 3.3 standard deviations of a normal distribution.
    """
    low, high = feature.low, feature.high
    if len(feature.edges) > 1:
        span = feature.edges[-1] - feature.edges[0]
        low = max(low, float(np.float32(feature.edges[0] - span / 2)))
        high = min(high, float(np.float32(feature.edges[-1] + span / 2)))
    values = column[np.isfinite(column)].astype(np.float64).clip(low, high)
    scale = float(np.float32(values.std()))
    return low, high, float(np.float32(values.mean())), 0.0 if feature.categories else scale


def _longest_run(column: Floats) -> int:
    """Rows of the longest stretch of one value; a missing one ends it."""
    changes = np.flatnonzero(column[1:] != column[:-1]) + 1
    return int(np.diff([0, *changes, len(column)]).max())


def _inverse(rows: int, sums: Ints, products: Ints) -> bytes:
    """The inverse of the shrunk covariance of z, packed; 0 for what is not measured."""
    width = len(sums)
    mean = sums / rows
    covariance = (unpack_triangle(products, width) / rows - np.outer(mean, mean)) / STEPS**2
    variance = np.diag(covariance)
    measured = np.flatnonzero(variance > 0)
    share = max(MIN_SHRINKAGE, len(measured) / (len(measured) + rows))
    shrunk = (1 - share) * covariance + share * np.diag(variance)
    inverse = np.zeros((width, width))
    grid = np.ix_(measured, measured)
    inverse[grid] = np.linalg.inv(shrunk[grid])
    return pack_triangle(inverse)
