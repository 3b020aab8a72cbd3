"""Runs: fitted, judged, explained, described."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, r2_score

from lightship.data.dataset import Dataset, from_arrays
from lightship.training.card import CardFacts, render_card
from lightship.training.environment import capture, code_revision, environment_digest
from lightship.training.explain import importances
from lightship.training.metrics import evaluate, score
from lightship.training.recipe import Recipe
from lightship.training.train import FittedRun, fit
from lightship_agent.contract.codes import TrainError


@pytest.fixture(scope="module")
def wine() -> Dataset:
    raw = load_wine()
    return from_arrays("wine", raw.data, raw.target_names[raw.target], raw.feature_names, "class")


@pytest.fixture(scope="module")
def diabetes() -> Dataset:
    raw = load_diabetes()
    return from_arrays("diabetes", raw.data, raw.target, raw.feature_names, "progress", task="regression")


@pytest.fixture(scope="module")
def run(wine: Dataset) -> FittedRun:
    return fit(wine, Recipe(estimator="logistic-regression", scale=True))


def test_a_run_learns_class_indices_and_is_judged_on_rows_it_has_not_seen(wine: Dataset, run: FittedRun) -> None:
    assert run.estimator.classes_.tolist() == [0, 1, 2]
    assert run.metrics.values["accuracy"] > 0.9
    assert not set(run.train) & set(run.heldout)
    assert np.array_equal(run.heldout_rows, wine.x[run.heldout])
    assert run.dataset_digest == wine.digest


def test_metrics_are_the_ones_everybody_computes(run: FittedRun) -> None:
    precision, recall, f1, support = precision_recall_fscore_support(run.heldout_y, run.heldout_predictions)
    assert [c.precision for c in run.metrics.per_class] == pytest.approx(precision)
    assert [c.recall for c in run.metrics.per_class] == pytest.approx(recall)
    assert [c.f1 for c in run.metrics.per_class] == pytest.approx(f1)
    assert [c.support for c in run.metrics.per_class] == support.tolist()
    assert run.metrics.values["macro_f1"] == pytest.approx(f1.mean())
    assert np.array_equal(run.metrics.confusion, confusion_matrix(run.heldout_y, run.heldout_predictions))


def test_the_same_recipe_on_the_same_data_is_the_same_run(wine: Dataset) -> None:
    recipe = Recipe(estimator="random-forest", params={"n_estimators": 10}, seed=5)
    first, second = fit(wine, recipe), fit(wine, recipe)
    assert np.array_equal(first.heldout_predictions, second.heldout_predictions)
    assert first.recipe_digest == second.recipe_digest
    assert np.array_equal(first.estimator.predict_proba(wine.x), second.estimator.predict_proba(wine.x))


def test_the_clock_is_the_callers_and_progress_is_told(wine: Dataset) -> None:
    ticks = itertools.count(100.0, 10.0)
    said: list[str] = []
    run = fit(wine, Recipe(estimator="gaussian-nb"), progress=said.append, clock=lambda: next(ticks))
    assert (run.started, run.ended, run.seconds) == (100.0, 110.0, 10.0)
    assert len(said) == 2


def test_values_are_judged_by_r2_and_errors(diabetes: Dataset) -> None:
    run = fit(diabetes, Recipe(estimator="ridge", params={"alpha": 0.01}))
    assert run.metrics.values["r2"] == pytest.approx(r2_score(run.heldout_y, run.heldout_predictions), abs=1e-6)
    assert run.metrics.values["mae"] < run.metrics.values["rmse"]
    assert run.metrics.per_class == ()


def test_a_predict_function_is_judged_like_an_estimator(wine: Dataset, run: FittedRun) -> None:
    assert evaluate(run.estimator.predict, wine) == evaluate(run.estimator, wine)
    assert evaluate(lambda rows: np.zeros(len(rows)), wine).values["accuracy"] == pytest.approx(59 / 178)


def test_what_the_estimator_warns_of_is_kept_with_the_run(wine: Dataset) -> None:
    run = fit(wine, Recipe(estimator="mlp", params={"max_iter": 2}, scale=True))
    assert any("ConvergenceWarning" in w for w in run.warnings)


@pytest.mark.parametrize(("estimator", "remedy"), [("random-forest-regressor", "random-forest"), ("ridge", "")])
def test_a_regressor_is_refused_for_classes(wine: Dataset, estimator: str, remedy: str) -> None:
    with pytest.raises(TrainError) as caught:
        fit(wine, Recipe(estimator=estimator))
    assert caught.value.code == "train.recipe"
    assert remedy in caught.value.remedy


def test_a_classifier_is_refused_for_values(diabetes: Dataset) -> None:
    with pytest.raises(TrainError) as caught:
        fit(diabetes, Recipe(estimator="mlp"))
    assert "mlp-regressor" in caught.value.remedy


def test_what_an_estimator_raises_is_kept_in_its_own_words(wine: Dataset) -> None:
    gaps = np.array(wine.x)
    gaps[::5, 2] = np.nan
    holed = from_arrays("holed", gaps, wine.y, wine.titles, "class", allow_missing=True)
    with pytest.raises(TrainError) as caught:
        fit(holed, Recipe(estimator="logistic-regression"))
    assert caught.value.code == "train.failed"
    assert "NaN" in caught.value.message
    assert "impute" in caught.value.remedy
    assert fit(holed, Recipe(estimator="logistic-regression", impute="mean", scale=True)).metrics.rows == 45


def test_a_single_class_can_not_be_learnt() -> None:
    one = from_arrays("one", [[1.0], [2.0], [3.0]], ["a", "a", "a"], ["x"], "t")
    with pytest.raises(TrainError) as caught:
        fit(one, Recipe(estimator="gaussian-nb"))
    assert caught.value.code == "train.failed"
    assert "two classes" in caught.value.message


def test_a_class_without_rows_can_not_be_learnt() -> None:
    named = from_arrays("named", [[1.0], [2.0], [3.0], [4.0]], ["a", "b", "a", "b"], ["x"], "t", labels=("a", "b", "c"))
    with pytest.raises(TrainError, match="No training rows of: c"):
        fit(named, Recipe(estimator="gaussian-nb"))


@pytest.mark.parametrize("predicted", [np.array([0, 1]), np.array([0, 1, 5]), np.array([0, 1, -1])])
def test_answers_that_make_no_sense_are_not_scored(predicted: np.ndarray) -> None:
    with pytest.raises(TrainError):
        score("classification", np.array([0, 1, 1]), predicted, ("a", "b"))


def test_importances_are_shares_and_find_the_feature_that_matters() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    data = from_arrays("signal", x, (x[:, 2] > 0).astype(int), ["a", "b", "c", "d"], "t")
    run = fit(data, Recipe(estimator="logistic-regression"))
    shares = importances(run.estimator, run.heldout_rows, run.heldout_y, data.schema.names)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    assert shares["c"] > 0.9
    assert shares == importances(run.estimator, run.heldout_rows, run.heldout_y, data.schema.names)


def test_importances_of_a_model_that_listens_to_nothing_are_zero(diabetes: Dataset) -> None:
    shares = importances(lambda rows: np.zeros(len(rows)), diabetes.x, diabetes.y, diabetes.schema.names)
    assert set(shares.values()) == {0.0}


def test_explaining_a_wide_model_stays_within_its_budget() -> None:
    asked = 0

    def predict(rows: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(rows)
        return np.zeros(len(rows))

    names = tuple(f"f{j}" for j in range(1_000))
    importances(predict, np.zeros((600, 1_000), np.float32), np.zeros(600, np.int64), names)
    assert asked <= 61_000


def test_the_environment_is_facts_with_a_digest() -> None:
    facts = capture()
    assert facts["scikit-learn"] != "absent"
    assert environment_digest(facts) == environment_digest(dict(reversed(facts.items())))
    assert environment_digest(facts) != environment_digest(facts | {"numpy": "0"})


def test_the_code_revision_outside_of_git_is_unknown(tmp_path: Path) -> None:
    assert code_revision(tmp_path) == "unknown"
    assert code_revision(tmp_path / "absent") == "unknown"


def facts(wine: Dataset, run: FittedRun, **changes: object) -> CardFacts:
    plain = {
        "model": "wine",
        "version": 3,
        "created": "2026-01-01T00:00:00Z",
        "estimator": "logistic-regression",
        "schema": wine.schema,
        "labels": wine.labels,
        "target": "class",
        "metrics": run.metrics,
        "dataset_name": "wine",
        "dataset_digest": wine.digest,
        "dataset_rows": wine.rows,
    }
    return CardFacts(**(plain | changes))  # type: ignore[arg-type]


def test_a_card_holds_what_is_known_and_says_what_is_not(wine: Dataset, run: FittedRun) -> None:
    text = render_card(facts(wine, run, licence="apache-2.0", importances={"alcohol": 0.5}))
    assert text.startswith('---\nlicense: "apache-2.0"\n')
    assert "pipeline_tag: tabular-classification" in text
    assert f"sha256:{wine.digest}" in text
    assert "| class_0 |" in text
    assert "| alcohol |  | 11.03 | 14.83 | no | 0.500 |" in text
    assert "Not stated by the people who trained this model." in text
    assert "Fewer than 30 held-out rows" in text


def test_nothing_in_a_title_breaks_out_of_the_card(wine: Dataset, run: FittedRun) -> None:
    text = render_card(facts(wine, run, dataset_name='evil"\n---\n# owned', target="a | b\n\n# owned"))
    assert text.count("\n---\n") == 1
    assert "\n# owned" not in text


def test_a_card_of_a_regressor_has_no_classes(diabetes: Dataset) -> None:
    run = fit(diabetes, Recipe(estimator="ridge"))
    text = render_card(facts(diabetes, run, labels=(), schema=diabetes.schema))
    assert "tabular-regression" in text
    assert "| class |" not in text
