"""Runtime: whether a graph takes and gives the tensors that a manifest declares.

Rules:
* every input of the graph is declared, in any order, with its type; no other is;
* a declared dimension that is fixed in the graph has its size, and the rows are free in the graph too.
"""

from __future__ import annotations

from typing import Any, Final

from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.schema import Outputs
from lightship_agent.contract.tensors import TensorInput, TensorOutput, TensorSpec

_TYPES: Final = {
    "BOOL": "tensor(bool)",
    "UINT8": "tensor(uint8)", "UINT16": "tensor(uint16)", "UINT32": "tensor(uint32)", "UINT64": "tensor(uint64)",
    "INT8": "tensor(int8)", "INT16": "tensor(int16)", "INT32": "tensor(int32)", "INT64": "tensor(int64)",
    "FP16": "tensor(float16)", "FP32": "tensor(float)", "FP64": "tensor(double)",
}  # fmt: skip


def check_tensor_graph(session: Any, spec: TensorSpec, outputs: Outputs) -> None:
    """Compare what onnxruntime found in the graph with the manifest.

    Raises:
        BundleError: bundle.incompatible.
    """
    inputs = {i.name: i for i in session.get_inputs()}
    if set(inputs) != {t.name for t in spec.inputs}:
        raise _differs("the inputs", [t.name for t in spec.inputs], list(inputs))
    found = {o.name: o for o in session.get_outputs()}
    told = {t.name: t for t in spec.outputs}
    if not set(told) <= set(found):
        raise _differs("the outputs", list(told), list(found))
    for tensor in spec.inputs:
        _check(inputs[tensor.name], tensor)
    for output in spec.outputs:
        _check(found[output.name], output)
    _check_meaning(told, outputs)


def _check_meaning(told: dict[str, TensorOutput], outputs: Outputs) -> None:
    """What label, scores and value are called are declared outputs of their kind."""
    classes = len(outputs.labels)
    kinds = (
        (outputs.label_output, [("INT64", (-1,))]),
        (outputs.score_output, [("FP32", (-1, classes))]),
        (outputs.value_output, [("FP32", (-1,)), ("FP32", (-1, 1))]),
    )
    for name, wanted in kinds:
        output = told.get(name)
        if name and (output is None or (output.datatype, output.shape) not in wanted):
            what = f"the output {name!r}"
            raise _differs(what, wanted, output)
    if outputs.task == "classification" and (classes < 2 or not (outputs.label_output or outputs.score_output)):
        raise _differs("a classifier", "a label or score output and two or more labels", list(outputs.names))
    if outputs.task == "regression" and outputs.names != (outputs.value_output,):
        raise _differs("a regressor", "one value output", list(outputs.names))
    if outputs.task == "tensors" and (outputs.names or outputs.labels):
        raise _differs("a model of tensors", "no label, score or value output", list(outputs.names))


def _check(found: Any, told: TensorInput | TensorOutput) -> None:
    what = f"the type of {told.name!r}"
    if found.type != _TYPES[told.datatype]:
        raise _differs(what, _TYPES[told.datatype], found.type)
    if not found.shape:
        return  # a graph may leave its shape open
    fits = len(found.shape) == len(told.shape) and all(
        want == -1 or not isinstance(have, int) or have == want
        for have, want in zip(found.shape, told.shape, strict=True)
    )
    if not fits or isinstance(found.shape[0], int):
        what = f"the shape of {told.name!r}"
        raise _differs(what, ["rows", *told.shape[1:]], found.shape)


def _differs(what: str, expected: object, found: object) -> BundleError:
    message = f"The graph is not what the manifest says: {what}: expected {expected}, found {found}."
    return BundleError(
        "bundle.incompatible", message, remedy="Declare what is in the graph, with a free first dimension."
    )
