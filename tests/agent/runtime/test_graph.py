"""What is in a model file, read from its bytes: everything our converter makes passes, and nothing that could harm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    PolynomialFeatures,
    StandardScaler,
)

from lightship.convert.convert_child import convert_estimator
from lightship.convert.inspection import describe, nodes, parse_onnx
from lightship.training.recipe import SHORT_NAMES, Recipe, build_estimator
from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.runtime import graph as rooms
from lightship_agent.runtime.graph import GraphFacts, check_graph, read_graph

from .graphs import grinding, hungry, looping

FLOAT = TensorProto.FLOAT
BUDGET = 64 << 20
RNG = np.random.default_rng(3)
X = RNG.normal(size=(240, 4)).astype(np.float32)
SCHEMA = FeatureSchema(features=tuple(Feature(name=n, low=-3, high=3) for n in "abcd"))


def entry(name: str = "x", *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, FLOAT, list(shape) or ["N", 4])


def model(
    nodes: list[Any], *, constants: list[Any] | None = None, opsets: dict[str, int] | None = None, **more: Any
) -> bytes:
    """A model of those nodes, from x to y."""
    made = helper.make_graph(nodes, "hand-made", [entry()], [entry("y")], constants or [])
    imports = [helper.make_opsetid(d, v) for d, v in (opsets or {"": 17, "ai.onnx.ml": 3}).items()]
    return bytes(helper.make_model(made, opset_imports=imports, ir_version=8, **more).SerializeToString())


def relu() -> Any:
    return helper.make_node("Relu", ["x"], ["y"])


def inner(*nodes: Any) -> Any:
    return helper.make_graph(list(nodes) or [relu()], "inner", [entry()], [entry("y")])


def tensor(**changes: Any) -> Any:
    made = numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    for name, value in changes.items():
        if name == "dims":
            del made.dims[:]
            made.dims.extend(value)
        else:
            setattr(made, name, value)
    return made


def refusal(data: bytes, budget: int = BUDGET) -> str:
    with pytest.raises(BundleError) as caught:
        check_graph(data, max_bytes=budget)
    assert caught.value.code == "bundle.graph"
    return caught.value.message


def agrees(facts: GraphFacts, data: bytes) -> None:
    """What we read is what the ONNX library reads."""
    seen = onnx.load_model_from_string(data)
    found = {("" if n.domain == "ai.onnx" else n.domain, n.op_type) for n in nodes(seen.graph)}
    assert {(o.domain, o.name) for o in facts.operators} == found
    assert facts.nodes == len(list(nodes(seen.graph)))
    assert facts.opsets == {("" if o.domain == "ai.onnx" else o.domain): o.version for o in seen.opset_import}
    assert facts.ir_version == seen.ir_version


# What is let through --------------------------------------------------------------------------------------------------


def converted(estimator: Any, task: str) -> bytes:
    labels = ("a", "b", "c") if task == "classification" else ()
    made, _ = convert_estimator(estimator, SCHEMA, labels, task)
    return bytes(made.SerializeToString(deterministic=True))


@pytest.mark.filterwarnings("ignore")  # libraries about each other
@pytest.mark.parametrize("name", sorted(SHORT_NAMES))
def test_every_estimator_of_a_recipe_passes_once_converted(name: str) -> None:
    regressor = name.endswith(("regressor", "regression", "ridge", "svr")) and name != "logistic-regression"
    target = X[:, 0] - X[:, 1] if regressor else np.digitize(X[:, 0], [-0.5, 0.5])
    estimator = build_estimator(Recipe(estimator=name)).fit(X, target)

    data = converted(estimator, "regression" if regressor else "classification")

    agrees(check_graph(data, max_bytes=BUDGET), data)


@pytest.mark.parametrize(
    "first",
    [
        StandardScaler(),
        MinMaxScaler(),
        Normalizer(),
        PolynomialFeatures(2),
        SimpleImputer(),
        KBinsDiscretizer(4, encode="onehot-dense", quantile_method="averaged_inverted_cdf"),
        ColumnTransformer([("a", MinMaxScaler(), [0, 1]), ("b", "passthrough", [2, 3])]),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_prepares_rows_passes_too(first: Any) -> None:
    estimator = make_pipeline(first, LogisticRegression()).fit(X, np.digitize(X[:, 0], [-0.5, 0.5]))
    data = converted(estimator, "classification")
    agrees(check_graph(data, max_bytes=BUDGET), data)


def test_categories_as_numbers_pass() -> None:
    rows = np.round(X)
    estimator = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    estimator.fit(rows, np.digitize(X[:, 0], [-0.5, 0.5]))
    data = converted(estimator, "classification")
    agrees(check_graph(data, max_bytes=BUDGET), data)


def convolutional() -> bytes:
    weights = [
        numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name)
        for name, shape in {"k": (8, 1, 3), "s": (8,), "w": (16, 3), "b": (3,)}.items()
    ]
    return model(
        [
            helper.make_node("Unsqueeze", ["x", "axis"], ["wide"]),
            helper.make_node("Conv", ["wide", "k", "s"], ["c"], kernel_shape=[3], pads=[1, 1]),
            helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["n"]),
            helper.make_node("Relu", ["n"], ["r"]),
            helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2], strides=[2]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["z"]),
            helper.make_node("Softmax", ["z"], ["y"]),
        ],
        constants=[*weights, numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )


def test_networks_made_elsewhere_pass() -> None:
    for data in (convolutional(), model([relu()]), grinding(3, 8), hungry(1)):
        agrees(check_graph(data, max_bytes=BUDGET), data)


def test_a_quantised_network_of_standard_operators_passes() -> None:
    data = model(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
            helper.make_node("Mul", ["f", "s"], ["y"]),
        ],
        constants=[numpy_helper.from_array(np.ones((4, 3), np.int8), "w")],
    )
    assert check_graph(data, max_bytes=BUDGET).tensor_bytes == 12


def test_every_payload_a_tensor_can_have_is_counted() -> None:
    kinds = [np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_, np.float16, np.complex64]
    arrays: list[Any] = [np.ones((3, 5), kind) for kind in kinds]
    raw = [numpy_helper.from_array(a, f"raw{i}") for i, a in enumerate(arrays)]
    typed = [
        helper.make_tensor(f"typed{i}", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.ravel().tolist())
        for i, a in enumerate(arrays)
    ]
    texts = helper.make_tensor("texts", TensorProto.STRING, [40], [f"label {i}" for i in range(40)])
    small = helper.make_tensor("small", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    scalar, empty = numpy_helper.from_array(np.float32(1), "s"), numpy_helper.from_array(np.zeros((0, 3)), "e")
    data = model([relu()], constants=[*raw, *typed, texts, small, scalar, empty])

    facts = check_graph(data, max_bytes=BUDGET)

    assert facts.tensors == len(kinds) * 2 + 4
    assert facts.tensor_bytes == 2 * sum(a.nbytes for a in arrays) + len("label 0") * 40 + 30 + 3 + 4


def test_a_scan_as_nearest_neighbours_have_it_passes_and_one_inside_another_does_not() -> None:
    scan = helper.make_node("Scan", ["x"], ["y"], body=inner(), num_scan_inputs=1)
    assert check_graph(model([scan]), max_bytes=BUDGET).depth == 2
    nested = helper.make_node("Scan", ["x"], ["y"], body=inner(scan), num_scan_inputs=1)
    assert "Scan inside a Scan" in refusal(model([nested]))


# What is not ----------------------------------------------------------------------------------------------------------


def function(domain: str) -> bytes:
    made = onnx.load_model_from_string(model([helper.make_node("Twice", ["x"], ["y"], domain=domain)]))
    made.functions.append(helper.make_function(domain, "Twice", ["x"], ["y"], [relu()], [helper.make_opsetid("", 17)]))
    return bytes(made.SerializeToString())


def sparse() -> Any:
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    return helper.make_sparse_tensor(values, indices, [1 << 20, 1 << 20])


def with_sparse() -> bytes:
    made = onnx.load_model_from_string(model([relu()]))
    made.graph.sparse_initializer.append(sparse())
    return bytes(made.SerializeToString())


def with_training() -> bytes:
    made = onnx.load_model_from_string(model([relu()]))
    made.training_info.add().algorithm.CopyFrom(inner())
    return bytes(made.SerializeToString())


def external(location: str) -> Any:
    made = tensor(data_location=TensorProto.EXTERNAL)
    made.ClearField("raw_data")
    made.external_data.add(key="location", value=location)
    return made


def tree(**lists: list[int]) -> bytes:
    """A tree of three nodes that splits once, with other lists where they are given."""
    plain = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0], "target_ids": [0, 0],
        "target_nodeids": [1, 2], "target_treeids": [0, 0],
    }  # fmt: skip
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0], target_weights=[1.0, 2.0], n_targets=1, **{**plain, **lists},
    )  # fmt: skip
    return model([node])


def deep(levels: int) -> bytes:
    body = inner()
    for _ in range(levels):
        body = inner(helper.make_node("Identity", ["x"], ["y"], body=body))
    return model([helper.make_node("Identity", ["x"], ["y"], body=body)])


def segmented() -> bytes:
    made = tensor()
    made.segment.begin, made.segment.end = 0, 1
    return model([relu()], constants=[made])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a loop": (looping, "run for ever"),
    "a branch": (
        lambda: model([helper.make_node("If", ["x"], ["y"], then_branch=inner(), else_branch=inner())]),
        "branch on data",
    ),
    "a map over a sequence": (lambda: model([helper.make_node("SequenceMap", ["x"], ["y"], body=inner())]), "for ever"),
    "a loop in the body of a scan": (
        lambda: model(
            [helper.make_node("Scan", ["x"], ["y"], body=inner(helper.make_node("Loop", ["x"], ["y"], body=inner())))]
        ),
        "run for ever",
    ),
    "a loop in an attribute nobody asked for": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"], odd=inner(helper.make_node("Loop", ["x"], ["y"])))]),
        "run for ever",
    ),
    "a loop under the standard domain's other name": (
        lambda: model([helper.make_node("Loop", ["x"], ["y"], domain="ai.onnx", body=inner())]),
        "run for ever",
    ),
    "a foreign domain": (
        lambda: model([helper.make_node("Backdoor", ["x"], ["y"], domain="acme")], opsets={"": 17, "acme": 1}),
        "foreign domain: acme",
    ),
    "the runtime's own operators": (
        lambda: model([helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")]),
        "com.microsoft",
    ),
    "a foreign domain that is only announced": (lambda: model([relu()], opsets={"": 17, "acme": 1}), "acme"),
    "chance": (lambda: model([helper.make_node("RandomNormal", [], ["y"], shape=[1, 4])]), "RandomNormal"),
    "an operator nobody knows": (lambda: model([helper.make_node("Reluu", ["x"], ["y"])]), "Reluu"),
    "an image decoder": (lambda: model([helper.make_node("ImageDecoder", ["x"], ["y"])]), "ImageDecoder"),
    "a function of a foreign domain": (lambda: function("acme"), "acme"),
    "a function of the standard domain": (lambda: function(""), "Twice"),
    "training steps": (with_training, "training"),
    "a sparse constant": (with_sparse, "sparse"),
    "a sparse attribute": (
        lambda: model([helper.make_node("Constant", [], ["y"], sparse_value=sparse())]),
        "sparse",
    ),
    "data in a file above": (lambda: model([relu()], constants=[external("../../../etc/shadow")]), "another file"),
    "data in /proc": (lambda: model([relu()], constants=[external("/proc/self/environ")]), "another file"),
    "data elsewhere without a place": (
        lambda: model([relu()], constants=[tensor(data_location=TensorProto.EXTERNAL)]),
        "another file",
    ),
    "an attribute's data elsewhere": (
        lambda: model([helper.make_node("Constant", [], ["y"], value=external("weights"))]),
        "another file",
    ),
    "data in pieces": (segmented, "another file"),
    "a giant": (lambda: model([relu()], constants=[tensor(dims=[1 << 20, 1 << 20])]), "elements"),
    "a giant without a byte": (
        lambda: model([relu()], constants=[tensor(dims=[1 << 62, 1], raw_data=b"")]),
        "elements",
    ),
    "a giant beyond numbers": (lambda: model([relu()], constants=[tensor(dims=[1 << 62, 1 << 62])]), "numbers"),
    "a giant attribute": (
        lambda: model([helper.make_node("Constant", [], ["y"], value=tensor(dims=[1 << 30]))]),
        "elements",
    ),
    "a dwarf": (lambda: model([relu()], constants=[tensor(dims=[1])]), "elements"),
    "a negative dimension": (lambda: model([relu()], constants=[tensor(dims=[-2, -2])]), "negative"),
    "a tensor of no type": (lambda: model([relu()], constants=[tensor(data_type=99)]), "type 99"),
    "a negative feature": (lambda: tree(nodes_featureids=[-1, 0, 0]), "nodes_featureids"),
    "a negative feature far down a long list": (
        lambda: tree(nodes_featureids=[0] * 5_000 + [-(2**40)] + [0] * 5_000),
        "nodes_featureids",
    ),
    "a negative child": (lambda: tree(nodes_truenodeids=[-1, 0, 0]), "nodes_truenodeids"),
    "too deep": (lambda: deep(6), "deep"),
    "nothing": (lambda: b"", "expected a model"),
    "no operators": (lambda: model([]), "expected a graph with operators"),
    "text": (lambda: b"this is a text", "Not an ONNX file"),
    "a pickle": (lambda: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.", "ONNX"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_device_loads_is_refused_with_its_reason(what: str) -> None:
    make, said = REFUSED[what]
    assert said in refusal(make())


def test_weights_beyond_the_memory_budget_are_refused() -> None:
    weights = numpy_helper.from_array(np.zeros((512, 512), np.float32), "w")
    data = model([relu()], constants=[weights])
    assert check_graph(data, max_bytes=1 << 20).tensor_bytes == 1 << 20
    assert "more than 1048575 bytes" in refusal(data, (1 << 20) - 1)


def test_more_records_than_anybody_needs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_NODES", 10)
    chain = [helper.make_node("Relu", ["x" if not i else f"r{i}"], [f"r{i + 1}"]) for i in range(11)]
    assert "more than 10 operators" in refusal(model(chain))
    monkeypatch.setattr(rooms, "MAX_FIELDS", 20)
    assert "more than 20 records" in refusal(model(chain))


# The wire format ------------------------------------------------------------------------------------------------------

GOOD = model([relu()])
GRAPH_AT = GOOD.index(b"\x3a")  # the tag of ModelProto.graph


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b"\x3a\x00", "there twice"),  # a second graph: protobuf would merge the two
        (b"\x0b\x0c", "wire type 3"),  # a group
        (b"\x0e", "wire type 6"),
        (b"\x00\x00", "no field has the number 0"),
        (b"\x80\x80\x80\x80\x80\x01\x00", "no field has the number"),
        (b"\xb2\x06\x85\x00hello", "overlong"),
        (b"\xb2\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "cut off"),
        (b"\xb2\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "no end"),
        (b"\xb0\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", "overlong"),
        (b"\xb2\x06\x20short", "cut off"),
        (b"\xb5\x06\x00", "cut off"),
        (b"\xb1\x06\x00\x00", "cut off"),
        (b"\x80", "cut off"),
        (b"\x38\x01", "no content"),  # a graph that is a number
        (b"\x0a\x01\x08", "no number"),  # an IR version that is a message
        (b"\x42\x02\x10\x12", "different opsets"),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(tail: bytes, said: str) -> None:
    data = GOOD[:GRAPH_AT] + tail if said in ("no content", "no number") else GOOD + tail
    if said == "no number":
        data = tail
    assert said in refusal(data)


def test_fields_of_a_later_standard_are_stepped_over() -> None:
    assert check_graph(GOOD + b"\xb2\x06\x05hello\xb0\x06\x07", max_bytes=BUDGET) == check_graph(GOOD, max_bytes=BUDGET)


@given(st.binary(max_size=400))
def test_no_bytes_bring_about_another_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        read_graph(data, max_bytes=BUDGET)


SEEDS = (GOOD, tree(), convolutional(), looping(), model([relu()], constants=[external("a"), tensor()]), deep(2))


@settings(max_examples=400)
@given(st.sampled_from(SEEDS), st.data())
def test_what_is_read_is_what_the_onnx_library_reads_or_it_is_refused(seed: bytes, data: st.DataObject) -> None:
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[at] = data.draw(st.integers(0, 255))
        else:
            changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        facts = read_graph(bytes(changed), max_bytes=BUDGET)
    except BundleError:
        return
    try:
        onnx.load_model_from_string(bytes(changed))
    except Exception:
        return  # protobuf refuses what nobody looked at, such as a name that is not UTF-8
    agrees(facts, bytes(changed))


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([0, 1, 63, 64, 127, 128, 300, 2**21, 2**40, 2**62, -1, -(2**63)]), max_size=300),
    st.lists(st.sampled_from(["", "LEAF", "BRANCH_LEQ", "J\x01", "JJ\x03J\x02", "x" * 40]), max_size=100),
    st.lists(st.floats(width=32), max_size=100),
    st.booleans(),
)
def test_long_lists_are_stepped_over_as_a_whole_without_missing_a_thing(
    numbers: list[int], texts: list[str], floats: list[float], packed: bool
) -> None:
    attributes: dict[str, Any] = {}
    if texts:
        attributes["nodes_modes"] = texts
    if floats:
        attributes["nodes_values"] = floats
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **attributes)
    body = b"".join(varint(n) for n in numbers)
    ints = b"\x42" + varint(len(body)) + body if packed else b"".join(b"\x40" + varint(n) for n in numbers)
    attribute = b"\x0a\x10nodes_featureids" + ints
    raw = node.SerializeToString() + b"\x2a" + varint(len(attribute)) + attribute
    graph_bytes = b"\x0a" + varint(len(raw)) + raw + inner().SerializeToString()
    data = b"\x08\x08\x3a" + varint(len(graph_bytes)) + graph_bytes + b"\x42\x04\x0a\x00\x10\x11"

    if any(n < 0 for n in numbers):
        assert "nodes_featureids" in refusal(data)
    else:
        agrees(check_graph(data, max_bytes=BUDGET), data)


def test_a_forest_of_five_megabytes_takes_milliseconds() -> None:
    rows = RNG.normal(size=(6_000, 8)).astype(np.float32)
    schema = FeatureSchema(features=tuple(Feature(name=f"f{i}", low=-3, high=3) for i in range(8)))
    forest = RandomForestClassifier(60, random_state=0).fit(rows, (RNG.normal(size=6_000) > 0).astype(int))
    made, _ = convert_estimator(forest, schema, ("a", "b"), "classification")
    data = bytes(made.SerializeToString())
    assert len(data) > 4 << 20
    took = []
    for _ in range(7):
        begun = time.process_time()
        facts = check_graph(data, max_bytes=BUDGET)
        took.append(time.process_time() - begun)
    agrees(facts, data)
    assert min(took) < 0.06  # 8 ms of CPU on the machine it was written on
    assert describe(parse_onnx(data), len(data)).ops == tuple(sorted(o.name for o in facts.operators))
