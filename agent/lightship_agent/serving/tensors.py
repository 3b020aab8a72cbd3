"""Serving: requests and answers as named tensors, and what the schema makes of them. It knows no transport.

Rules: what is not exactly what the schema asks for is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import DataError, ServingError
from lightship_agent.contract.schema import FeatureSchema
from lightship_agent.runtime.model import LoadedModel, Prediction

from .named import as_float32, named_rows

MAX_ROWS: Final = 65_536  # per request
MAX_ID: Final = 128  # characters of a client's request id


class Tensor(msgspec.Struct, frozen=True, eq=False):
    """A named tensor: `data` is a flat or shaped array of `datatype`, or for BYTES a list of str, bytes or None."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any


class InferRequest(msgspec.Struct, frozen=True, eq=False):
    """What to predict. No model: the only one. No version: the one that is served. No outputs: all.

    `key` says on whose behalf: where keys are dealt among versions, the same key is always answered by the same one.
    """

    inputs: tuple[Tensor, ...]
    model: str | None = None
    version: str | None = None
    id: str = ""
    outputs: tuple[str, ...] = ()
    key: str = ""
    timeout: float = math.inf  # s


class InferResponse(msgspec.Struct, frozen=True, eq=False):
    """The answer, and in `parameters` the digest of the bundle that gave it."""

    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, str]
    outputs: tuple[Tensor, ...]


def output_names(model: LoadedModel) -> tuple[str, ...]:
    """The tensors a model can answer with: label, class and scores, or value."""
    if model.outputs.task == "regression":
        return ("value",)
    return ("label", "class", "scores") if model.outputs.score_output else ("label", "class")


def claimed_rows(inputs: tuple[Tensor, ...]) -> int:
    """How many rows a refused request meant, as far as can be told and at most `MAX_ROWS`."""
    shape = inputs[0].shape if inputs else ()
    return max(1, min(shape[0], MAX_ROWS)) if len(shape) == 2 or len(inputs) > 1 else 1


def input_rows(inputs: tuple[Tensor, ...], schema: FeatureSchema) -> npt.NDArray[np.float32]:
    """The rows in the one input tensor, or in one input per feature, float32 `[n, width]`, as the schema wants them.

    Raises:
        ServingError: serving.input, serving.too-large.
    """
    if len(inputs) != 1 or inputs[0].name != schema.input_name:
        if inputs and {t.name for t in inputs} & set(schema.names):
            return _checked(named_rows(inputs, schema), schema)
        found = ", ".join(repr(t.name[:64]) for t in inputs[:8])
        message = f"Expected one input {schema.input_name!r}, found {found or 'none'}; or one for each feature."
        raise ServingError("serving.input", message)
    tensor = inputs[0]
    if not isinstance(tensor.data, np.ndarray) or tensor.data.dtype.kind not in "fiub":
        message = f"Expected numbers for {tensor.name!r}, found datatype {tensor.datatype[:16]!r}."
        raise ServingError("serving.input", message)
    width, shape = schema.width, tensor.shape
    rows = shape[0] if len(shape) == 2 else 1
    if shape not in ((rows, width), (width,)) or rows < 1 or tensor.data.size != rows * width:
        message = f"Expected shape [rows, {width}] or [{width}], found {list(shape)} with {tensor.data.size} numbers."
        raise ServingError("serving.input", message)
    return _checked(tensor.data.reshape(rows, width), schema)


def _checked(matrix: npt.NDArray[Any], schema: FeatureSchema) -> npt.NDArray[np.float32]:
    if len(matrix) > MAX_ROWS:
        raise ServingError("serving.too-large", f"Expected at most {MAX_ROWS} rows, found {len(matrix)}.")
    try:
        return schema.check_rows(as_float32(matrix))
    except DataError as e:
        raise ServingError("serving.input", str(e)) from e


def answered(model: LoadedModel, prediction: Prediction, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The tensors of those names, in that order."""
    return tuple(_output(model, prediction, name) for name in names)


def _output(model: LoadedModel, prediction: Prediction, name: str) -> Tensor:
    rows = len(prediction)
    if name == "label":
        assert prediction.labels is not None
        words = model.outputs.labels
        return Tensor(name, "BYTES", (rows,), [words[i] for i in prediction.labels.tolist()])
    if name == "class":
        return Tensor(name, "INT64", (rows,), prediction.labels)
    if name == "scores":
        return Tensor(name, "FP32", (rows, len(model.outputs.labels)), prediction.scores)
    assert prediction.values is not None
    return Tensor(name, "FP32", (rows,), prediction.values.reshape(rows))
