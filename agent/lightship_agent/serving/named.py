"""Serving: one input per feature, by its name: columns become the rows of the model's one tensor.

Rules:
* a column is `[n]` or `[n, 1]`, and all are equally long; one that is left out is missing in every row;
* a categorical feature comes as words in BYTES and nothing else, read as training read them;
* what is not exactly what the schema asks for is refused, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.categories import category
from lightship_agent.contract.codes import DataError, ServingError
from lightship_agent.contract.schema import Feature, FeatureSchema

if TYPE_CHECKING:
    from .tensors import Tensor


def named_rows(inputs: tuple[Tensor, ...], schema: FeatureSchema) -> npt.NDArray[np.float64]:
    """The rows in the columns `inputs`, float64 `[n, width]`, NaN where a value is missing; checked by nobody yet.

    Raises:
        ServingError: serving.input.
    """
    columns = {tensor.name: tensor for tensor in inputs}
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        names = ", ".join(repr(name) for name in schema.names[:8]) + (" …" if schema.width > 8 else "")
        message = f"No feature {unknown[0][:64]!r}: expected one input {schema.input_name!r}, or one each of {names}."
        raise ServingError("serving.input", message)
    if len(columns) != len(inputs):
        raise ServingError("serving.input", "Expected each input once.")
    rows = inputs[0].shape[0]
    if rows < 1:
        raise ServingError("serving.input", f"Expected at least one row, found {rows}.")
    matrix = np.full((rows, schema.width), np.nan)
    for j, feature in enumerate(schema.features):
        if feature.name in columns:
            matrix[:, j] = _column(columns[feature.name], feature, rows)
    return matrix


def _column(tensor: Tensor, feature: Feature, rows: int) -> npt.NDArray[Any]:
    if tensor.shape not in ((rows,), (rows, 1)) or len(tensor.data) != rows:
        message = f"{tensor.name!r}: expected shape [{rows}] or [{rows}, 1], as the first input has, "
        raise ServingError("serving.input", message + f"found {list(tensor.shape)}.")
    if feature.is_categorical:
        if tensor.datatype != "BYTES":
            message = f"{tensor.name!r} is a category: expected words in BYTES, found {tensor.datatype}."
            raise ServingError("serving.input", message)
        return encoded(feature, [_text(feature, word) for word in tensor.data])
    if not isinstance(tensor.data, np.ndarray):
        raise ServingError("serving.input", f"Expected numbers for {tensor.name!r}, found {tensor.datatype}.")
    return as_float32(tensor.data.ravel())


def encoded(feature: Feature, words: list[str | None]) -> npt.NDArray[np.float32]:
    """The numbers of the texts `words`, float32 `[n]`.

    Raises:
        ServingError: serving.input for a word that is no category, where the schema refuses it.
    """
    try:
        return feature.encode([None if word is None else category(word) for word in words])
    except DataError as e:
        raise ServingError("serving.input", str(e)) from e


def _text(feature: Feature, word: str | bytes | None) -> str | None:
    if not isinstance(word, bytes):
        return word
    try:
        return word.decode()
    except UnicodeDecodeError as e:
        raise ServingError("serving.input", f"{feature.name!r}: expected words in UTF-8: {e}.") from e


def as_float32(data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Numbers as float32: floats are rounded as JSON decimals are, integers must be exact.

    Raises:
        ServingError: serving.input for an integer float32 can't hold.
    """
    if data.dtype == np.float32:
        return data
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and the schema refuses that
        cast = data.astype(np.float32)
    # Compared as float64, which holds every integer up to 2⁵³; beyond it the largest magnitude decides.
    if data.dtype.kind in "iu" and (
        np.any(cast.astype(np.float64) != data.astype(np.float64)) or np.any(np.abs(cast) > 2.0**53)
    ):
        message = "An integer is too large to be exact as float32; send FP32 or FP64 if rounding is meant."
        raise ServingError("serving.input", message)
    return cast
