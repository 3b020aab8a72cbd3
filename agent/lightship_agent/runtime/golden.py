"""Runtime: golden rows, the proof that this CPU computes what the model's makers saw.

Rules:
* the model is asked exactly as it will be asked in service;
* a difference is measured against the larger of 1 and the expected number, so that a regressor of pascals and one
  of millimetres are judged alike;
* another label is accepted only where the expected scores of the two classes are a tie within the tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.bundle import Bundle, Golden
from lightship_agent.contract.codes import ServingError, UpdateError
from lightship_agent.contract.tensors import GoldenTensors

if TYPE_CHECKING:  # which asks us, too
    from .model import LoadedModel

_SHOWN: Final = 16  # numbers of a row


def check_bundle(model: LoadedModel, bundle: Bundle) -> float:
    """Run the golden rows or tensors of the model's bundle; the largest absolute difference.

    Raises:
        UpdateError: update.golden.
    """
    tolerance = bundle.manifest.golden_tolerance
    if bundle.tensors is None:
        return check_golden(model, bundle.golden, tolerance)
    return check_golden_tensors(model, bundle.tensors, tolerance)


def check_golden_tensors(model: LoadedModel, golden: GoldenTensors, tolerance: float) -> float:
    """Run the golden tensors; the largest absolute difference of a floating-point output. Others must be equal.

    Raises:
        UpdateError: update.golden.
    """
    feeds = {array.name: array.array() for array in golden.inputs}
    try:
        found, _ = model.predict_tensors(feeds, [array.name for array in golden.outputs])
    except ServingError as e:
        raise UpdateError("update.golden", f"The golden tensors can't be predicted here: {e}") from e
    largest = 0.0
    for expected in golden.outputs:
        wanted, got = expected.array(), found[expected.name]
        if wanted.dtype.kind == "f" and wanted.size:
            rows = len(wanted)
            shape = (rows, wanted.size // rows)
            if got.shape != wanted.shape:
                message = f"Golden {expected.name!r}: expected {list(wanted.shape)}, found {list(got.shape)}."
                raise UpdateError("update.golden", message)
            largest = max(largest, _compare(got.reshape(shape), wanted.reshape(shape), tolerance))
        elif not np.array_equal(got, wanted):
            raise UpdateError("update.golden", f"Golden {expected.name!r}: expected other values than were found.")
    return largest


def check_golden(model: LoadedModel, golden: Golden, tolerance: float) -> float:
    """Run the golden rows and return the largest absolute difference of a score or value.

    Args:
        model: just loaded.
        golden: inputs and expected outputs.
        tolerance: the difference that is allowed, for numbers up to 1; in proportion above.

    Raises:
        UpdateError: update.golden.
    """
    expected = golden.values.matrix()
    try:
        found = model.predict(golden.inputs.matrix())
    except ServingError as e:
        raise UpdateError("update.golden", f"The golden rows can't be predicted here: {e}") from e
    numbers = found.values if found.values is not None else found.scores
    largest = 0.0
    if numbers is not None:
        largest = _compare(numbers, expected, tolerance)
    if found.labels is not None:
        _compare_labels(found.labels, golden, expected, model.outputs.threshold, tolerance)
    return largest


def _compare(found: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> float:
    if found.shape != expected.shape:
        message = f"Golden rows: expected answers {list(expected.shape)}, found {list(found.shape)}."
        raise UpdateError("update.golden", message)
    wide, wanted = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(wide - wanted)
    # Written so that a NaN on either side is over the limit.
    over = ~(difference <= tolerance * np.maximum(1.0, np.abs(wanted)))
    if over.any():
        row = int(np.nonzero(over)[0][0])
        message = (
            f"Golden row {row}: expected {wanted[row, :_SHOWN].tolist()}, found {wide[row, :_SHOWN].tolist()}; "
            f"{int(over.any(axis=1).sum())} of {len(over)} rows differ by more than {tolerance:g}."
        )
        raise UpdateError("update.golden", message)
    return float(difference.max())


def _compare_labels(
    found: npt.NDArray[np.int64],
    golden: Golden,
    expected: npt.NDArray[np.float32],
    threshold: float | None,
    tolerance: float,
) -> None:
    wanted = np.asarray(golden.labels, dtype=np.int64)
    if wanted.shape != found.shape:
        message = f"Golden rows: expected {len(wanted)} labels, found {len(found)}."
        raise UpdateError("update.golden", message)
    for row in np.nonzero(found != wanted)[0].tolist():
        if not _is_tie(expected[row], int(found[row]), int(wanted[row]), threshold, tolerance):
            message = f"Golden row {row}: expected class {wanted[row]}, found {found[row]}."
            raise UpdateError("update.golden", message)


def _is_tie(
    scores: npt.NDArray[np.float32], found: int, wanted: int, threshold: float | None, tolerance: float
) -> bool:
    if max(found, wanted) >= len(scores):
        return False
    if threshold is not None and len(scores) == 2:
        return bool(abs(scores[1] - threshold) <= tolerance)
    return bool(abs(scores[found] - scores[wanted]) <= 2 * tolerance)
