"""Convert: from a graph as it came to the ends every device expects, by looking at what it answers.

Rules:
* shapes are believed when they are seen: the graph is run on a few rows, and the declared shapes are ignored;
* a label is a class index when we are done, whatever the graph said before: names and other numbers are mapped;
* two-class scores have two columns; a decision value s becomes (-s, s), a probability p becomes (1 - p, p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import FeatureSchema, Outputs

from .graph import LABEL, SCORES, VALUE, Editor
from .session import open_session, run

ScoreKind = Literal["probability", "score", "none"]
Keys = tuple[str, ...] | tuple[int, ...]
PROBE_ROWS = 64


def probe_rows(schema: FeatureSchema, seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows to look at a graph with: the lowest, the highest, and others between; float32 `[PROBE_ROWS, width]`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    ranges = [(-3.0 if f.low is None else f.low, 3.0 if f.high is None else f.high) for f in schema.features]
    words = [j for j, f in enumerate(schema.features) if f.is_categorical]
    for j in words:
        ranges[j] = (0.0, len(schema.features[j].levels) - 1.0)
    low, high = np.array(ranges).T
    rows = low + (high - low) * rng.random((PROBE_ROWS, schema.width))
    rows[0], rows[1] = low, high
    rows[:, words] = np.round(rows[:, words])
    return np.asarray(rows, dtype=np.float32)


def look(model: Any, names: Sequence[str], rows: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """What the graph's outputs `names` are for `rows`.

    Raises:
        ConvertError: convert.invalid-onnx, convert.failed.
    """
    found = run(open_session(model.SerializeToString()), list(names), rows)
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def settle_regressor(editor: Editor, schema: FeatureSchema, value: str, seen: npt.NDArray[Any]) -> Outputs:
    """End in `value`, float32 `[N, 1]`.

    Raises:
        ConvertError: convert.failed when the output is not one number per row.
    """
    if seen.dtype.kind not in "fi" or seen.size != len(seen):
        message = f"Expected one number per row, found {seen.dtype} {list(seen.shape)}."
        raise ConvertError("convert.failed", message)
    if seen.dtype != np.float32:
        value = editor.cast(value, TensorProto.FLOAT)
    if seen.ndim != 2:
        value = editor.node("Reshape", [value, editor.integers([-1, 1])])
    outputs = Outputs(task="regression", value_output=VALUE)
    editor.settle(schema.input_name, schema.width, {VALUE: value}, outputs)
    return outputs


def settle_label(editor: Editor, label: str, seen: npt.NDArray[Any], keys: Keys | None) -> str:
    """The tensor of class indices, int64 `[N]`.

    Args:
        editor: of the graph.
        label: the tensor with the label as the graph says it.
        seen: its values on the probe rows.
        keys: what the graph says for class 0, 1, …; None when it says the index.
    """
    if seen.ndim != 1:
        label = editor.flat(label)
    if seen.dtype.kind not in "OUS" and seen.dtype != np.int64:
        label = editor.cast(label, TensorProto.INT64)
    return label if keys is None else editor.class_index(label, keys)


def settle_scores(
    editor: Editor, scores: str, seen: npt.NDArray[Any], kind: ScoreKind, order: Sequence[int]
) -> str | None:
    """The tensor of scores float32 `[N, C]`, or None when the graph's scores are not per class.

    Args:
        editor: of the graph.
        scores: the tensor with the graph's scores.
        seen: their values on the probe rows.
        kind: what they are.
        order: for class 0, 1, … the column of the graph.
    """
    classes = len(order)
    shape = seen.reshape(len(seen), -1).shape
    if kind == "none" or shape[1] not in ((1, 2) if classes == 2 else (classes,)):
        return None
    if seen.dtype != np.float32:
        scores = editor.cast(scores, TensorProto.FLOAT)
    if seen.ndim != 2:
        scores = editor.node("Reshape", [scores, editor.integers([-1, shape[1]])])
    if shape[1] == 1:
        scores = editor.complemented(scores) if kind == "probability" else editor.mirrored(scores)
    elif kind == "score" and classes == 2 and not np.allclose(seen[:, 0], -seen[:, 1], rtol=1e-4, atol=1e-5):
        # Some converters leave something else beside the decision value, which is the last column.
        scores = editor.mirrored(editor.columns(scores, [1]))
    return scores if list(order) == list(range(classes)) else editor.columns(scores, order)


def settle_classifier(
    editor: Editor,
    schema: FeatureSchema,
    labels: tuple[str, ...],
    *,
    label: str,
    scores: str | None,
    kind: ScoreKind,
) -> Outputs:
    """End in `label`, and `scores` where there are some."""
    outputs = Outputs(
        task="classification",
        labels=labels,
        label_output=LABEL,
        score_output=SCORES if scores else "",
        score_kind=kind if scores else "none",
    )
    ends = {LABEL: label} | ({SCORES: scores} if scores else {})
    editor.settle(schema.input_name, schema.width, ends, outputs)
    return outputs


def check_answers(model: Any, outputs: Outputs, rows: npt.NDArray[np.float32]) -> None:
    """Run the finished graph on one row and on many, and see that its ends are what `outputs` says.

    Raises:
        ConvertError: convert.failed.
    """
    for some in (rows[:1], rows):
        seen = look(model, outputs.names, some)
        for name, value in seen.items():
            shape, kind = {
                LABEL: ((len(some),), np.int64),
                SCORES: ((len(some), len(outputs.labels)), np.float32),
                VALUE: ((len(some), 1), np.float32),
            }[name]
            if value.shape != shape or value.dtype != kind:
                found = f"{value.dtype} {list(value.shape)}"
                message = f"Output {name!r}: expected {np.dtype(kind)} {list(shape)}, found {found}."
                raise ConvertError("convert.failed", message)
        if LABEL in seen and not 0 <= seen[LABEL].min() <= seen[LABEL].max() < len(outputs.labels):
            message = f"Expected labels 0..{len(outputs.labels) - 1}, found {seen[LABEL].min()}..{seen[LABEL].max()}."
            raise ConvertError("convert.failed", message)
