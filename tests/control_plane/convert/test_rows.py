"""The rows that look for trouble."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightship.convert.rows import parity_rows, thresholds
from lightship.convert.thresholds import round_down, round_thresholds
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.schema import Feature, FeatureSchema

RNG = np.random.default_rng(3)
X = RNG.normal(size=(200, 3)).round(2).astype(np.float32)
Y = (X[:, 0] + X[:, 1] ** 2 > 0.3).astype(int)


def schema(*, nullable: bool = False) -> FeatureSchema:
    names = ("a", "b", "c")
    return FeatureSchema(features=tuple(Feature(name=n, low=-3, high=3, nullable=nullable) for n in names))


def test_rows_hold_the_data_its_ends_and_beyond() -> None:
    rows = parity_rows(X, schema())
    assert np.array_equal(rows[:200], X)
    for j in range(3):
        assert {-3.0, 3.0, -9.0, 9.0} <= set(rows[200:, j].tolist())
    assert np.isfinite(rows).all()


def test_nullable_features_go_missing_one_by_one_and_together() -> None:
    gaps = np.isnan(parity_rows(X, schema(nullable=True)))
    assert {tuple(row) for row in gaps.tolist()} >= {
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, True),
    }


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(3, random_state=0),
        HistGradientBoostingClassifier(max_iter=3),
        make_pipeline(SimpleImputer(), RandomForestClassifier(3, random_state=0)),
    ],
)
def test_rows_lie_on_thresholds_and_on_both_sides(estimator: object) -> None:
    estimator.fit(X, Y)  # type: ignore[attr-defined]
    found = sorted(set(thresholds(estimator, 3)))
    assert found
    rows = parity_rows(X, schema(), estimator)
    j, threshold = found[0]
    at = np.float32(threshold)
    column = set(rows[:, j].tolist())
    assert {float(at), float(np.nextafter(at, np.float32(9))), float(np.nextafter(at, np.float32(-9)))} <= column
    assert len(rows) <= 200 + 12 + 500


def test_thresholds_behind_arithmetic_are_not_the_inputs() -> None:
    estimator = make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(X, Y)
    assert list(thresholds(estimator, 3)) == []


def test_parity_without_rows_is_refused() -> None:
    with pytest.raises(DataError):
        parity_rows(X[:0], schema())
    with pytest.raises(DataError):
        parity_rows(X[:, :2], schema())


def test_many_held_out_rows_are_thinned() -> None:
    assert len(parity_rows(np.tile(X, (50, 1)), schema(), max_heldout=100)) == 112


@given(st.floats(-1e30, 1e30), st.floats(-(2**99), 2**99, width=32))
def test_rounding_a_threshold_down_never_moves_a_float32_row(threshold: float, x: float) -> None:
    rounded = float(round_down(np.array([threshold]))[0])
    assert (x <= threshold) == (np.float32(x) <= np.float32(rounded))
    assert rounded <= threshold
    near = np.float32(threshold)
    for value in (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
        assert (float(value) <= threshold) == (float(value) <= rounded)


@pytest.mark.parametrize(
    "estimator", [RandomForestClassifier(5, random_state=0), HistGradientBoostingClassifier(max_iter=5)]
)
def test_rounding_all_thresholds_changes_no_answer(estimator: object) -> None:
    estimator.fit(X, Y)  # type: ignore[attr-defined]
    rows = parity_rows(X, schema(), estimator)
    before = estimator.predict_proba(rows)  # type: ignore[attr-defined]
    round_thresholds(estimator)
    assert np.array_equal(estimator.predict_proba(rows), before)  # type: ignore[attr-defined]
    assert all(float(np.float32(t)) == t for _, t in thresholds(estimator, 3))
