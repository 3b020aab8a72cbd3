"""A model in memory answers as onnxruntime does, and is refused when it is not what its manifest says."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tests.agent.conftest import answers, training_rows

from lightship_agent.contract.bundle import Bundle, Golden, Rows
from lightship_agent.contract.codes import BundleError, ServingError, UpdateError
from lightship_agent.contract.manifest import Manifest
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.runtime.golden import check_golden
from lightship_agent.runtime.memory import trim_memory
from lightship_agent.runtime.model import LoadedModel, load_model

Bundles = Callable[..., Bundle]
Models = Callable[..., LoadedModel]


def with_outputs(bundle: Bundle, outputs: Outputs) -> Bundle:
    manifest: Manifest = msgspec.structs.replace(bundle.manifest, outputs=outputs)
    return msgspec.structs.replace(bundle, manifest=manifest)


def test_a_classifier_answers_exactly_as_the_runtime_itself(open_bundle: Bundles) -> None:
    bundle = open_bundle(kind="three-classes")
    rows = training_rows(50)

    found = load_model(bundle).predict(rows)

    expected = answers(bundle.model, rows, bundle.manifest.outputs)
    assert found.labels is not None
    assert found.scores is not None
    assert np.array_equal(found.labels, expected["label"])
    assert np.array_equal(found.scores, expected["probabilities"])
    assert found.values is None
    assert len(found) == 50


def test_a_regressor_answers_one_column(make_model: Models) -> None:
    found = make_model(kind="regressor").predict(training_rows(3))
    assert found.values is not None
    assert found.values.shape == (3, 1)
    assert found.values.dtype == np.float32
    assert found.labels is None


def test_a_row_alone_and_in_a_batch_get_the_same_label_and_all_but_the_same_scores(make_model: Models) -> None:
    model, rows = make_model(), training_rows(64)
    batch = model.predict(rows)
    single = [model.predict(rows[i : i + 1]) for i in range(64)]
    assert batch.labels is not None
    assert batch.scores is not None
    assert batch.labels.tolist() == [one.labels.item() for one in single if one.labels is not None]
    assert np.allclose(
        batch.scores, np.concatenate([one.scores for one in single if one.scores is not None]), atol=1e-6
    )


def test_the_same_rows_always_give_the_same_bits(make_model: Models) -> None:
    model, rows = make_model(), training_rows(64)
    first = model.predict(rows).scores
    assert first is not None
    assert {scores.tobytes() for _ in range(20) if (scores := model.predict(rows).scores) is not None} == {
        first.tobytes()
    }


def test_a_decision_threshold_decides_the_label(open_bundle: Bundles) -> None:
    bundle = open_bundle()
    strict = msgspec.structs.replace(bundle.manifest.outputs, threshold=0.95)
    found = load_model(with_outputs(bundle, strict)).predict(training_rows(200))
    assert found.labels is not None
    assert found.scores is not None
    assert np.array_equal(found.labels, found.scores[:, 1] >= 0.95)


def test_without_a_label_output_the_highest_score_decides(open_bundle: Bundles) -> None:
    bundle = open_bundle(kind="three-classes")
    found = load_model(with_outputs(bundle, msgspec.structs.replace(bundle.manifest.outputs, label_output="")))
    rows = training_rows(40)
    expected = answers(bundle.model, rows, bundle.manifest.outputs)["label"]
    labels = found.predict(rows).labels
    assert labels is not None
    assert labels.tolist() == expected.tolist()


def test_a_loaded_model_can_not_be_changed(make_model: Models) -> None:
    model = make_model()
    with pytest.raises(AttributeError):
        model.version = 9  # type: ignore[misc]


def test_bytes_that_are_no_model_are_refused(open_bundle: Bundles) -> None:
    with pytest.raises(BundleError, match="Not an ONNX file") as refusal:
        load_model(msgspec.structs.replace(open_bundle(), model=b"not onnx"))
    assert refusal.value.code == "bundle.graph"


def test_a_graph_that_this_runtime_can_not_load_is_refused_with_its_words(open_bundle: Bundles) -> None:
    future = open_bundle().model.replace(b"\x10\x11", b"\x10\x7f")  # opset 17 becomes 127
    with pytest.raises(BundleError, match="can't load pump@1") as refusal:
        load_model(msgspec.structs.replace(open_bundle(), model=future))
    assert refusal.value.code == "bundle.incompatible"


@pytest.mark.parametrize(
    "outputs",
    [
        Outputs(task="classification", labels=("a", "b"), label_output="lable"),
        Outputs(task="classification", labels=("a", "b"), label_output="probabilities"),
        Outputs(task="classification", labels=("a", "b"), score_output="label"),
        Outputs(task="classification", labels=("a", "b", "c"), score_output="probabilities"),
        Outputs(task="classification", labels=("a",), label_output="label"),
        Outputs(task="classification", labels=("a", "b")),
        Outputs(task="regression", value_output="probabilities"),
        Outputs(task="regression", value_output="label"),
        Outputs(task="regression"),
    ],
)
def test_a_graph_other_than_its_manifest_is_refused(open_bundle: Bundles, outputs: Outputs) -> None:
    with pytest.raises(BundleError, match="not what the manifest says") as refusal:
        load_model(with_outputs(open_bundle(), outputs))
    assert refusal.value.code == "bundle.incompatible"


@pytest.mark.parametrize(("width", "name"), [(3, "features"), (4, "inputs")])
def test_a_graph_with_another_input_is_refused(open_bundle: Bundles, width: int, name: str) -> None:
    bundle = open_bundle()
    schema = FeatureSchema(features=tuple(Feature(name=f"f{i}") for i in range(width)), input_name=name)
    manifest = msgspec.structs.replace(bundle.manifest, input_schema=schema)
    with pytest.raises(BundleError, match="not what the manifest says"):
        load_model(msgspec.structs.replace(bundle, manifest=manifest))


def test_rows_of_the_wrong_width_are_a_runtime_error_not_a_crash(make_model: Models) -> None:
    with pytest.raises(ServingError, match="failed to predict") as failure:
        make_model().predict(np.zeros((1, 3), np.float32))
    assert failure.value.code == "serving.runtime"


def test_a_class_beyond_the_labels_is_never_served(open_bundle: Bundles) -> None:
    bundle = open_bundle(kind="three-classes")
    two = Outputs(task="classification", labels=("a", "b"), label_output="label")
    row = training_rows(400)[answers(bundle.model, training_rows(400), bundle.manifest.outputs)["label"] == 2][:1]
    golden = Golden(inputs=Rows.of(row), values=bundle.golden.values, labels=(0,))
    with pytest.raises(UpdateError, match="class indices below 2, found 2") as refusal:
        load_model(msgspec.structs.replace(with_outputs(bundle, two), golden=golden))
    assert refusal.value.code == "update.swap"


def test_golden_rows_agree_on_the_machine_that_made_them(open_bundle: Bundles) -> None:
    for kind in ("classifier", "three-classes", "regressor"):
        bundle = open_bundle(kind=kind)
        assert check_golden(load_model(bundle), bundle.golden, 1e-4) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.01, -0.5, float("nan")])
def test_golden_rows_that_differ_are_refused_with_both_numbers(open_bundle: Bundles, shift: float) -> None:
    bundle = open_bundle(golden_shift=shift)
    with pytest.raises(UpdateError, match="Golden row 0: expected .* found .*16 of 16 rows") as refusal:
        check_golden(load_model(bundle), bundle.golden, 1e-4)
    assert refusal.value.code == "update.golden"


def test_another_label_is_refused_unless_the_scores_are_a_tie(open_bundle: Bundles) -> None:
    bundle = open_bundle()
    model = load_model(bundle)
    flipped = tuple(1 - label for label in bundle.golden.labels)
    golden = msgspec.structs.replace(bundle.golden, labels=flipped)
    with pytest.raises(UpdateError, match="expected class"):
        check_golden(model, golden, 1e-4)
    assert check_golden(model, golden, 1.0) < 1e-6  # everything is a tie within 1


def test_a_large_value_is_judged_in_proportion(open_bundle: Bundles) -> None:
    bundle = open_bundle(kind="regressor")
    rows = training_rows(4) * np.float32(1e6)
    model = load_model(bundle)
    values = model.predict(rows).values
    assert values is not None
    golden = Golden(inputs=Rows.of(rows), values=Rows.of(values * np.float32(1 + 5e-5)))
    assert check_golden(model, golden, 1e-4) > 1e-4


def test_memory_can_be_given_back_or_says_it_can_not() -> None:
    assert trim_memory() in (True, False)
