"""Two real graphs that take tensors: a small convolution net for images, and one of every datatype."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lightship.convert.declared import Declared, Meaning, golden_tensors
from lightship.convert.inspection import describe, parse_onnx
from lightship.registry.runs import Making
from lightship.registry.tensors import tensor_bundle, watched_rows
from lightship_agent.contract.tensors import ImageRules, TensorInput, TensorOutput

Arrays = dict[str, npt.NDArray[Any]]
SIZE = 8
COLOURS = ("blue", "red")
RULES = ImageRules(
    layout="NCHW", resize="stretch", scale=0.00392156862745098, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


@functools.cache
def conv_net() -> bytes:
    """Is an image red or blue? Convolution, ReLU, pooling over the whole, a dense layer, softmax."""
    rng = np.random.default_rng(3)
    kernel = (rng.normal(size=(4, 3, 3, 3)) * 0.1).astype(np.float32)
    kernel[0, 0], kernel[1, 2] = 0.5, 0.5  # one looks for red, one for blue
    dense = np.zeros((4, 2), dtype=np.float32)
    dense[0, 1] = dense[1, 0] = 3.0
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "kernel"], ["seen"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["seen"], ["active"]),
            helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "dense"], ["sums"]),
            helper.make_node("Softmax", ["sums"], ["probabilities"], axis=1),
        ],
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])],
        initializer=[numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(dense, "dense")],
    )
    return _saved(graph)


COLOUR = Declared(
    inputs=(TensorInput(name="image", datatype="FP32", shape=(-1, 3, SIZE, SIZE), image=RULES),),
    outputs=(TensorOutput(name="probabilities", datatype="FP32", shape=(-1, 2)),),
    meaning=Meaning(labels=COLOURS, score_output="probabilities"),
)


def pixels(n: int = 6) -> npt.NDArray[np.uint8]:
    """Noisy images, red and blue in turn; uint8 `[n, 8, 8, 3]`."""
    found = np.random.default_rng(1).integers(0, 90, size=(n, SIZE, SIZE, 3)).astype(np.uint8)
    found[::2, :, :, 0] += 150
    found[1::2, :, :, 2] += 150
    return found


def as_tensor(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the rules say, written another way."""
    return np.ascontiguousarray(((images.astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2))


#: One input and one output of each datatype, and a matrix with a free second dimension.
KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
}  # fmt: skip


@functools.cache
def mirror() -> bytes:
    """Every input comes out again as it came, `in_X` as `out_X`; and the sums of the rows of `in_FP64`."""
    nodes, inputs, outputs = [], [], []
    for name, kind in KINDS.items():
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]))
        inputs.append(helper.make_tensor_value_info(f"in_{name}", kind, ["n", 2] if name != "FP64" else ["n", "m"]))
        outputs.append(helper.make_tensor_value_info(f"out_{name}", kind, ["n", 2] if name != "FP64" else ["n", "m"]))
    nodes.append(helper.make_node("ReduceSum", ["in_FP64", "axis"], ["sums"], keepdims=0))
    outputs.append(helper.make_tensor_value_info("sums", TensorProto.DOUBLE, ["n"]))
    axis = numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")
    return _saved(helper.make_graph(nodes, "mirror", inputs, outputs, initializer=[axis]))


def _shape(name: str) -> tuple[int, ...]:
    return (-1, -1) if name == "FP64" else (-1, 2)


MIRROR = Declared(
    inputs=tuple(TensorInput(name=f"in_{n}", datatype=n, shape=_shape(n)) for n in KINDS),
    outputs=(
        *(TensorOutput(name=f"out_{n}", datatype=n, shape=_shape(n)) for n in KINDS),
        TensorOutput(name="sums", datatype="FP64", shape=(-1,)),
    ),
)


def answered(onnx: bytes, feeds: Arrays) -> Arrays:
    """The tensors that go in, and what onnxruntime itself makes of them."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


def colour_arrays() -> Arrays:
    return answered(conv_net(), {"image": as_tensor(pixels())})


def mirror_arrays() -> Arrays:
    from lightship_agent.contract.tensors import DTYPES

    values = np.array([[0, 1], [1, 1], [1, 0]])
    return answered(mirror(), {f"in_{name}": values.astype(DTYPES[name]) for name in KINDS})


def bundle(
    onnx: bytes, declared: Declared, arrays: Arrays, *, name: str = "eye", version: int = 1, shift: float = 0.0
) -> bytes:
    """The bundle as an import makes it; `shift` makes floating-point golden answers lie."""
    spec = declared.spec
    told = {
        n: a + a.dtype.type(shift) if shift and a.dtype.kind == "f" and any(o.name == n for o in spec.outputs) else a
        for n, a in arrays.items()
    }
    seen = watched_rows(declared, arrays, f"{name}-golden")
    made = Making(
        dataset=seen, model=name, run_id="r", kind="import", estimator_name="onnx:test", started=0, environment={},
        revision="", recipe={}, recipe_digest="", seeds=[],
    )  # fmt: skip
    info = describe(parse_onnx(onnx), len(onnx))
    return tensor_bundle(made, declared, golden_tensors(spec, told), seen, onnx, info, version)


def _saved(graph: Any) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    data: bytes = model.SerializeToString(deterministic=True)
    return data
