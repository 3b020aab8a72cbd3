"""Convert: part of a graph in half floats: what multiplies with weights, and what stands between.

Rules:
* pure: a graph in memory is edited, nothing is run;
* what comes before the first weights stays in 32 bits (pressures in pascals do not fit into 16), and so does what makes
  probabilities of the last sums;
* operators keep their order, so that a sorted graph stays sorted.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lightship_agent.contract.codes import ConvertError

from .inspection import nodes

#: What may follow weights in half floats as well.
_BETWEEN: Final = frozenset({"Add", "Elu", "LeakyRelu", "MaxPool", "Mul", "Relu", "Tanh"})
_HALF: Final = "_half"


def halve(model: Any, weighted: frozenset[str]) -> None:
    """Edit `model` in place.

    Args:
        model: the `ModelProto`.
        weighted: the operators that multiply with weights.

    Raises:
        ConvertError: convert.precision when a weight has no place in 16 bits.
    """
    graph = model.graph
    floats = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    made = _region(graph, weighted, set(floats))
    outside = {name for node in nodes(graph) for name in node.input if node.output[0] not in made}
    outside |= {out.name for out in graph.output}
    used: dict[str, Any] = {}
    cast: set[str] = set()
    ordered = []
    for node in list(graph.node):
        if node.output[0] not in made:
            ordered.append(node)
            continue
        for k, name in enumerate(node.input):
            if name in floats:
                used.setdefault(name, _half(floats[name]))
            elif name and name not in made and name not in cast:
                cast.add(name)
                ordered.append(_cast(name, name + _HALF, TensorProto.FLOAT16))
            node.input[k] = name and name + _HALF
        name = node.output[0]
        node.output[0] = name + _HALF
        ordered.append(node)
        if name in outside:
            ordered.append(_cast(name + _HALF, name, TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(ordered)
    kept = [t for t in graph.initializer if t.name not in used or t.name in outside]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *used.values()])


def _region(graph: Any, weighted: frozenset[str], floats: set[str]) -> set[str]:
    """What the operators make that shall compute in half floats."""
    made: set[str] = set()
    for node in graph.node:
        is_first = node.op_type in weighted and any(name in floats for name in node.input)
        follows = node.op_type in _BETWEEN and any(name in made for name in node.input)
        closed = all(name in made or name in floats for name in node.input)
        if not node.domain and len(node.output) == 1 and (is_first or (follows and closed)):
            made.add(node.output[0])
    return made


def _half(tensor: Any) -> Any:
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(tensor).astype(np.float16)
    if not np.isfinite(values).all():
        message = f"fp16: {tensor.name!r} has weights beyond {np.finfo(np.float16).max:g}."
        raise ConvertError("convert.precision", message, remedy="Scale the inputs (`scale`), or stay at fp32.")
    return numpy_helper.from_array(values, tensor.name + _HALF)


def _cast(tensor: str, output: str, kind: int) -> Any:
    return helper.make_node("Cast", [tensor], [output], name=f"{output}_cast", to=kind)
