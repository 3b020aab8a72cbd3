"""Conversion in a bounded child, and parity with the original."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC

import lightship.convert.converter as converter_module
from lightship.convert.converter import Converted, convert, inspect_onnx
from lightship.convert.parity import check_parity, golden_rows, parity_rows, require
from lightship.convert.session import OnnxModel
from lightship.data.dataset import Dataset, from_arrays
from lightship.training.recipe import Recipe
from lightship.training.train import fit
from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Feature, FeatureSchema

LOADERS = {"digits": load_digits, "cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}


def dataset(name: str) -> Dataset:
    raw = LOADERS[name]()
    task = "regression" if name == "diabetes" else "classification"
    return from_arrays(name, raw.data, raw.target, list(raw.feature_names), "y", task=task)  # type: ignore[arg-type]


def fresh(data: Dataset, estimator: Any) -> Any:
    return estimator.fit(data.x.copy(), data.y)


def agreed(estimator: Any, data: Dataset) -> Converted:
    """Convert, and require parity on the rows that look for trouble."""
    made = convert(estimator, data.schema, data.labels, data.task)
    report = check_parity(estimator, made, parity_rows(data.x, data.schema, estimator))
    require(report)
    assert report.label_flips == 0
    return made


@pytest.mark.parametrize(
    ("name", "estimator", "scale", "params"),
    [
        ("digits", "logistic-regression", True, {}),
        ("digits", "random-forest", False, {"n_estimators": 20}),
        ("digits", "mlp", True, {"max_iter": 30}),
        ("digits", "hist-gradient-boosting", False, {"max_iter": 10}),
        ("digits", "svc", True, {}),
        ("cancer", "logistic-regression", True, {}),
        ("cancer", "gradient-boosting", False, {"n_estimators": 10}),
        ("cancer", "svc", True, {}),
        ("wine", "hist-gradient-boosting", False, {"max_iter": 20}),
        ("wine", "mlp", True, {}),
    ],
)
def test_what_a_recipe_trains_converts_and_agrees(
    name: str, estimator: str, scale: bool, params: dict[str, Any]
) -> None:
    data = dataset(name)
    run = fit(data, Recipe(estimator=estimator, scale=scale, params=params))
    made = agreed(run.estimator, data)
    outputs, requires = made.outputs, made.requires
    assert outputs.names == ("label", "scores")
    assert outputs.score_kind == ("score" if estimator == "svc" else "probability")
    assert requires.ir_version == 8
    assert requires.opset <= 17
    assert requires.ml_opset <= 3
    info = inspect_onnx(made.onnx)
    assert [(i.name, i.kind, i.shape) for i in info.inputs] == [("features", "float", (None, data.schema.width))]
    assert [(o.kind, o.shape) for o in info.outputs] == [("int64", (None,)), ("float", (None, len(data.labels)))]
    answer = OnnxModel(made.onnx, outputs).answer(run.heldout_rows)
    assert answer.labels is not None
    assert np.array_equal(answer.labels, run.heldout_predictions)


def test_a_regressor_answers_one_value_per_row() -> None:
    data = dataset("diabetes")
    for estimator in (Ridge(), RandomForestRegressor(5, random_state=0)):
        made = agreed(fresh(data, estimator), data)
        assert made.outputs.names == ("value",)
        assert inspect_onnx(made.onnx).outputs[0].shape == (None, 1)


def test_the_same_estimator_gives_the_same_bytes() -> None:
    data = dataset("wine")
    estimator = fresh(data, GaussianNB())
    first = convert(estimator, data.schema, data.labels, data.task)
    second = convert(estimator, data.schema, data.labels, data.task)
    assert first.onnx == second.onnx
    assert first.versions["skl2onnx"] != "absent"


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (("fan", "pump", "belt"), ("pump", "belt", "fan")),
        ((1, 2, 3), ("1", "2", "3")),
        ((-1, 5, 70), ("70", "-1", "5")),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "network"])
def test_class_names_and_numbers_become_indices_in_the_order_of_the_labels(
    answers: tuple[Any, ...], labels: tuple[str, ...], kind: str
) -> None:
    data = dataset("wine")
    model = LogisticRegression() if kind == "linear" else MLPClassifier((8,), max_iter=2_000, random_state=0)
    said = np.array(answers)[data.y]
    estimator = make_pipeline(StandardScaler(), model).fit(data.x, said)
    made = convert(estimator, data.schema, labels, "classification")
    assert check_parity(estimator, made, parity_rows(data.x, data.schema, estimator)).passed
    found = OnnxModel(made.onnx, made.outputs).answer(data.x)
    assert found.labels is not None
    assert found.scores is not None
    truth = np.array([labels.index(str(s)) for s in said])
    assert (found.labels == truth).mean() > 0.9
    assert np.array_equal(found.scores.argmax(axis=1), found.labels)


def test_binary_decision_values_have_two_columns_with_the_right_sign() -> None:
    data = dataset("cancer")
    for estimator in (make_pipeline(StandardScaler(), LinearSVC()), make_pipeline(StandardScaler(), SVC())):
        fresh(data, estimator)
        made = agreed(estimator, data)
        scores = OnnxModel(made.onnx, made.outputs).answer(data.x).scores
        assert scores is not None
        assert np.allclose(scores[:, 1], estimator.decision_function(data.x), atol=1e-3)
        assert np.allclose(scores[:, 0], -scores[:, 1], atol=1e-3)


def test_scores_that_are_not_per_class_are_left_out() -> None:
    data = dataset("wine")
    one_to_one = fresh(data, make_pipeline(StandardScaler(), SVC(decision_function_shape="ovo")))
    made = agreed(one_to_one, data)
    assert made.outputs.names == ("label",)
    assert made.outputs.score_kind == "none"
    # Its converter takes probabilities where scikit-learn takes decision values; of two classes, the labels are right.
    data = dataset("cancer")
    pairs = fresh(data, OneVsOneClassifier(make_pipeline(StandardScaler(), LogisticRegression())))
    assert agreed(pairs, data).outputs.score_kind == "none"


def test_neighbours_convert_though_their_graph_scans() -> None:
    data = dataset("wine")
    made = agreed(fresh(data, KNeighborsClassifier()), data)
    assert "Scan" in made.requires.ops


def test_histogram_boosting_keeps_gaps_apart() -> None:
    data = dataset("wine")
    x = np.array(data.x)
    x[::7, 2] = x[::5, 0] = np.nan
    holed = from_arrays("holed", x, data.y, data.titles, "y", allow_missing=True)
    estimator = fresh(holed, HistGradientBoostingClassifier(max_iter=15))
    rows = parity_rows(holed.x, holed.schema, estimator)
    assert np.isnan(rows[:, 2]).sum() > np.isnan(x[:, 2]).sum()
    agreed(estimator, holed)


def test_trees_scored_with_gaps_that_no_schema_announced_are_caught_by_parity() -> None:
    data = dataset("wine")
    x = np.array(data.x)
    x[::3, 12] = x[::4, 6] = np.nan
    estimator = RandomForestClassifier(10, random_state=0).fit(x, data.y)
    made = convert(estimator, data.schema, data.labels, data.task)
    report = check_parity(estimator, made, x.astype(np.float32))
    assert not report.passed
    assert report.failures
    with pytest.raises(ConvertError) as caught:
        require(report)
    assert caught.value.code == "convert.parity"


def test_a_drifting_conversion_is_caught_by_parity() -> None:
    data = dataset("wine")
    isotonic = CalibratedClassifierCV(LinearSVC(), method="isotonic")
    estimator = fresh(data, make_pipeline(StandardScaler(), isotonic))
    made = convert(estimator, data.schema, data.labels, data.task)
    assert not check_parity(estimator, made, parity_rows(data.x, data.schema, estimator)).passed


def test_a_wrong_model_is_caught_by_parity() -> None:
    data = dataset("wine")
    estimator = fresh(data, make_pipeline(StandardScaler(), LogisticRegression()))
    other = fresh(data, make_pipeline(StandardScaler(), LogisticRegression(C=0.01)))
    made = convert(other, data.schema, data.labels, data.task)
    report = check_parity(estimator, made, data.x)
    assert not report.passed
    assert report.max_diff > 0.01
    assert len(report.failures) == 10


def test_an_original_that_refuses_rows_its_schema_allows_has_no_parity() -> None:
    data = dataset("wine")
    estimator = fresh(data, GaussianNB())
    features = (Feature(name="a", nullable=True), *data.schema.features[1:])
    schema = FeatureSchema(features=features)
    made = convert(estimator, schema, data.labels, data.task)
    with pytest.raises(ConvertError) as caught:
        check_parity(estimator, made, parity_rows(data.x, schema, estimator))
    assert caught.value.code == "convert.parity"
    assert "NaN" in caught.value.message


def test_a_converter_that_writes_a_graph_which_fails_is_found_out() -> None:
    data = dataset("wine")
    with pytest.raises(ConvertError) as caught:
        convert(fresh(data, OneVsRestClassifier(LinearSVC())), data.schema, data.labels, data.task)
    assert caught.value.code == "convert.failed"


def test_classes_that_do_not_fit_the_labels_are_refused() -> None:
    data = dataset("wine")
    estimator = fresh(data, GaussianNB())
    with pytest.raises(ConvertError, match="knows 3 classes, 2 were named"):
        convert(estimator, data.schema, ("a", "b"), "classification")
    with pytest.raises(ConvertError, match="two or more"):
        convert(estimator, data.schema, (), "classification")


def test_a_conversion_that_takes_too_long_is_stopped_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others convert at the same time
    data = dataset("digits")
    estimator = fresh(data, make_pipeline(QuantileTransformer(n_quantiles=1_000), LogisticRegression()))
    begun = time.monotonic()
    with pytest.raises(ConvertError) as caught:
        convert(estimator, data.schema, data.labels, data.task, seconds=3)
    assert caught.value.code == "convert.timeout"
    assert time.monotonic() - begun < 30  # it would take minutes
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_hangs_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = dataset("wine")
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    monkeypatch.setattr(converter_module, "_command", lambda folder: ["/bin/sh", "-c", script])
    with pytest.raises(ConvertError) as caught:
        convert(fresh(data, GaussianNB()), data.schema, data.labels, data.task, seconds=3)
    assert caught.value.code == "convert.timeout"
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while _alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(grandchild)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Hungry(GaussianNB):  # type: ignore[misc]
    """Asks for eight gigabytes as soon as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (8 << 30,)


def test_a_conversion_that_takes_too_much_memory_is_stopped() -> None:
    data = dataset("wine")
    with pytest.raises(ConvertError) as caught:
        convert(fresh(data, Hungry()), data.schema, data.labels, data.task, memory_mb=256)
    assert caught.value.code == "convert.timeout"
    assert "256 MB" in caught.value.message


class Spinner(GaussianNB):  # type: ignore[misc]
    """Burns processor time for ever as soon as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("[None for _ in iter(int, 1)]",)


def test_processor_time_is_limited_even_where_the_wall_clock_is_generous(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset("wine")
    real = converter_module._run
    monkeypatch.setattr(converter_module, "_run", lambda folder, seconds: real(folder, 60))
    with pytest.raises(ConvertError) as caught:
        convert(fresh(data, Spinner()), data.schema, data.labels, data.task, seconds=3)
    assert caught.value.code == "convert.timeout"


def test_a_model_without_a_converter_is_named_in_one_line_that_says_what_else_to_do() -> None:
    data = dataset("wine")
    with pytest.raises(ConvertError) as caught:
        convert(fresh(data, make_pipeline(StandardScaler(), DummyClassifier())), data.schema, data.labels, data.task)
    assert caught.value.code == "convert.failed"
    assert caught.value.message == "skl2onnx has no converter for sklearn.dummy.DummyClassifier."
    assert "lightship model import" in caught.value.remedy


def test_what_can_not_be_pickled_is_refused_in_words() -> None:
    data = dataset("wine")
    estimator = fresh(data, GaussianNB())
    estimator.secret = lambda: None
    with pytest.raises(ConvertError) as caught:
        convert(estimator, data.schema, data.labels, data.task)
    assert caught.value.code == "convert.failed"
    assert "lambda" in caught.value.remedy


def test_the_child_gets_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = dataset("wine")
    monkeypatch.setenv("LIGHTSHIP_TOKEN", "secret")
    monkeypatch.setattr(converter_module, "_command", lambda folder: ["/bin/sh", "-c", f"env > {tmp_path}/env; exit 9"])
    with pytest.raises(ConvertError, match="status 9"):
        convert(fresh(data, GaussianNB()), data.schema, data.labels, data.task)
    assert "secret" not in (tmp_path / "env").read_text()
    assert os.environ["LIGHTSHIP_TOKEN"] == "secret"


def test_golden_rows_are_the_onnx_models_own_answers_of_every_class_and_far_from_ties() -> None:
    data = dataset("wine")
    estimator = fresh(data, make_pipeline(StandardScaler(), LogisticRegression()))
    made = convert(estimator, data.schema, data.labels, data.task)
    golden = golden_rows(made, data.x, 32)
    inputs, values = golden.inputs.matrix(), golden.values.matrix()
    assert inputs.shape == (32, 13)
    assert set(golden.labels) == {0, 1, 2}
    found = OnnxModel(made.onnx, made.outputs).answer(inputs)
    assert found.scores is not None
    assert np.array_equal(found.scores, values)
    assert tuple(found.labels.tolist() if found.labels is not None else ()) == golden.labels
    best = np.sort(values, axis=1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-3


def test_golden_rows_of_a_regressor_and_of_labels_only() -> None:
    data = dataset("diabetes")
    made = convert(fresh(data, Ridge()), data.schema, (), "regression")
    assert golden_rows(made, data.x, 8).values.matrix().shape == (8, 1)
    wine = dataset("wine")
    labels_only = fresh(wine, make_pipeline(StandardScaler(), SVC(decision_function_shape="ovo")))
    made = convert(labels_only, wine.schema, wine.labels, wine.task)
    golden = golden_rows(made, wine.x, 8)
    assert golden.values.matrix()[:, 0].astype(int).tolist() == list(golden.labels)
