"""Convert: an ONNX model run here as the device will run it - one thread, the CPU provider, the same settings.

Rules: errors of onnxruntime stop at this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Outputs
from lightship_agent.runtime.ort import onnxruntime

_FATAL_ONLY: Final = 4  # onnxruntime's log level: its exceptions are reported, stderr need not say it again


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said: `labels` int64 `[n]`, `scores` float32 `[n, classes]`, `values` float32 `[n]`."""

    labels: npt.NDArray[np.int64] | None = None
    scores: npt.NDArray[np.float32] | None = None
    values: npt.NDArray[np.float32] | None = None

    @property
    def numbers(self) -> npt.NDArray[np.float64] | None:
        """Scores `[n, classes]` or values `[n, 1]`, whichever there are, to compute with."""
        if self.values is not None:
            return self.values.astype(np.float64)[:, None]
        return None if self.scores is None else self.scores.astype(np.float64)


def margins(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Per row of scores `[n, classes]`: how far the best is above the second."""
    best = np.sort(scores, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], dtype=np.float64)


def open_session(data: bytes) -> Any:
    """An onnxruntime session.

    Raises:
        ConvertError: convert.invalid-onnx when the runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _FATAL_ONLY
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions share no base class
        message = f"onnxruntime {onnxruntime.__version__} can't load the model: {str(e)[:500]}"
        raise ConvertError("convert.invalid-onnx", message) from e


def run(session: Any, names: list[str], rows: npt.NDArray[np.float32]) -> list[Any]:
    """The outputs `names` for `rows`, fed to the one input.

    Raises:
        ConvertError: convert.failed when the runtime raises.
    """
    try:
        found: list[Any] = session.run(names, {session.get_inputs()[0].name: rows})
    except Exception as e:  # onnxruntime's exceptions share no base class
        raise ConvertError("convert.failed", f"The ONNX model fails while predicting: {str(e)[:500]}") from e
    return found


class OnnxModel:
    """A converted model that answers.

    Args:
        data: the model's bytes.
        outputs: what its outputs mean.

    Raises:
        ConvertError: convert.invalid-onnx.
    """

    def __init__(self, data: bytes, outputs: Outputs) -> None:
        self._session = open_session(data)
        self._outputs = outputs

    def answer(self, rows: npt.NDArray[np.float32], batch: int = 256) -> Answer:
        """What the model says to `rows` (float32 `[n, width]`), asked in batches of `batch` rows.

        Raises:
            ConvertError: convert.failed.
        """
        names = list(self._outputs.names)
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        pieces = [run(self._session, names, rows[i : i + batch]) for i in range(0, max(len(rows), 1), batch)]
        found = {n: np.concatenate([piece[k] for piece in pieces]) for k, n in enumerate(names)}
        values = found.get(self._outputs.value_output)
        return Answer(
            labels=found.get(self._outputs.label_output),
            scores=found.get(self._outputs.score_output),
            values=None if values is None else values.reshape(len(rows)),
        )

    def predict(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Class indices int64 `[n]`, or values float32 `[n]`: a predict function for evaluation.

        Raises:
            ConvertError: convert.failed.
        """
        answer = self.answer(rows)
        if answer.values is not None:
            return answer.values
        assert answer.labels is not None  # every converted classifier has a label output
        if answer.scores is not None and self._outputs.threshold is not None and len(self._outputs.labels) == 2:
            return (answer.scores[:, 1] >= self._outputs.threshold).astype(np.int64)
        return answer.labels
