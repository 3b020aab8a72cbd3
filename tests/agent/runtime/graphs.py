"""Graphs that misbehave, built by hand."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tests.agent.conftest import FEATURES, pack_bundle, training_rows

from lightship_agent.contract.bundle import Golden, Rows
from lightship_agent.contract.manifest import Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Outputs

_FLOAT = TensorProto.FLOAT


def _model(nodes: list[object], initializers: list[object], shape: list[object]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "misbehaving",
        [helper.make_tensor_value_info("features", _FLOAT, [None, 4])],
        [helper.make_tensor_value_info("value", _FLOAT, shape)],
        initializer=initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def looping() -> bytes:
    """Adds 0 to the first column until the heat death of the universe."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "nothing"], ["sum_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", _FLOAT, [None, 1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_on", _FLOAT, [None, 1]),
        ],
        initializer=[numpy_helper.from_array(np.zeros((1, 1), np.float32), "nothing")],
    )
    return _model(
        [
            helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
            helper.make_node("Loop", ["turns", "yes", "start"], ["value"], body=body),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array(2**62, np.int64), "turns"),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
        [None, 1],
    )


def grinding(turns: int = 2_000, size: int = 2_000) -> bytes:
    """Multiplies large matrices for many minutes, by plain operators: no look at the graph gives it away."""
    multiplied = [helper.make_node("MatMul", [f"m{n}", "m0"], [f"m{n + 1}"]) for n in range(turns)]
    return _model(
        [
            helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
            helper.make_node("Expand", ["start", "wide"], ["m0"]),
            *multiplied,
            helper.make_node("ReduceMax", [f"m{turns}"], ["most"], keepdims=1),
            helper.make_node("Add", ["start", "most"], ["value"]),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array([size, size], np.int64), "wide"),
        ],
        [None, 1],
    )


def wading(turns: int = 12, size: int = 1_500) -> bytes:
    """An honest network that takes tens of milliseconds for a row."""
    layers = [helper.make_node("MatMul", [f"h{n}", "weights"], [f"h{n + 1}"]) for n in range(turns)]
    return _model(
        [
            helper.make_node("MatMul", ["features", "first"], ["h0"]),
            *layers,
            helper.make_node("ReduceSum", [f"h{turns}", "axis"], ["value"], keepdims=1),
        ],
        [
            numpy_helper.from_array(np.full((4, size), 1 / size, np.float32), "first"),
            numpy_helper.from_array(np.full((size, size), 1 / size, np.float32), "weights"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
        [None, 1],
    )


def hungry(megabytes: int) -> bytes:
    """Needs a tensor of that size to answer."""
    return _model(
        [
            helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
            helper.make_node("Expand", ["start", "wide"], ["much"]),
            helper.make_node("ReduceMax", ["much"], ["value"], axes=[1], keepdims=1),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array([1, megabytes * 1024 * 256], np.int64), "wide"),
        ],
        [None, 1],
    )


def regressor_bundle(onnx: bytes, requires: Requires) -> bytes:
    """A complete bundle around one of these graphs; its golden rows are never reached."""
    rows = training_rows(8)
    return pack_bundle(
        onnx,
        Outputs(task="regression", value_output="value"),
        Golden(inputs=Rows.of(rows), values=Rows.of(rows[:, :1])),
        ReferenceProfile(rows=8, features=profile_features(rows, FEATURES)),
        requires=requires,
    )
