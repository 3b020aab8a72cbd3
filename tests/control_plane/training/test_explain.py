"""What a run says of its model's reasons, by SHAP and by LIME, and what happens where they are not installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sqlalchemy import select
from tests.control_plane.things import ACTOR

from lightship.data.dataset import Dataset, from_arrays
from lightship.home import Home
from lightship.registry.datasets import add_dataset
from lightship.registry.pipeline import train_version
from lightship.storage.models import ModelVersion, Run
from lightship.training.explain import Explained, How, explain
from lightship.training.recipe import Recipe, parse_recipe
from lightship.training.train import fit
from lightship_agent.contract.bundle import CARD, read_bundle, read_members
from lightship_agent.contract.codes import TrainError

NAMES = ("nothing", "raises", "lowers", "gaps")


def signal(task: str = "classification", gaps: bool = False) -> Dataset:
    """Truth that rises with one feature, falls half as fast with another, and does not know the rest."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    value = 2 * x[:, 1] - x[:, 2]
    y: Any = np.where(value > 0, "worn", "healthy") if task == "classification" else value
    if gaps:
        x[::3, 3] = np.nan
    labels = ("healthy", "worn") if task == "classification" else None
    return from_arrays("signal", x, y, list(NAMES), "t", task=task, labels=labels, allow_missing=gaps)  # type: ignore[arg-type]


def explained(how: How, data: Dataset, **recipe: Any) -> Explained:
    run = fit(data, Recipe(**recipe))
    return explain(
        how, run.estimator, run.heldout_rows, run.heldout_y, data.schema.names, background=data.x[run.train], seed=1
    )


def test_permutation_is_what_a_recipe_gets_that_does_not_say(fresh_home: Path) -> None:
    found = explained("permutation", signal(), estimator="logistic-regression")

    assert Recipe(estimator="ridge").explain == "permutation"
    assert sum(found.shares.values()) == pytest.approx(1)
    assert "shuffled" in found.method
    assert found.effects == {}


@pytest.mark.parametrize("how", ["shap", "lime"])
def test_a_package_that_is_not_there_is_told_before_anything_is_fitted(
    how: str, fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, how, None)
    home = Home.open(fresh_home)
    try:
        with home.database.read() as session:
            before = len(session.scalars(select(Run)).all())
        with pytest.raises(TrainError) as found:
            train_version(
                home,
                dataset="any",
                recipe=parse_recipe({"estimator": "ridge", "explain": how}),
                model="any",
                actor=ACTOR,
            )
        with home.database.read() as session:
            after = len(session.scalars(select(Run)).all())
    finally:
        home.close()

    assert found.value.code == "train.no-extra"
    assert f"lightship[{how}]" in found.value.remedy
    assert after == before


def test_a_way_to_explain_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TrainError) as found:
        parse_recipe({"estimator": "ridge", "explain": "tea leaves"})

    assert found.value.code == "train.recipe"


@pytest.mark.extras
@pytest.mark.parametrize("how", ["shap", "lime"])
@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("classification", {"estimator": "random-forest", "params": {"n_estimators": 20}}),
        ("classification", {"estimator": "hist-gradient-boosting", "params": {"max_iter": 20}}),
        ("classification", {"estimator": "logistic-regression", "scale": True}),
        ("regression", {"estimator": "hist-gradient-boosting-regressor", "params": {"max_iter": 20}}),
        ("regression", {"estimator": "ridge"}),
    ],
    ids=lambda v: v["estimator"] if isinstance(v, dict) else v,
)
def test_shares_and_directions_are_those_of_the_truth(how: How, task: str, recipe: dict[str, Any]) -> None:
    found = explained(how, signal(task), **recipe)

    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["raises"] > found.shares["lowers"] > 2 * max(found.shares["nothing"], found.shares["gaps"])
    assert found.effects["raises"] > 0.6
    assert found.effects["lowers"] < -0.6
    assert how in found.method.lower()
    trees = how == "shap" and "scale" not in recipe and recipe["estimator"] != "ridge"
    assert found.method.startswith("TreeSHAP") == trees


@pytest.mark.extras
@pytest.mark.parametrize("how", ["shap", "lime"])
def test_the_same_seed_gives_the_same_shares(how: How) -> None:
    data = signal()
    first, second = (explained(how, data, estimator="logistic-regression") for _ in range(2))

    assert first == second


@pytest.mark.extras
def test_gaps_are_read_by_trees_and_left_out_by_surrogates() -> None:
    data = signal(gaps=True)
    trees = explained("shap", data, estimator="hist-gradient-boosting", params={"max_iter": 10})
    surrogate = explained("lime", data, estimator="hist-gradient-boosting", params={"max_iter": 10})

    assert trees.shares["raises"] > 0.4
    assert surrogate.shares["raises"] > 0.4


@pytest.mark.extras
def test_lime_without_a_whole_row_says_so() -> None:
    data = signal()
    x = data.x.copy()
    x[:, 3] = np.nan
    run = fit(signal(gaps=True), Recipe(estimator="hist-gradient-boosting", params={"max_iter": 5}))
    with pytest.raises(TrainError) as found:
        explain("lime", run.estimator, x[:50], data.y[:50], NAMES, background=x[50:], seed=0)

    assert found.value.code == "train.failed"
    assert "without missing values" in str(found.value)


@pytest.mark.extras
def test_more_than_two_classes_have_shares_and_no_direction() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    data = from_arrays("three", x, np.digitize(x[:, 1], [-0.5, 0.5]), list(NAMES), "t")
    found = explained("shap", data, estimator="random-forest", params={"n_estimators": 10})

    assert found.shares["raises"] > 0.7
    assert found.effects == {}


@pytest.mark.extras
@pytest.mark.parametrize(
    ("how", "load", "estimator", "words"),
    [
        ("shap", load_breast_cancer, "random-forest", ("more likely", "less likely")),
        ("lime", load_diabetes, "ridge", ("higher", "lower")),
    ],
)
def test_the_card_says_how_and_which_way_and_the_bundle_carries_the_shares(
    how: str, load: Any, estimator: str, words: tuple[str, str], fresh_home: Path, tmp_path: Path
) -> None:
    raw = load()
    task = "classification" if how == "shap" else "regression"
    y = raw.target_names[raw.target] if how == "shap" else raw.target
    data = from_arrays("real", raw.data, y, [str(n).replace(" ", "_") for n in raw.feature_names], "t", task=task)
    shutil.copytree(fresh_home, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    try:
        add_dataset(home, data, source="real.csv", parent=None, actor=ACTOR)
        recipe = parse_recipe({"estimator": estimator, "explain": how})
        train_version(home, dataset="real", recipe=recipe, model="real", actor=ACTOR)
        with home.database.read() as session:
            version = session.scalars(select(ModelVersion)).one()
        written = home.artifacts.get(version.digest)
    finally:
        home.close()

    bundle = read_bundle(written)
    card = read_members(written)[CARD].decode()
    assert f"Importance: {'TreeSHAP' if how == 'shap' else 'LIME'} (" in card
    assert all(f"| {word} |" in card for word in words)
    assert sum(bundle.manifest.importances.values()) == pytest.approx(1)
