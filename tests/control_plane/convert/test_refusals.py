"""What is refused before it is tried, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - makes IterativeImputer importable
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import TunedThresholdClassifierCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, SplineTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from lightship.convert.refusals import check_convertible
from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Feature, FeatureSchema

FULL = FeatureSchema(features=(Feature(name="a"), Feature(name="b")))
HOLED = FeatureSchema(features=(Feature(name="a"), Feature(name="b", nullable=True)))
LINEAR = LogisticRegression()


@pytest.mark.parametrize(
    "estimator",
    [
        HistGradientBoostingClassifier(categorical_features=[0]),
        HistGradientBoostingRegressor(loss="poisson"),
        HistGradientBoostingRegressor(loss="gamma"),
        KNeighborsClassifier(weights="distance"),
        KNeighborsRegressor(weights=np.sqrt),
        TunedThresholdClassifierCV(LINEAR),
        VotingClassifier([("a", LINEAR)]),
        GaussianProcessClassifier(),
        TransformedTargetRegressor(LinearRegression()),
        IsolationForest(),
        make_pipeline(FunctionTransformer(np.log1p), LINEAR),
        make_pipeline(SplineTransformer(), LINEAR),
        make_pipeline(IterativeImputer(), LINEAR),
        make_pipeline(KNNImputer(), LINEAR),
        make_pipeline(SimpleImputer(add_indicator=True), LINEAR),
        make_pipeline(OneHotEncoder(handle_unknown="infrequent_if_exist"), LINEAR),
        make_pipeline(TfidfVectorizer(), LINEAR),
        make_pipeline(StandardScaler(), make_pipeline(StandardScaler(), KNeighborsClassifier(weights="distance"))),
        make_pipeline(ColumnTransformer([("c", SplineTransformer(), [0])]), LINEAR),
        make_pipeline(FeatureUnion([("u", SplineTransformer())]), LINEAR),
        BaggingClassifier(KNeighborsClassifier(weights="distance")),
        CalibratedClassifierCV(TunedThresholdClassifierCV(LINEAR)),
        VotingClassifier([("a", KNeighborsClassifier(weights="distance"))], flatten_transform=False),
    ],
    ids=lambda e: type(e).__name__,
)
def test_known_wrong_kinds_are_refused_with_reason_and_way_round(estimator: Any) -> None:
    with pytest.raises(ConvertError) as caught:
        check_convertible(estimator, FULL)
    assert caught.value.code == "convert.refused"
    assert caught.value.remedy


@pytest.mark.parametrize(
    "estimator",
    [
        HistGradientBoostingClassifier(),
        HistGradientBoostingRegressor(loss="absolute_error"),
        KNeighborsClassifier(),
        VotingClassifier([("a", LINEAR)], flatten_transform=False),
        GaussianProcessRegressor(),
        make_pipeline(FunctionTransformer(), LINEAR),
        make_pipeline(SimpleImputer(), LINEAR),
        make_pipeline(OneHotEncoder(handle_unknown="ignore"), LINEAR),
        make_pipeline("passthrough", LINEAR),
        RandomForestClassifier(),
        DecisionTreeClassifier(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_their_agreeing_settings_are_not_refused(estimator: Any) -> None:
    check_convertible(estimator, FULL)


@pytest.mark.parametrize(
    "tree", [DecisionTreeClassifier(), RandomForestClassifier(), BaggingClassifier(DecisionTreeClassifier())]
)
def test_trees_that_may_see_gaps_need_an_imputer(tree: Any) -> None:
    check_convertible(tree, FULL)
    check_convertible(make_pipeline(SimpleImputer(), tree), HOLED)
    with pytest.raises(ConvertError, match="missing values"):
        check_convertible(tree, HOLED)
    with pytest.raises(ConvertError, match="missing values"):
        check_convertible(make_pipeline(StandardScaler(), tree), HOLED)


def test_histogram_boosting_keeps_gaps_by_itself() -> None:
    check_convertible(HistGradientBoostingClassifier(), HOLED)


def test_a_fitted_model_without_categories_is_not_refused_for_the_setting() -> None:
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    check_convertible(HistGradientBoostingClassifier(max_iter=2).fit(x, y), FULL)


def test_several_targets_are_refused_and_several_classes_are_not() -> None:
    x = np.arange(40.0).reshape(20, 2)
    check_convertible(RandomForestClassifier(2).fit(x, np.arange(20) % 3), FULL)
    with pytest.raises(ConvertError, match="several targets"):
        check_convertible(RandomForestClassifier(2).fit(x, np.stack([np.arange(20) % 2] * 2, axis=1)), FULL)
