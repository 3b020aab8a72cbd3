"""Convert: the same model in fewer bits: FP16, or INT8 by static quantisation. Its ends stay float32 and int64.

Rules:
* only the standard's own operators come out (QuantizeLinear, DequantizeLinear, Cast): a device loads no others;
* INT8 ranges are measured beforehand, on training rows, and belong to the graph: a row is then answered to the bit
  alike alone and in a batch. Dynamic quantisation, whose scale is that of whatever comes together, is not offered;
* weights have seven bits: with eight, processors without integer dot products overflow, and answer otherwise than
  others;
* a graph that can't gain is refused: trees compare, they do not multiply, and rounding moves rows across thresholds;
* the work is done in the converter's child process, on `ModelProto`s of ours.

Source: onnxruntime, "Quantize ONNX models". Measured with onnxruntime 1.32 on AVX2: in INT8 a network of 30-1024-1024
takes 0.8 of the time for a row and 0.4 for 64 rows, in a quarter of the bytes; one of 30-64-32 takes 2.5 times as long
for a row. FP16 halves the bytes, and the CPU computes as fast as before.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ConvertError

from .half import halve
from .inspection import nodes

Precision = Literal["fp32", "fp16", "int8"]
#: What has weights to multiply with.
GAINING: Final = frozenset({"Conv", "Gemm", "MatMul"})
_THRESHOLDS: Final = "TreeEnsemble"
_BATCH: Final = 64
CALIBRATION_ROWS: Final = 1_024
_CODE: Final = "convert.precision"
_REMEDY: Final = "Leave the precision at fp32, or train a network (mlp)."


def check_gains(model: Any, precision: str) -> None:
    """Refuse a graph that fewer bits do not make smaller.

    Raises:
        ConvertError: convert.precision.
    """
    ops = {n.op_type for n in nodes(model.graph)}
    if any(op.startswith(_THRESHOLDS) for op in ops):
        message = f"{precision}: trees compare and do not multiply; rounding moves rows across their thresholds."
        raise ConvertError(_CODE, message, remedy=_REMEDY)
    if not ops & GAINING:
        message = f"{precision}: the graph has no weights to multiply with ({', '.join(sorted(GAINING))})."
        raise ConvertError(_CODE, message, remedy=_REMEDY)


def check_smaller(before: int, after: int, precision: str) -> None:
    """Refuse a result that has no fewer bytes.

    Raises:
        ConvertError: convert.precision.
    """
    if after >= before:
        message = f"{precision}: expected fewer than {before} bytes, found {after}: the model is too small to gain."
        raise ConvertError(_CODE, message, remedy=_REMEDY)


def to_fp16(model: Any) -> Any:
    """The model with weights, and the arithmetic on them, of 16 bits."""
    halve(model, GAINING)
    return _tidied(model)


def quantisation() -> Any:
    """Onnxruntime's quantiser, after onnxruntime was told to keep what it sees to itself."""
    from lightship_agent.runtime.ort import onnxruntime

    return importlib.import_module(f"{onnxruntime.__name__}.quantization")


def to_int8(model: Any, rows: npt.NDArray[np.float32], folder: Path) -> Any:
    """The model with weights of 7 and activations of 8 bits, their ranges those that `rows` show.

    Args:
        model: the `ModelProto`.
        rows: float32 `[n, width]`, of the kind the model will see; rows with missing values tell nothing.
        folder: for the quantiser's files.
    """
    import onnx

    tool = quantisation()
    whole = rows[np.isfinite(rows).all(axis=1)]
    if not len(whole):
        raise ConvertError(_CODE, "int8: expected rows without missing values to measure ranges on, found none.")
    tool.quantize_static(
        model,
        str(folder / "quantised.onnx"),
        _calibration(model.graph.input[0].name, whole),
        quant_format=tool.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
        op_types_to_quantize=sorted(GAINING),
    )
    return _tidied(onnx.load(folder / "quantised.onnx"))


def _calibration(name: str, rows: npt.NDArray[np.float32]) -> Any:
    class Reader(quantisation().CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Hands out the rows once, some at a time."""

        def __init__(self) -> None:
            self._batches: Iterator[npt.NDArray[np.float32]] = iter(
                [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
            )

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            """The next rows by input; None after the last."""
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def _tidied(model: Any) -> Any:
    """Nothing in it that changes from run to run, or that only the tool needed."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    model.graph.name = "lightship"
    return model
