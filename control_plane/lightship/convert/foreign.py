"""Convert: models that somebody brought as ONNX are given the ends a device expects, or refused with what to change.

Rules:
* one float32 input `[N, w]` with a free number of rows;
* a classifier may say class names, numbers or nothing but scores: the label becomes the index into the labels;
  names and columns are put in the order of the labels given;
* dictionaries per row (ZipMap) are undone; the tensor behind them is taken;
* what can't be told apart for sure is refused, never guessed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs

from .graph import Editor, class_names
from .inspection import INVALID, OnnxInfo, Tensor, describe
from .settle import (
    Keys,
    ScoreKind,
    check_answers,
    look,
    probe_rows,
    settle_classifier,
    settle_label,
    settle_regressor,
    settle_scores,
)

_NAMES_LABEL = ("label", "class", "predict")
_NAMES_SCORES = ("prob", "score", "logit", "output_1", "confidence")


def normalise(model: Any, schema: FeatureSchema | None, labels: tuple[str, ...]) -> tuple[FeatureSchema, Outputs]:
    """Edit `model` in place until its ends are a device's.

    Args:
        model: a parsed and inspected `ModelProto`.
        schema: of its input; None makes one from the width, with features f1, f2, ….
        labels: class names in index order; empty for a regressor, or where the graph knows its classes.

    Raises:
        ConvertError: convert.invalid-onnx, convert.failed.
    """
    info = describe(model, 0)
    schema = check_input(info, schema)
    editor = Editor(model)
    unzipped = editor.drop_zipmaps()
    tensors = [unzipped[o.name][0] if o.name in unzipped else o.name for o in info.outputs]
    _replace_outputs(model, tensors, unzipped)
    rows = probe_rows(schema)
    seen = look(model, tensors, rows)
    known = next((names for _, names in unzipped.values() if names), ()) or class_names(model)
    label, scores = _find_ends(seen, info.outputs, tensors)
    if label is None and scores is not None and not labels and seen[scores].size == len(rows):
        outputs = settle_regressor(editor, schema, scores, seen[scores])
    else:
        outputs = _classifier(editor, schema, labels, known, label=label, scores=scores, seen=seen)
    check_answers(model, outputs, rows)
    return schema, outputs


def check_input(info: OnnxInfo, schema: FeatureSchema | None) -> FeatureSchema:
    """The schema of the one input.

    Raises:
        ConvertError: convert.invalid-onnx.
    """
    if len(info.inputs) != 1:
        names = ", ".join(i.name for i in info.inputs)
        message = f"Expected one input [rows, features], found {len(info.inputs)}: {names}."
        raise ConvertError(INVALID, message, remedy="Concatenate the columns into one float tensor before exporting.")
    tensor = info.inputs[0]
    if tensor.kind != "float":
        remedy = "Export with a float32 input (FloatTensorType in skl2onnx)."
        raise ConvertError(INVALID, f"Input {tensor.name!r}: expected float32, found {tensor.kind}.", remedy=remedy)
    if tensor.shape is None or len(tensor.shape) != 2:
        message = f"Input {tensor.name!r}: expected [rows, features], found {tensor.shape}."
        raise ConvertError(INVALID, message, remedy="Export a model of flat rows.")
    rows, width = tensor.shape
    if rows is not None:
        message = f"Input {tensor.name!r} is fixed to {rows} rows at a time."
        raise ConvertError(INVALID, message, remedy="Export with a dynamic first axis (dynamic_axes in torch).")
    if schema is None:
        if width is None:
            message = f"Input {tensor.name!r} does not say how many features it takes."
            raise ConvertError(INVALID, message, remedy="Give a schema.")
        return FeatureSchema(features=tuple(Feature(name=f"f{j + 1}") for j in range(width)))
    if width not in (None, schema.width):
        message = f"Input {tensor.name!r} takes {width} features, the schema has {schema.width}."
        raise ConvertError(INVALID, message)
    return schema


def _replace_outputs(model: Any, tensors: list[str], unzipped: dict[str, Any]) -> None:
    """Make the tensors behind dictionaries outputs, so that they can be looked at."""
    plain = [o for o in model.graph.output if o.name not in unzipped]
    made = [helper.make_empty_tensor_value_info(t) for t in tensors if t not in {o.name for o in plain}]
    for value in made:
        value.type.tensor_type.elem_type = TensorProto.FLOAT  # what ZipMap takes
    kept = [type(o).FromString(o.SerializeToString()) for o in plain]
    del model.graph.output[:]
    model.graph.output.extend([*kept, *made])


def _find_ends(
    seen: dict[str, npt.NDArray[Any]], outputs: tuple[Tensor, ...], tensors: list[str]
) -> tuple[str | None, str | None]:
    """Which tensor is the label, and which the scores (or the value).

    Raises:
        ConvertError: convert.invalid-onnx when that can't be told.
    """
    names = dict(zip(tensors, (o.name for o in outputs), strict=True))
    labels = [t for t in tensors if seen[t].dtype.kind in "iuOUS" and seen[t].size == len(seen[t])]
    numbers = [t for t in tensors if seen[t].dtype.kind == "f"]
    label = _one(labels, names, _NAMES_LABEL, "labels")
    scores = _one(numbers, names, _NAMES_SCORES, "scores")
    if label is None and scores is None:
        raise ConvertError(INVALID, f"No output is a label, a score or a value: {', '.join(names.values())}.")
    return label, scores


def _one(found: list[str], names: dict[str, str], words: tuple[str, ...], what: str) -> str | None:
    if len(found) > 1:
        found = [t for t in found if any(w in names[t].lower() for w in words)]
        if len(found) != 1:
            message = f"Several outputs could be the {what}: {', '.join(names.values())}."
            raise ConvertError(INVALID, message, remedy=f"Export one, or name it {words[0]!r}.")
    return found[0] if found else None


def _classifier(
    editor: Editor,
    schema: FeatureSchema,
    labels: tuple[str, ...],
    known: Keys,
    *,
    label: str | None,
    scores: str | None,
    seen: dict[str, npt.NDArray[Any]],
) -> Outputs:
    columns = seen[scores].reshape(len(seen[scores]), -1).shape[1] if scores else 0
    labels = labels or tuple(str(k) for k in known) or tuple(str(i) for i in range(max(columns, 2) if scores else 0))
    if len(labels) < 2:
        raise ConvertError(INVALID, "The classes can't be told from the graph.", remedy="Give the class names.")
    if known and len(known) != len(labels):
        message = f"The graph knows {len(known)} classes, {len(labels)} were named."
        raise ConvertError(INVALID, message, remedy=f"Name exactly: {', '.join(str(k) for k in known[:20])}.")
    order = _order(labels, known)
    keys = _keys(labels, known, order, seen[label]) if label else None
    kind = _kind(seen[scores]) if scores else "none"
    ended = settle_scores(editor, scores, seen[scores], kind, order) if scores else None
    if scores and ended is None:
        message = f"Expected {len(labels)} scores per row, found {columns}."
        raise ConvertError(INVALID, message, remedy="Name as many classes as there are scores.")
    if label is None:
        assert ended is not None  # `_find_ends` found one of the two
        index = editor.argmax(ended)
    else:
        index = settle_label(editor, label, seen[label], keys)
    return settle_classifier(editor, schema, labels, label=index, scores=ended, kind=kind)


def _order(labels: tuple[str, ...], known: Keys) -> list[int]:
    """For class 0, 1, … of `labels`, its place among the graph's classes."""
    texts = [str(k) for k in known]
    if sorted(texts) == sorted(labels):
        return [texts.index(label) for label in labels]
    if texts and texts != [str(i) for i in range(len(labels))]:
        message = f"The graph's classes are {', '.join(texts[:20])}; expected {', '.join(labels[:20])}."
        raise ConvertError(INVALID, message, remedy="Give the graph's own class names.")
    return list(range(len(labels)))


def _keys(labels: tuple[str, ...], known: Keys, order: list[int], seen: npt.NDArray[Any]) -> Keys | None:
    """What the graph says for class 0, 1, …; None when it says 0, 1, … itself.

    Raises:
        ConvertError: convert.invalid-onnx when it says something else, or it can't be told.
    """
    if seen.dtype.kind in "OUS":
        return labels
    if known:
        said = tuple(int(known[i]) for i in order) if all(isinstance(k, int) for k in known) else ()
        if said == tuple(range(len(labels))):
            return None
        if said:
            return said
    values = {int(v) for v in seen.ravel()}
    indices = values <= set(range(len(labels)))
    numbers = tuple(int(label) for label in labels) if all(_is_whole(label) for label in labels) else ()
    if not numbers or numbers == tuple(range(len(labels))):
        if indices:
            return None
    elif indices != (values <= set(numbers)):
        return None if indices else numbers
    message = f"The label output says {', '.join(str(v) for v in sorted(values)[:10])}: not clearly class indices."
    raise ConvertError(INVALID, message, remedy="Train on class indices 0, 1, … and export again.")


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _kind(seen: npt.NDArray[Any]) -> ScoreKind:
    """Probabilities are within 0 and 1, and sum to 1 where there are several columns."""
    flat = seen.reshape(len(seen), -1)
    within = bool((flat >= -1e-6).all() and (flat <= 1 + 1e-6).all())
    whole = flat.shape[1] == 1 or bool(np.allclose(flat.sum(axis=1), 1, atol=1e-3))
    return "probability" if within and whole else "score"
