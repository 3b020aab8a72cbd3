"""Data: the reference profile of a model - what it saw in training, what it said, how often it was wrong.

Rules:
* pure; the bins and their layout are the contract's, this room only fills them;
* bins come from training rows, the error rate from held-out rows, which the model has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.profile import ReferenceProfile, count_outputs, profile_features

from .moments import reference_moments


def reference_profile(
    rows: npt.NDArray[np.float32],
    names: Sequence[str],
    predicted: npt.NDArray[np.int64] | None = None,
    scores: npt.NDArray[np.float32] | None = None,
    labels: tuple[str, ...] = (),
    *,
    labelled: int = 0,
    errors: int = 0,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> ReferenceProfile:
    """Bins and counts of `rows`, and of what the model answers to them.

    Args:
        rows: training rows, float32 `[n, width]`.
        names: feature names in column order.
        predicted: class indices the model gives to `rows`, int64 `[n]`; None for regression.
        scores: class probabilities, float32 `[n, classes]`; None where the model gives none.
        labels: class names in index order.
        labelled: held-out rows the error rate was measured on.
        errors: how many of them the model got wrong.
        categories: the words of the features that are categories, by name.

    Raises:
        DataError: data.empty for no rows or a column without any value; data.profile-mismatch when sizes disagree.
    """
    if not len(rows):
        raise DataError("data.empty", "A profile needs at least one row.")
    if rows.ndim != 2 or rows.shape[1] != len(names) or not 0 <= errors <= labelled:
        message = f"Expected [n, {len(names)}] rows and 0 ≤ errors ≤ labelled, found {list(rows.shape)}."
        raise DataError("data.profile-mismatch", message)
    predictions: tuple[int, ...] = ()
    score_counts: tuple[int, ...] = ()
    if labels:
        predictions, score_counts = _count(len(rows), predicted, scores, len(labels))
    features = profile_features(rows, names, categories)
    return ReferenceProfile(
        rows=len(rows),
        features=features,
        labels=labels,
        predictions=predictions,
        scores=score_counts,
        labelled=labelled,
        errors=errors,
        moments=reference_moments(features, rows),
    )


def _count(
    rows: int, predicted: npt.NDArray[np.int64] | None, scores: npt.NDArray[np.float32] | None, classes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if predicted is None or predicted.shape != (rows,) or (scores is not None and scores.shape != (rows, classes)):
        message = f"Expected {rows} predicted classes, and scores [{rows}, {classes}] or none."
        raise DataError("data.profile-mismatch", message)
    if predicted.min() < 0 or predicted.max() >= classes:
        raise DataError("data.profile-mismatch", f"Predicted classes must be within 0..{classes - 1}.")
    per_class, per_score = count_outputs(predicted, scores, classes)
    return tuple(int(v) for v in per_class), tuple(int(v) for v in per_score)
