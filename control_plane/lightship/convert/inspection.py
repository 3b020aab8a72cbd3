"""Convert: what an ONNX file is, and whether a device may load it. Pure: bytes in, facts out, nothing is run.

Rules:
* a model is one file: data kept elsewhere is refused, for it is neither signed nor shipped;
* operators come from the ONNX standard and its classical machine-learning part, nothing else;
* no graph may run for ever: loops and branches on data are refused. `Scan`, whose length is that of its input,
  is allowed only where our own converter wrote it (nearest neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import onnx

from lightship_agent.contract.bundle import MEMBERS, MODEL
from lightship_agent.contract.codes import ConvertError

ML_DOMAIN: Final = "ai.onnx.ml"
DOMAINS: Final = frozenset({"", ML_DOMAIN})
#: What the oldest runtime a bundle asks for by default (1.27) loads.
MAX_IR: Final = 13
MAX_OPSET: Final = 26
MAX_ML_OPSET: Final = 5
#: What our own converter makes.
OWN_IR: Final = 8
OWN_OPSET: Final = 17
OWN_ML_OPSET: Final = 3
INVALID: Final = "convert.invalid-onnx"
_UNBOUNDED: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output: `kind` is "float", "int64", "string" …, or "map" for dictionaries per row.

    In `shape` a free dimension is None; the whole is None where the graph leaves it open.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...] | None


class OnnxInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a graph; sub-graphs count into `ops` and `domains`."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ops: tuple[str, ...]
    domains: tuple[str, ...]
    ir_version: int
    opset: int
    ml_opset: int
    producer: str
    size: int


def inspect_onnx(data: bytes) -> OnnxInfo:
    """The facts about an ONNX model.

    Raises:
        ConvertError: convert.invalid-onnx when it is not one whole model in one file.
    """
    return describe(parse_onnx(data), len(data))


def parse_onnx(data: bytes) -> Any:
    """The `ModelProto` in `data`, checked against the standard.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    if len(data) > MEMBERS[MODEL]:
        raise ConvertError(INVALID, f"Expected at most {MEMBERS[MODEL]} bytes, found {len(data)}.")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as e:  # protobuf's own, which publishes no types
        raise ConvertError(INVALID, f"Not an ONNX file: {e}.") from e
    if not model.graph.node or not model.opset_import:
        raise ConvertError(INVALID, "Not an ONNX model: expected a graph with operators, found none.")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            message = f"Tensor {tensor.name[:60]!r} keeps its data in another file."
            raise ConvertError(
                INVALID, message, remedy="Save the model as a single file (save_as_external_data=False)."
            )
    if model.functions or model.training_info:
        raise ConvertError(
            INVALID,
            "The model defines functions or training steps of its own.",
            remedy="Export it for inference, inlined.",
        )
    return model


def check_standard(model: Any) -> None:
    """Ask the ONNX checker.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as e:
        raise ConvertError(INVALID, f"The ONNX checker refuses the model: {str(e).strip()[:500]}") from e


def describe(model: Any, size: int) -> OnnxInfo:
    """The facts about a parsed model of `size` bytes."""
    constant = {t.name for t in model.graph.initializer}
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    found = list(nodes(model.graph))
    return OnnxInfo(
        inputs=tuple(_tensor(v) for v in model.graph.input if v.name not in constant),
        outputs=tuple(_tensor(v) for v in model.graph.output),
        ops=tuple(sorted({n.op_type for n in found})),
        domains=tuple(sorted({"" if n.domain == "ai.onnx" else n.domain for n in found})),
        ir_version=model.ir_version,
        opset=opsets.get("", 0),
        ml_opset=opsets.get(ML_DOMAIN, 0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        size=size,
    )


def check_device_safe(info: OnnxInfo, *, allow_scan: bool = False) -> None:
    """Refuse what a device must not load.

    Args:
        info: of the model.
        allow_scan: for graphs that our own converter wrote.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    foreign = [d for d in info.domains if d not in DOMAINS]
    if foreign:
        raise ConvertError(
            INVALID,
            f"Operators of foreign domains: {', '.join(foreign)}.",
            remedy="Export with standard operators only.",
        )
    refused = _UNBOUNDED - {"Scan"} if allow_scan else _UNBOUNDED
    bad = [op for op in info.ops if op in refused]
    if bad:
        message = f"Operators that may run for ever or branch on data: {', '.join(bad)}."
        raise ConvertError(INVALID, message, remedy="Export a graph without control flow.")
    chance = [op for op in info.ops if op in _RANDOM]
    if chance:
        raise ConvertError(
            INVALID,
            f"Operators that draw random numbers: {', '.join(chance)}.",
            remedy="Export the model for inference.",
        )
    limits = (
        ("IR version", info.ir_version, MAX_IR),
        ("opset", info.opset, MAX_OPSET),
        (f"{ML_DOMAIN} opset", info.ml_opset, MAX_ML_OPSET),
    )
    for what, found, limit in limits:
        if found > limit:
            remedy = f"Export with opset {OWN_OPSET} and {ML_DOMAIN} {OWN_ML_OPSET}."
            raise ConvertError(INVALID, f"Expected {what} of at most {limit}, found {found}.", remedy=remedy)


def nodes(graph: Any) -> Iterator[Any]:
    """Every node of `graph` and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _tensor(value: Any) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        holds_map = kind == "sequence_type" and value.type.sequence_type.elem_type.WhichOneof("value") == "map_type"
        return Tensor(name=value.name, kind="map" if holds_map or kind == "map_type" else str(kind), shape=None)
    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return Tensor(name=value.name, kind=name, shape=None)
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
    return Tensor(name=value.name, kind=name, shape=shape)
