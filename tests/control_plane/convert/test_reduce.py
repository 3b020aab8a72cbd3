"""Models in fewer bits: real networks, from the estimator to the bundle that an agent loads and that agrees there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightship.convert.converter import Converted, convert, reduce_precision
from lightship.convert.parity import LIMITS, check_reduced, require
from lightship.convert.reduce import Precision
from lightship.convert.session import OnnxModel
from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.runtime.graph import check_graph

#: Networks that are trained for as long as a test lasts.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
WIDTH = 12
SCHEMA = FeatureSchema(features=tuple(Feature(name=f"f{i}") for i in range(WIDTH)))
RNG = np.random.default_rng(3)
#: Features of very different sizes, as sensors have them.
SIZES = np.array([10.0**k for k in (-2, 0, 1, 3)] * 3, dtype=np.float32)
X = (RNG.normal(size=(2_000, WIDTH)) * SIZES).astype(np.float32)
SIGNAL = (X / SIZES)[:, 0] + 0.7 * (X / SIZES)[:, 1] ** 2
Y = (SIGNAL > 0.5).astype(np.int64)
FIT, HELD_OUT = slice(0, 1_500), slice(1_500, None)


@pytest.fixture(scope="module")
def network() -> Converted:
    estimator = make_pipeline(StandardScaler(), MLPClassifier((64, 32), max_iter=60, random_state=1))
    return convert(estimator.fit(X[FIT], Y[FIT]), SCHEMA, ("low", "high"), "classification")


def accuracy(model: Converted) -> float:
    return float((OnnxModel(model.onnx, model.outputs).predict(X[HELD_OUT]) == Y[HELD_OUT]).mean())


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.75), ("int8", 0.65)])
def test_a_network_in_fewer_bits_is_smaller_says_the_same_and_runs_on_a_device(
    network: Converted, precision: Precision, share: float
) -> None:
    made = reduce_precision(network, precision, X[FIT])
    report = check_reduced(network, made, X[HELD_OUT])

    require(report)
    assert (made.precision, report.rule, report.tolerance) == (precision, precision, LIMITS[precision].tolerance)
    assert len(made.onnx) < share * len(network.onnx)
    assert (made.schema, made.outputs) == (network.schema, network.outputs)
    assert abs(accuracy(made) - accuracy(network)) < 0.02
    facts = check_graph(made.onnx, max_bytes=1 << 30)
    assert set(facts.opsets) <= {"", "ai.onnx.ml"}
    if precision == "int8":
        assert {"QuantizeLinear", "DequantizeLinear"} <= {o.name for o in facts.operators}
    assert report.batch_diff == 0.0, "a row alone and in a batch get the same bits"


def test_the_same_network_reduced_twice_is_the_same_bytes(network: Converted) -> None:
    for precision in ("fp16", "int8"):
        first, second = (reduce_precision(network, precision, X[FIT]) for _ in range(2))  # type: ignore[arg-type]
        assert first.onnx == second.onnx


def test_fp32_is_what_it_was(network: Converted) -> None:
    assert reduce_precision(network, "fp32", X[FIT]) is network


def test_a_regressor_is_judged_by_its_own_size() -> None:
    target = (1e5 * SIGNAL).astype(np.float32)
    estimator = make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(64, 32), max_iter=200, random_state=1))
    estimator.fit(X[FIT], target[FIT])
    whole = convert(estimator, SCHEMA, (), "regression")
    report = check_reduced(whole, reduce_precision(whole, "int8", X[FIT]), X[HELD_OUT])
    require(report)
    assert 0 < report.max_diff < 1


@pytest.mark.parametrize(
    ("precision", "estimator", "said"),
    [
        ("int8", RandomForestClassifier(5, random_state=1), "trees compare and do not multiply"),
        ("fp16", LogisticRegression(), "no weights to multiply with"),
    ],
)
def test_what_can_not_gain_is_refused(precision: Precision, estimator: Any, said: str) -> None:
    scaled = (X / SIZES).astype(np.float32)
    whole = convert(estimator.fit(scaled[FIT], Y[FIT]), SCHEMA, ("low", "high"), "classification")
    with pytest.raises(ConvertError, match=said) as refused:
        reduce_precision(whole, precision, scaled[FIT])
    assert refused.value.code == "convert.precision"
    assert "fp32" in refused.value.remedy


def test_a_network_too_small_to_gain_is_refused() -> None:
    estimator = make_pipeline(StandardScaler(), MLPClassifier((2,), max_iter=20, random_state=1)).fit(X[FIT], Y[FIT])
    whole = convert(estimator, SCHEMA, ("low", "high"), "classification")
    with pytest.raises(ConvertError, match="too small to gain") as refused:
        reduce_precision(whole, "int8", X[FIT])
    assert refused.value.code == "convert.precision"


def test_without_whole_rows_there_is_nothing_to_measure_ranges_on(network: Converted) -> None:
    gaps = X[:100].copy()
    gaps[:, 0] = np.nan
    with pytest.raises(ConvertError, match="rows without missing values") as refused:
        reduce_precision(network, "int8", gaps)
    assert refused.value.code == "convert.precision"


def test_parity_refuses_an_int8_model_whose_rows_were_not_those_it_will_see(network: Converted) -> None:
    """Ranges measured on a sliver of the world cut off the rest of it."""
    made = reduce_precision(network, "int8", X[FIT] * np.float32(1e-3))
    report = check_reduced(network, made, X[HELD_OUT])
    assert not report.passed
    with pytest.raises(ConvertError) as refused:
        require(report)
    assert refused.value.code == "convert.parity"
    assert "fp32" in refused.value.remedy
