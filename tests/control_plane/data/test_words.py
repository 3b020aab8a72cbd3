"""Columns of words: what makes one, what is refused, and that a device reads them as training did."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.control_plane.things import ACTOR

from lightship.data.csv_loader import load_csv
from lightship.data.dataset import Dataset, canonical_bytes, concat, parse_dataset
from lightship.data.summary import summarise
from lightship.home import Home
from lightship.registry import versions
from lightship.registry.datasets import add_dataset
from lightship.registry.pipeline import train_version
from lightship.training.recipe import parse_recipe
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import DataError
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.records import answers, request_of

TEXT = "material,load,worn\nsteel,1,no\n brass ,2,yes\niron,3,no\nbrass,4,yes\n"


def load(folder: Path, text: str = TEXT, **options: object) -> Dataset:
    path = folder / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return load_csv(path, name="rows", target="worn", **options)  # type: ignore[arg-type]


def refused(folder: Path, text: str = TEXT, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load(folder, text, **options)
    return caught.value


def test_a_column_of_words_becomes_sorted_categories(tmp_path: Path) -> None:
    made = load(tmp_path)

    material, number = made.schema.features
    assert (material.kind, material.categories, material.unknown) == (
        "categorical",
        ("brass", "iron", "steel"),
        "error",
    )
    assert (material.low, material.high, material.integer) == (None, None, False)
    assert (number.kind, number.low, number.high) == ("numeric", 1.0, 4.0)
    assert made.x[:, 0].tolist() == [2.0, 0.0, 1.0, 0.0]
    assert parse_dataset(canonical_bytes(made)).digest == made.digest


def test_a_column_with_a_single_number_in_it_is_one_of_numbers_with_a_mistake(tmp_path: Path) -> None:
    error = refused(tmp_path, TEXT.replace("iron", "7"))

    assert error.code == "data.type"
    assert "line 2, column 'material': expected a number, found 'steel'" in str(error)


def test_numbers_with_a_comma_are_no_words(tmp_path: Path) -> None:
    error = refused(tmp_path, 'load,worn\n"1,5",no\n"2,5",yes\n')

    assert error.code == "data.type"
    assert "'1,5'" in str(error)


def test_numbers_are_categories_where_the_operator_says_so(tmp_path: Path) -> None:
    made = load(tmp_path, categorical=("load",), unknown="code")

    assert made.schema.features[1].categories == ("1", "2", "3", "4")
    assert made.schema.features[1].unknown_code == 4


def test_a_column_that_is_not_there_is_no_column_of_categories(tmp_path: Path) -> None:
    assert refused(tmp_path, categorical=("colour",)).code == "data.column-missing"


def test_more_than_a_hundred_words_are_no_categories_unless_the_operator_says_so(tmp_path: Path) -> None:
    text = "serial,worn\n" + "".join(f"s{i:03},{'yes' if i % 2 else 'no'}\n" for i in range(101))

    error = refused(tmp_path, text)

    assert (error.code, "found 101" in str(error)) == ("data.category", True)
    assert len(load(tmp_path, text, categorical=("serial",)).schema.features[0].levels) == 101


def test_a_gap_among_words_is_refused_or_allowed_as_one_among_numbers(tmp_path: Path) -> None:
    text = TEXT.replace("iron", "N/A")

    error = refused(tmp_path, text)

    assert (error.code, "line 4, column 'material'" in str(error)) == ("data.missing-value", True)
    made = load(tmp_path, text, allow_missing=True)
    assert made.schema.features[0].nullable
    assert np.isnan(made.x[2, 0])


def test_new_rows_are_read_by_the_models_own_schema(tmp_path: Path) -> None:
    schema = load(tmp_path).schema

    added = load(tmp_path, "worn,load,material\nyes,9,iron\nno,8,iron\n", schema=schema)

    assert added.x[:, 0].tolist() == [1.0, 1.0]
    assert added.schema.features[0] == schema.features[0]


def test_a_word_the_models_schema_does_not_know_is_refused_with_its_line_or_has_its_number(tmp_path: Path) -> None:
    text = "material,load,worn\nwood,9,yes\niron,8,no\n"

    error = refused(tmp_path, text, schema=load(tmp_path).schema)

    assert error.code == "data.category"
    assert "line 2, column 'material': expected one of 3 categories, found 'wood'" in str(error)
    open_schema = load(tmp_path, unknown="code").schema
    assert load(tmp_path, text, schema=open_schema).x[:, 0].tolist() == [3.0, 1.0]


def test_joined_rows_keep_their_words_under_the_first_schemas_numbers(tmp_path: Path) -> None:
    old, new = load(tmp_path), load(tmp_path, "material,load,worn\nsteel,5,no\niron,6,yes\n")

    joined = concat(old, new, "both")

    assert joined.x[:, 0].tolist() == [2.0, 0.0, 1.0, 0.0, 2.0, 1.0]
    with pytest.raises(DataError) as caught:
        concat(old, load(tmp_path, "material,load,worn\nwood,5,no\niron,6,yes\n"), "both")
    assert caught.value.code == "data.category"
    with pytest.raises(DataError) as caught:
        concat(old, load(tmp_path, "material,load,worn\n1,5,no\n2,6,yes\n"), "both")
    assert caught.value.code == "data.type"


def test_a_summary_has_the_words(tmp_path: Path) -> None:
    material, number = summarise(load(tmp_path)).features

    assert (material.categories, material.distinct, number.categories) == (("brass", "iron", "steel"), 3, ())


@pytest.mark.slow
def test_from_words_in_a_file_to_words_on_a_device(fresh_home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    materials, loads = rng.choice(["steel", "brass", "iron"], 300), rng.normal(size=300).round(2)
    worn = ["yes" if (m == "brass") == (x > 0) else "no" for m, x in zip(materials, loads, strict=True)]
    lines = "".join(f"{m},{x},{w}\n" for m, x, w in zip(materials, loads, worn, strict=True))
    dataset = load(tmp_path, f"material,load,worn\n{lines}", unknown="code")
    shutil.copytree(fresh_home, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    try:
        add_dataset(home, dataset, source="rows.csv", parent=None, actor=ACTOR)
        recipe = parse_recipe({"estimator": "random-forest", "params": {"n_estimators": 15}, "gate": {"accuracy": 0.9}})
        train_version(home, dataset="rows", recipe=recipe, model="wear", actor=ACTOR)
        with home.database.read() as session:
            bundle = read_bundle(home.artifacts.get(versions.get(session, "wear", 1).digest))
    finally:
        home.close()
    plane = DataPlane(lambda *_: None)
    plane.install(model := load_model(bundle))

    records = [{"material": f" {m}", "load": float(x)} for m, x in zip(materials, loads, strict=True)]
    said = answers(plane.infer(request_of(records, model)), model.outputs.labels)

    assert np.mean([a["label"] == w for a, w in zip(said, worn, strict=True)]) > 0.95
    assert plane.infer(request_of([{"material": "wood", "load": 1.0}], model)).outputs[0].data[0] in ("yes", "no")
    assert bundle.profile.features[0].categories == ("brass", "iron", "steel")
    assert msgspec.to_builtins(bundle.manifest.input_schema.features[0])["unknown"] == "code"
    assert "3 categories" in bundle.card
