"""Convert: the rows on which original and ONNX model are compared. Pure.

Rules:
* what the model will see: held-out rows;
* what it may see: each feature at its ends and beyond, each category, each nullable feature missing;
* where they would part: every tree threshold and the float32 numbers next to it, for trees compare in float64 there
  and in float32 on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError
from lightship_agent.contract.schema import Feature, FeatureSchema

from .thresholds import splits
from .walk import TREES, parts

MAX_HELDOUT: Final = 2_000
MAX_THRESHOLD_ROWS: Final = 500
_MAX_EDGE_FEATURES: Final = 500
_MISSING_ROWS: Final = 5
_CATEGORIES: Final = 16  # of one feature


def parity_rows(
    heldout: npt.NDArray[np.float32],
    schema: FeatureSchema,
    estimator: Any = None,
    *,
    max_heldout: int = MAX_HELDOUT,
    max_thresholds: int = MAX_THRESHOLD_ROWS,
) -> npt.NDArray[np.float32]:
    """Held-out rows, and rows made of them that look for trouble.

    Args:
        heldout: float32 `[n, width]`, n ≥ 1.
        schema: of the rows.
        estimator: the original, for its thresholds; None for a foreign model.
        max_heldout: how many held-out rows are used, evenly spaced.
        max_thresholds: how many rows on thresholds are made.

    Returns:
        float32 `[m, width]`, finite but for NaN where the schema is nullable.

    Raises:
        DataError: data.empty without held-out rows; data.* when they don't fit the schema.
    """
    checked = schema.check_rows(heldout)
    if not len(checked):
        raise DataError("data.empty", "Parity needs at least one held-out row.")
    base = checked[evenly(len(checked), max_heldout)]
    blocks = [base, _edges(base, schema), _missing(base, schema)]
    if estimator is not None:
        blocks.append(_on_thresholds(base, estimator, max_thresholds))
    rows = np.concatenate(blocks)
    return rows[~np.isinf(rows).any(axis=1)]


def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` indices of `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _edges(base: npt.NDArray[np.float32], schema: FeatureSchema) -> npt.NDArray[np.float32]:
    """Per feature: a row at its lowest, its highest, and one range below and above them."""
    made = []
    for j, feature in enumerate(schema.features[:_MAX_EDGE_FEATURES]):
        for k, value in enumerate(_ends(base[:, j], feature)):
            row = base[(4 * j + k) % len(base)].copy()
            with np.errstate(over="ignore"):
                row[j] = np.float32(value)
            made.append(row)
    return np.array(made, dtype=np.float32).reshape(len(made), schema.width)


def _ends(column: npt.NDArray[np.float32], feature: Feature) -> tuple[float, ...]:
    if feature.is_categorical:
        last = len(feature.levels) - 1 if feature.unknown_code is None else feature.unknown_code
        return tuple(float(code) for code in evenly(last + 1, _CATEGORIES))
    present = column[~np.isnan(column)]
    if not len(present) and feature.low is None:
        return ()
    low = float(present.min()) if feature.low is None else feature.low
    high = float(present.max()) if feature.high is None else feature.high
    span = high - low or 1.0
    return (low, high, low - span, high + span)


def _missing(base: npt.NDArray[np.float32], schema: FeatureSchema) -> npt.NDArray[np.float32]:
    """Some rows with each nullable feature missing, and with all of them missing."""
    nullable = [j for j, f in enumerate(schema.features) if f.nullable]
    made = []
    for gaps in [[j] for j in nullable] + ([nullable] if len(nullable) > 1 else []):
        rows = base[evenly(len(base), _MISSING_ROWS)].copy()
        rows[:, gaps] = np.nan
        made.append(rows)
    return np.concatenate(made) if made else base[:0]


def _on_thresholds(base: npt.NDArray[np.float32], estimator: Any, most: int) -> npt.NDArray[np.float32]:
    """Rows with one feature on a threshold, or on the float32 number below or above it."""
    found = sorted(set(thresholds(estimator, base.shape[1])))
    chosen = [found[i] for i in evenly(len(found), max(1, most // 3))] if found else []
    made = []
    for k, (j, threshold) in enumerate(chosen):
        at = np.float32(threshold)
        for value in (np.nextafter(at, np.float32(-np.inf)), at, np.nextafter(at, np.float32(np.inf))):
            row = base[k % len(base)].copy()
            row[j] = value
            made.append(row)
    return np.array(made[:most], dtype=np.float32).reshape(-1, base.shape[1])


def thresholds(estimator: Any, width: int) -> Iterator[tuple[int, float]]:
    """(feature, threshold) of every split that looks at the model's own columns."""
    for part in parts(estimator):
        if part.direct and part.is_a(TREES):
            for feature, threshold in splits(part):
                if 0 <= feature < width and np.isfinite(np.float32(threshold)):
                    yield int(feature), float(threshold)
