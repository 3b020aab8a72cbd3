"""Runtime: the reasons for a loaded model's answers, against the background rows of its bundle.

Rules: what is explained is the score of the class the model chose (or, without scores, that class itself), or the value
of a regressor; the device and the control plane explain by this same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ServingError

from .explain import Explanation, Floats, explain
from .model import LoadedModel


class Reasons(msgspec.Struct, frozen=True, eq=False):
    """Of n rows: the rows, what of the answers is explained, and how it came about."""

    rows: Floats
    targets: npt.NDArray[np.int64]  # class indices; 0 for a regressor
    found: Explanation
    permutations: int
    seed: int
    background: int  # rows


def explain_rows(
    model: LoadedModel,
    rows: Floats,
    *,
    permutations: int = 10,
    seed: int = 0,
    go_on: Callable[[], None] = lambda: None,
) -> Reasons:
    """Explain what `model` says to `rows`.

    Args:
        model: which explains itself.
        rows: float32 `[n, width]`, as its schema wants them.
        permutations: walks per row.
        seed: of their order.
        go_on: called between batches; whatever it raises ends the work.

    Raises:
        ServingError: serving.no-background, serving.runtime, and what `go_on` raises.
    """
    background = model.background
    if background is None:
        message = f"{model.name}@{model.version} came without background rows, so its answers can't be explained."
        raise ServingError("serving.no-background", message, remedy="Train again: every release brings them now.")
    said = model.predict(rows)
    targets = np.zeros(len(rows), dtype=np.int64) if said.labels is None else said.labels

    def numbers(block: Floats) -> npt.NDArray[np.float64]:
        go_on()
        return _numbers(model, block)

    found = explain(numbers, rows, background, targets, permutations=permutations, seed=seed)
    return Reasons(rows, targets, found, permutations, seed, len(background))


def plain(reasons: Reasons, model: LoadedModel, top: int) -> dict[str, Any]:
    """Reasons as data for JSON: tensors as an inference answers them, and the `top` features of each row in words."""
    found = reasons.found
    return {
        "model_name": model.name,
        "model_version": str(model.version),
        "parameters": {
            "digest": model.digest,
            "permutations": reasons.permutations,
            "seed": reasons.seed,
            "background_rows": reasons.background,
        },
        "outputs": [
            _tensor("attributions", found.shares),
            _tensor("base", found.base),
            _tensor("explained", found.answers),
            _tensor("gap", found.gap),
        ],
        "explanations": [_words(reasons, i, model, top) for i in range(len(reasons.rows))],
    }


def _numbers(model: LoadedModel, rows: Floats) -> npt.NDArray[np.float64]:
    found = model.predict(rows)
    if found.scores is not None:
        return found.scores.astype(np.float64)
    if found.labels is not None:
        return np.asarray(np.eye(len(model.outputs.labels))[found.labels], dtype=np.float64)
    assert found.values is not None
    return found.values.astype(np.float64)


def _words(reasons: Reasons, i: int, model: LoadedModel, top: int) -> dict[str, Any]:
    """The features that moved the answer most, in the features' and the classes' names."""
    found, row, labels = reasons.found, reasons.rows[i], model.outputs.labels
    order = np.argsort(-np.abs(found.shares[i]), kind="stable")[:top].tolist()
    return {
        "target": labels[int(reasons.targets[i])] if labels else "value",
        "base": float(found.base[i]),
        "explained": float(found.answers[i]),
        "top": [
            {
                "feature": model.schema.names[j],
                "value": _said(model, j, float(row[j])),
                "attribution": float(found.shares[i, j]),
            }
            for j in order
        ],
    }


def _said(model: LoadedModel, j: int, value: float) -> float | str | None:
    """A value as somebody would say it: a category by its word, a missing one as nothing."""
    if np.isnan(value):
        return None
    levels = model.schema.features[j].levels
    return levels[int(value)] if 0 <= int(value) < len(levels) else value


def _tensor(name: str, data: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {"name": name, "datatype": "FP64", "shape": list(data.shape), "data": data.ravel().tolist()}
