"""Convert: golden rows - inputs and the ONNX model's own answers, which every device repeats on its CPU.

Rules:
* the answers are the converted model's, not the original's: a device proves that it computes the same graph;
* rows on a tie are not taken, for another CPU may round them to the other side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.bundle import Golden, Rows
from lightship_agent.contract.codes import ConvertError

from .converter import Converted
from .rows import evenly
from .session import OnnxModel, margins


def golden_rows(converted: Converted, rows: npt.NDArray[np.float32], n: int = 32) -> Golden:
    """Rows with the ONNX model's own answers, which every device repeats on its CPU.

    Rows of every class are taken in turn, and none where the two best scores nearly tie: another CPU may round
    them to the other side. A classifier without scores has its class index in `values`.

    Args:
        converted: the model.
        rows: held-out rows, float32 `[m, width]`, m ≥ 1.
        n: how many to take, at most.

    Raises:
        ConvertError: convert.failed when the model fails while predicting, or has no clear answer to any row.
    """
    model = OnnxModel(converted.onnx, converted.outputs)
    answer = model.answer(rows)
    numbers = answer.numbers
    if numbers is None:
        assert answer.labels is not None  # a classifier without scores
        numbers = answer.labels.astype(np.float64)[:, None]
    clear = np.isfinite(numbers).all(axis=1)
    if answer.scores is not None:
        clear &= margins(numbers) > 1e-3
    usable = np.flatnonzero(clear)
    if not len(usable):
        raise ConvertError("convert.failed", f"None of {len(rows)} rows gets a clear answer to keep as golden.")
    chosen = np.sort(_in_turn(usable, answer.labels, n))
    labels = () if answer.labels is None else tuple(int(v) for v in answer.labels[chosen])
    values = numbers[chosen].astype(np.float32)
    return Golden(inputs=Rows.of(np.asarray(rows[chosen], dtype=np.float32)), values=Rows.of(values), labels=labels)


def _in_turn(usable: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None, n: int) -> npt.NDArray[np.int64]:
    if labels is None:
        return usable[evenly(len(usable), n)]
    classes = [usable[labels[usable] == c] for c in np.unique(labels[usable])]
    share = max(1, -(-n // len(classes)))
    taken = [members[evenly(len(members), share)] for members in classes]
    turns = [members[k] for k in range(share) for members in taken if k < len(members)]
    return np.array(turns[:n], dtype=np.int64)
