"""Models that somebody made elsewhere: taken in with a device's ends, or refused with what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightship.convert.converter import import_onnx, inspect_onnx
from lightship.convert.parity import check_import, golden_rows, require
from lightship.convert.session import OnnxModel
from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Feature, FeatureSchema

RNG = np.random.default_rng(1)
X = RNG.normal(size=(300, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0.5)
SCHEMA = FeatureSchema(features=tuple(Feature(name=n, low=-3, high=3) for n in "abcd"))
TARGETS = {"": 17, "ai.onnx.ml": 3}


def exported(estimator: Any, **options: Any) -> bytes:
    model = to_onnx(
        estimator,
        initial_types=[("x", FloatTensorType([None, 4]))],
        target_opset=TARGETS,
        options={id(estimator): options} if options else None,
    )
    return bytes(model.SerializeToString())


def graph(
    nodes: list[Any],
    outputs: list[Any],
    constants: list[Any] | None = None,
    shape: Any = ("N", 4),
    kind: int = TensorProto.FLOAT,
) -> bytes:
    entry = helper.make_tensor_value_info("x", kind, list(shape))
    made = helper.make_graph(nodes, "hand-made", [entry], outputs, constants or [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("acme", 1)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString())


def logits(columns: int) -> tuple[list[Any], list[Any]]:
    """x @ W as nodes and constants."""
    weights = numpy_helper.from_array(np.eye(4, columns, dtype=np.float32), "w")
    return [helper.make_node("MatMul", ["x", "w"], ["z"])], [weights]


def out(name: str, kind: int = TensorProto.FLOAT, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape) or None)


def refused(
    data: bytes, schema: FeatureSchema | None = SCHEMA, labels: tuple[str, ...] = ("a", "b", "c")
) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        import_onnx(data, schema, labels)
    return caught.value


def test_an_exported_classifier_is_taken_in_with_class_indices() -> None:
    estimator = LogisticRegression().fit(X, Y)
    made = import_onnx(exported(estimator, zipmap=False), SCHEMA, ("low", "mid", "high"))
    assert made.outputs.labels == ("low", "mid", "high")
    assert made.outputs.score_kind == "probability"
    assert inspect_onnx(made.onnx).inputs[0].name == "features"
    found = OnnxModel(made.onnx, made.outputs).answer(X)
    assert found.labels is not None
    assert np.array_equal(found.labels, estimator.predict(X))
    report = check_import(made, X, Y)
    require(report)
    assert report.metrics["accuracy"] > 0.7
    assert golden_rows(made, X).inputs.rows == 32


@pytest.mark.parametrize("labels", [("pump", "belt", "fan"), ()])
@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("kind", ["linear", "forest", "network"])
def test_class_names_in_any_order_and_dictionaries_become_indices(
    kind: str, zipmap: bool, labels: tuple[str, ...]
) -> None:
    names = np.array(["fan", "pump", "belt"])[Y]
    estimator = {
        "linear": LogisticRegression(),
        "forest": RandomForestClassifier(5, random_state=0),
        "network": MLPClassifier((8,), max_iter=2_000, random_state=0),
    }[kind].fit(X, names)
    made = import_onnx(exported(estimator, zipmap=zipmap), SCHEMA, labels)
    assert made.outputs.labels == (labels or ("belt", "fan", "pump"))
    found = OnnxModel(made.onnx, made.outputs).answer(X)
    assert found.labels is not None
    assert found.scores is not None
    assert [made.outputs.labels[i] for i in found.labels] == estimator.predict(X).tolist()
    assert np.allclose(found.scores.max(axis=1), estimator.predict_proba(X).max(axis=1), atol=1e-5)
    assert np.array_equal(found.scores.argmax(axis=1), found.labels)
    assert "ZipMap" not in made.requires.ops


@pytest.mark.parametrize("kind", ["linear", "network"])
def test_class_numbers_become_indices(kind: str) -> None:
    model = LogisticRegression() if kind == "linear" else MLPClassifier((8,), max_iter=2_000, random_state=0)
    estimator = model.fit(X, Y * 10 + 10)
    made = import_onnx(exported(estimator, zipmap=False), SCHEMA, ("10", "20", "30"))
    found = OnnxModel(made.onnx, made.outputs).answer(X).labels
    assert found is not None
    assert np.array_equal(found * 10 + 10, estimator.predict(X))


def test_scores_alone_make_a_classifier() -> None:
    nodes, constants = logits(3)
    nodes.append(helper.make_node("Softmax", ["z"], ["p"], axis=1))
    made = import_onnx(graph(nodes, [out("p", TensorProto.FLOAT, "N", 3)], constants), SCHEMA, ("a", "b", "c"))
    assert made.outputs.names == ("label", "scores")
    found = OnnxModel(made.onnx, made.outputs).answer(X).labels
    assert found is not None
    assert np.array_equal(found, X[:, :3].argmax(axis=1))


@pytest.mark.parametrize(("squash", "kind"), [(True, "probability"), (False, "score")])
def test_one_score_of_two_classes_gets_its_second_column(squash: bool, kind: str) -> None:
    nodes, constants = logits(1)
    nodes.append(helper.make_node("Sigmoid" if squash else "Identity", ["z"], ["p"]))
    made = import_onnx(graph(nodes, [out("p", TensorProto.FLOAT, "N", 1)], constants), SCHEMA, ("no", "yes"))
    assert made.outputs.score_kind == kind
    found = OnnxModel(made.onnx, made.outputs).answer(X)
    assert found.labels is not None
    assert np.array_equal(found.labels, (X[:, 0] > 0).astype(int))


def test_one_number_and_no_labels_make_a_regressor() -> None:
    estimator = LinearRegression().fit(X, X[:, 0] * 2)
    made = import_onnx(exported(estimator), None)
    assert made.outputs.task == "regression"
    assert made.schema.names == ("f1", "f2", "f3", "f4")
    assert check_import(made, X, X[:, 0] * 2).metrics["mae"] < 1e-4


def test_a_name_that_is_in_the_way_makes_room() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["label"]),  # somebody else's "label"
        helper.make_node("Softmax", ["label"], ["features"], axis=1),  # and "features"
    ]
    made = import_onnx(graph(nodes, [out("features", TensorProto.FLOAT, "N", 4)]), SCHEMA, ("a", "b", "c", "d"))
    found = OnnxModel(made.onnx, made.outputs).answer(X).labels
    assert found is not None
    assert np.array_equal(found, X.argmax(axis=1))


def test_what_the_answers_do_not_need_is_left_out() -> None:
    nodes, constants = logits(3)
    nodes += [helper.make_node("Softmax", ["z"], ["p"], axis=1), helper.make_node("Exp", ["z"], ["unused"])]
    made = import_onnx(graph(nodes, [out("p", TensorProto.FLOAT, "N", 3)], constants), SCHEMA, ("a", "b", "c"))
    assert "Exp" not in made.requires.ops


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x08", bytes(2_000)])
def test_files_that_are_no_model_are_refused(data: bytes) -> None:
    assert refused(data).code == "convert.invalid-onnx"


def test_data_in_another_file_is_refused() -> None:
    nodes, constants = logits(3)
    constants[0].data_location = TensorProto.EXTERNAL
    entry = constants[0].external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    assert "another file" in refused(graph(nodes, [out("z")], constants)).message


def loop() -> list[Any]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Identity", ["v"], ["w_out"])],
        "body",
        [out("i", TensorProto.INT64), out("go", TensorProto.BOOL), out("v")],
        [out("again", TensorProto.BOOL), out("w_out")],
    )
    return [helper.make_node("Loop", ["", "go_in", "x"], ["z"], body=body)]


def test_a_graph_that_loops_for_ever_is_refused_without_being_run() -> None:
    true = numpy_helper.from_array(np.array(True), "go_in")
    error = refused(graph(loop(), [out("z")], [true]))
    assert error.code == "convert.invalid-onnx"
    assert "Loop" in error.message


def test_a_loop_hidden_inside_another_graph_is_found() -> None:
    body = helper.make_graph(loop(), "hidden", [], [out("z")])
    node = helper.make_node("Identity", ["x"], ["z"])
    node.attribute.append(helper.make_attribute("body", body))
    assert "Loop" in refused(graph([node], [out("z")])).message


def test_operators_of_other_domains_are_refused() -> None:
    node = helper.make_node("Teleport", ["x"], ["z"], domain="acme")
    assert "acme" in refused(graph([node], [out("z")])).message


def test_random_answers_are_refused() -> None:
    node = helper.make_node("RandomUniformLike", ["x"], ["z"])
    assert "random" in refused(graph([node], [out("z")])).message


@pytest.mark.parametrize("field", ["ir_version", "opset"])
def test_what_runtimes_of_today_do_not_load_is_refused(field: str) -> None:
    nodes, constants = logits(3)
    model = onnx.load_model_from_string(graph(nodes, [out("z")], constants))
    if field == "ir_version":
        model.ir_version = 99
    else:
        model.opset_import[0].version = 99
    assert "99" in refused(model.SerializeToString()).message


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 4), "fixed to 1 rows"), (("N", 5), "takes 5 features"), (("N", 4, 1), "[rows, features]")],
)
def test_inputs_that_are_not_rows_of_the_schema_are_refused(shape: Any, words: str) -> None:
    node = helper.make_node("Identity", ["x"], ["z"])
    assert words in refused(graph([node], [out("z")], shape=shape)).message


def test_double_inputs_are_refused() -> None:
    estimator = LinearRegression().fit(X, X[:, 0])
    model = to_onnx(estimator, initial_types=[("x", DoubleTensorType([None, 4]))], target_opset=TARGETS)
    error = refused(model.SerializeToString(), labels=())
    assert "float32" in error.message
    assert "FloatTensorType" in error.remedy


def test_two_inputs_are_refused() -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    model = onnx.load_model_from_string(graph(nodes, [out("z")]))
    model.graph.input.append(out("y", TensorProto.FLOAT, "N", 4))
    assert "one input" in refused(model.SerializeToString()).message


def test_an_open_width_needs_a_schema() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["z"], axis=1)]
    data = graph(nodes, [out("z")], shape=("N", "W"))
    assert "schema" in refused(data, None, ()).remedy


def test_labels_that_are_not_the_graphs_are_refused() -> None:
    estimator = LogisticRegression().fit(X, np.array(["fan", "pump", "belt"])[Y])
    data = exported(estimator, zipmap=False)
    assert "belt, fan, pump" in refused(data, labels=("belt", "fan", "motor")).message
    assert "belt, fan, pump" in refused(data, labels=("belt", "fan")).remedy


def test_a_label_that_may_be_number_or_index_is_not_guessed() -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["top"], axis=1, keepdims=0),
        helper.make_node("Mul", ["top", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "one"], ["label"]),
    ]
    constants = [numpy_helper.from_array(np.array([n]), name) for n, name in ((0, "zero"), (1, "one"))]
    data = graph(nodes, [out("label", TensorProto.INT64, "N")], constants)
    error = refused(data, labels=("1", "2", "3"))
    assert "not clearly class indices" in error.message


def test_several_outputs_that_could_be_the_scores_are_refused() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["one"], axis=1), helper.make_node("Exp", ["x"], ["two"])]
    assert "Several outputs" in refused(graph(nodes, [out("one"), out("two")])).message


def test_too_many_scores_for_the_labels_are_refused() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["p"], axis=1)]
    assert "3 scores per row, found 4" in refused(graph(nodes, [out("p")])).message


def test_a_model_that_says_nothing_for_some_rows_does_not_pass() -> None:
    made = import_onnx(graph([helper.make_node("Log", ["x"], ["p"])], [out("p")]), SCHEMA, ("a", "b", "c", "d"))
    report = check_import(made, X, Y)
    assert not report.passed
    assert "NaN" in report.reasons[0]


def test_a_model_whose_answers_depend_on_the_batch_does_not_pass() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"], axis=1),
    ]
    made = import_onnx(graph(nodes, [out("p")]), SCHEMA, ("a", "b", "c", "d"))
    report = check_import(made, X)
    assert not report.passed
    assert "batch" in report.reasons[0]


def test_a_pipeline_is_taken_in_whole() -> None:
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
    model = to_onnx(estimator, initial_types=[("x", FloatTensorType([None, 4]))], target_opset=TARGETS)
    made = import_onnx(model.SerializeToString(), SCHEMA)
    assert made.outputs.labels == ("0", "1", "2")
    assert check_import(made, X, Y).metrics["accuracy"] > 0.7
