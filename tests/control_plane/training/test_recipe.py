"""Recipes: read strictly, built safely, told what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.base import is_classifier, is_regressor

from lightship.training.recipe import (
    SHORT_NAMES,
    Recipe,
    build_estimator,
    is_tree_model,
    load_recipe,
    parse_recipe,
    recipe_digest,
    resolve_estimator,
)
from lightship_agent.contract.codes import TrainError


def refused(recipe: Recipe) -> TrainError:
    with pytest.raises(TrainError) as caught:
        build_estimator(recipe)
    return caught.value


def test_toml_and_json_say_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('estimator = "mlp"\nscale = true\n[params]\nhidden_layer_sizes = [8]\n')
    (tmp_path / "r.json").write_text('{"scale": true, "params": {"hidden_layer_sizes": [8]}, "estimator": "mlp"}')
    toml, json = load_recipe(tmp_path / "r.toml"), load_recipe(tmp_path / "r.json")
    assert toml == json
    assert recipe_digest(toml) == recipe_digest(json)
    assert recipe_digest(toml) != recipe_digest(Recipe(estimator="mlp"))


@pytest.mark.parametrize(
    "text",
    ["not json", "[]", '{"params": {}}', '{"estimator": "mlp", "sale": true}', '{"estimator": "mlp", "seed": "x"}'],
)
def test_malformed_recipes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(TrainError) as caught:
        load_recipe(tmp_path / "r.json")
    assert caught.value.code == "train.recipe"


@pytest.mark.parametrize(
    "wrong",
    [{"test_share": 0}, {"test_share": 1.0}, {"seed": -1}, {"max_regression": -0.1}, {"gate": {"accuracy": "x"}}],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainError) as caught:
        parse_recipe({"estimator": "mlp"} | wrong)
    assert caught.value.code == "train.recipe"


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        load_recipe(tmp_path / "absent.toml")
    assert caught.value.code == "train.recipe"


@pytest.mark.parametrize("name", sorted(SHORT_NAMES))
def test_every_short_name_is_an_estimator_of_its_kind(name: str) -> None:
    estimator = resolve_estimator(name)()
    regressor = name.endswith("-regressor") or name in ("ridge", "linear-regression", "svr")
    assert is_regressor(estimator) if regressor else is_classifier(estimator)


def test_a_slip_in_the_name_gets_the_nearest_names() -> None:
    error = refused(Recipe(estimator="random-forst"))
    assert error.code == "train.unknown-estimator"
    assert "random-forest" in error.remedy
    assert "RandomForestClassifier" in refused(Recipe(estimator="sklearn.ensemble.RandomForrestClassifier")).remedy


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "sklearn.utils.shuffle", "sklearn.preprocessing.StandardScaler", "x", ""]
)
def test_nothing_but_estimators_of_allowed_packages_is_built(name: str) -> None:
    assert refused(Recipe(estimator=name)).code == "train.unknown-estimator"


def test_another_package_is_allowed_only_by_the_caller() -> None:
    path = "tests_estimators_that_do_not_exist.Model"
    with pytest.raises(TrainError, match="neither a known estimator"):
        resolve_estimator(path)
    with pytest.raises(TrainError, match="There is no"):
        resolve_estimator(path, allow_modules=("tests_estimators_that_do_not_exist",))


def test_wrong_parameters_come_back_in_the_estimators_words_with_its_valid_names() -> None:
    unknown = refused(Recipe(estimator="random-forest", params={"n_trees": 3}))
    assert unknown.code == "train.recipe"
    assert "n_trees" in unknown.message
    assert "n_estimators" in unknown.remedy
    bad = refused(Recipe(estimator="random-forest", params={"n_estimators": -3}))
    assert bad.code == "train.recipe"
    assert "must be an int in the range [1, inf)" in bad.message


@pytest.mark.parametrize("name", [n for n in SHORT_NAMES if is_tree_model(resolve_estimator(n))])
def test_nothing_is_scaled_in_front_of_trees(name: str) -> None:
    error = refused(Recipe(estimator=name, scale=True))
    assert error.code == "train.recipe"
    assert "scale" in error.remedy


def test_the_trees_among_the_short_names_are_known() -> None:
    trees = {n for n in SHORT_NAMES if is_tree_model(resolve_estimator(n))}
    assert trees == {n for n in SHORT_NAMES if any(w in n for w in ("tree", "forest", "boosting"))}


def test_steps_and_seed_follow_the_recipe() -> None:
    model = build_estimator(Recipe(estimator="mlp", scale=True, impute="median", seed=7))
    assert [name for name, _ in model.steps] == ["impute", "scale", "model"]
    assert model.get_params()["model__random_state"] == 7
    own = build_estimator(Recipe(estimator="mlp", params={"random_state": 3}, seed=7))
    assert own.random_state == 3
