"""Crash test: small real bundles. A model answers its own version number to a row of zeros, so who answers is known.

Rules: graphs are built node by node, so that each can fail in one way and no other.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lightship_agent.contract.bundle import GOLDEN, MODEL, PROFILE, Golden, Rows, build_bundle, encode_golden
from lightship_agent.contract.manifest import Manifest, Provenance, Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import encode

NAME = "pump"
FEATURES = ("temperature", "vibration", "current", "speed")
#: A row whose first value is this makes a brittle model fail, and no golden row has it.
BRITTLE_AT = 7.0


def build(
    version: int,
    *,
    requires: Requires | None = None,
    golden_shift: float = 0.0,
    ballast_bytes: int = 0,
    brittle: bool = False,
) -> bytes:
    """A bundle's bytes.

    Args:
        version: of the model, and its answer to zeros.
        requires: limits and budgets; the defaults when None.
        golden_shift: how far the golden rows lie.
        ballast_bytes: weights of no use that can't be compressed, for a download that takes its time.
        brittle: answers golden rows, and fails on a row that begins with BRITTLE_AT.
    """
    graph = _graph(version, ballast_bytes, brittle=brittle)
    rows = np.random.default_rng(11).uniform(-1, 1, size=(200, len(FEATURES))).astype(np.float32)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    said = session.run(["value"], {"features": rows[:16]})[0].astype(np.float32)
    manifest = Manifest(
        model=NAME,
        version=version,
        created="2025-01-01T00:00:00Z",
        input_schema=FeatureSchema(features=tuple(Feature(name=n) for n in FEATURES)),
        outputs=Outputs(task="regression", value_output="value"),
        requires=requires or Requires(),
        provenance=Provenance(dataset_digest="0" * 64),
        members={},
    )
    profile = ReferenceProfile(rows=len(rows), features=profile_features(rows, FEATURES))
    golden = Golden(inputs=Rows.of(rows[:16]), values=Rows.of(said + np.float32(golden_shift)))
    return build_bundle(manifest, {MODEL: graph, PROFILE: encode(profile), GOLDEN: encode_golden(golden)})


def _graph(version: int, ballast_bytes: int, *, brittle: bool) -> bytes:
    weights = {"w": np.full((len(FEATURES), 1), 0.5, np.float32), "b": np.array([version], np.float32)}
    nodes = [helper.make_node("MatMul", ["features", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["plain"])]
    last = "plain"
    if ballast_bytes:
        weights["ballast"] = np.random.default_rng(version).normal(size=ballast_bytes // 4).astype(np.float32)
        weights["nothing"] = np.zeros(1, np.float32)
        nodes += [
            helper.make_node("ReduceMean", ["ballast"], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", "nothing"], ["weightless"]),
            helper.make_node("Add", [last, "weightless"], ["loaded"]),
        ]
        last = "loaded"
    if brittle:
        weights |= {"first": np.array([0], np.int64), "shelf": np.zeros(1, np.float32)}
        nodes += [
            helper.make_node("Gather", ["features", "first"], ["x0"], axis=1),
            helper.make_node("Cast", ["x0"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["shelf", "place"], ["taken"], axis=0),
            helper.make_node("Add", [last, "taken"], ["brittle"]),
        ]
        last = "brittle"
    nodes.append(helper.make_node("Identity", [last], ["value"]))
    graph = helper.make_graph(
        nodes,
        "crash-test",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, len(FEATURES)])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data
