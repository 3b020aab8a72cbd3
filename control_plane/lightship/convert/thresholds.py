"""Convert: the thresholds of trees, where float64 on one side meets float32 on the other.

Rules:
* a split asks x ≤ t with t in float64; a device compares in float32, and rounding t to the nearest float32 sends
  rows that lie on it to the other side;
* for every float32 x, x ≤ t is the same as x ≤ ⌊t⌋, the largest float32 not above t: thresholds rounded down lose
  nothing. Converters do this for some kinds of trees and forget it for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .walk import TREES, Part, parts


def round_down(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest float32 not above each of `values`; what is not finite in float32 stays."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    lower = np.nextafter(nearest, np.float32(-np.inf))
    floored = np.where(nearest > values, lower, nearest)
    return np.where(np.isfinite(nearest), floored.astype(np.float64), values)


def round_thresholds(estimator: Any) -> None:
    """Round every threshold inside a fitted `estimator` down, in place; its answers to float32 rows stay the same."""
    for part in parts(estimator):
        if part.is_a(TREES):
            for nodes in histogram_nodes(part):
                nodes["num_threshold"] = round_down(nodes["num_threshold"])
            for tree in plain_trees(part):
                tree.threshold[:] = round_down(tree.threshold)


def splits(part: Part) -> Iterator[tuple[int, float]]:
    """(feature, threshold) of every split of an ensemble of trees; leaves may come with a negative feature."""
    for nodes in histogram_nodes(part):
        inner = nodes[nodes["is_leaf"] == 0]
        yield from zip(inner["feature_idx"].tolist(), inner["num_threshold"].tolist(), strict=True)
    for tree in plain_trees(part):
        yield from zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True)


def histogram_nodes(part: Part) -> Iterator[Any]:
    """The node tables of histogram gradient boosting."""
    for iteration in getattr(part.estimator, "_predictors", None) or []:
        yield from (predictor.nodes for predictor in iteration)


def plain_trees(part: Part) -> Iterator[Any]:
    """The tree structures of a tree, a forest, or gradient boosting."""
    members = getattr(part.estimator, "estimators_", None)
    trees = [part.estimator] if members is None else list(np.asarray(members, dtype=object).ravel())
    yield from (member.tree_ for member in trees if getattr(member, "tree_", None) is not None)
