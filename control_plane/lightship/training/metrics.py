"""Training: how good a model is, in numbers that mean the same for every model.

Rules:
* pure; a metric of a classifier is a share within 0 and 1;
* classes nobody has, in truth or prediction, don't count into a macro average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.data.dataset import Dataset
from lightship_agent.contract.codes import TrainError

#: Rows float32 `[n, width]` in; class indices int64 `[n]` or values float `[n]` out.
Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
#: Metrics of which less is better.
LOWER_IS_BETTER: Final = frozenset({"mae", "rmse"})
#: The metric that a challenger is compared with the champion by.
PRIMARY: Final = {"classification": "accuracy", "regression": "r2"}


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One class; shares within 0 and 1, 0 where undefined."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """How a model did on some rows.

    Attributes:
        task: classification or regression.
        rows: how many rows.
        values: by name: accuracy, macro_f1, balanced_accuracy; or r2, mae, rmse.
        per_class: classification only.
        confusion: classification only: `confusion[truth][prediction]` rows.
    """

    task: str
    rows: int
    values: dict[str, float]
    per_class: tuple[ClassMetrics, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    @property
    def flat(self) -> dict[str, float]:
        """Every metric by name, per-class ones as `recall:<label>`: what a gate can ask for."""
        named = dict(self.values)
        for c in self.per_class:
            named |= {f"precision:{c.label}": c.precision, f"recall:{c.label}": c.recall, f"f1:{c.label}": c.f1}
        return named


def evaluate(model: Any, dataset: Dataset) -> Metrics:
    """Metrics of an estimator, or of a predict function, on `dataset`.

    Args:
        model: has `predict`, or is a `Predict`.
        dataset: rows and truth.

    Raises:
        TrainError: train.failed when predicting raises or answers nonsense.
    """
    predict: Predict = getattr(model, "predict", model)
    try:
        predicted = np.asarray(predict(dataset.x.copy()))  # some estimators refuse read-only rows
    except Exception as e:  # any estimator may raise anything; its words are kept
        raise TrainError("train.failed", f"Predicting raised {type(e).__name__}: {e}.") from e
    return score(dataset.task, dataset.y, predicted, dataset.labels)


def score(task: str, truth: npt.NDArray[Any], predicted: npt.NDArray[Any], labels: tuple[str, ...] = ()) -> Metrics:
    """Metrics from truth and prediction.

    Args:
        task: classification or regression.
        truth: class indices int64 `[n]`, or values `[n]`.
        predicted: the same, of the model; `[n, 1]` will do.
        labels: class names in index order.

    Raises:
        TrainError: train.failed when sizes disagree or a class index has no name.
    """
    flat = predicted.ravel()
    if flat.shape != truth.shape or not len(truth):
        raise TrainError("train.failed", f"Expected {len(truth)} predictions, found shape {list(predicted.shape)}.")
    if task == "regression":
        return _score_values(truth.astype(np.float64), flat.astype(np.float64))
    indices = flat.astype(np.int64)
    if indices.min() < 0 or indices.max() >= len(labels):
        raise TrainError("train.failed", f"Expected class indices 0..{len(labels) - 1}, found {indices.max()}.")
    return _score_classes(truth, indices, labels)


def _score_classes(truth: npt.NDArray[Any], predicted: npt.NDArray[np.int64], labels: tuple[str, ...]) -> Metrics:
    classes = len(labels)
    confusion = np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)
    hits, said, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    precision = hits / np.maximum(said, 1)
    recall = hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(said + true, 1)
    present = (said + true) > 0
    values = {
        "accuracy": float(hits.sum() / len(truth)),
        "macro_f1": float(f1[present].mean()),
        "balanced_accuracy": float(recall[true > 0].mean()),
    }
    per_class = tuple(
        ClassMetrics(
            label=label,
            precision=float(precision[i]),
            recall=float(recall[i]),
            f1=float(f1[i]),
            support=int(true[i]),
        )
        for i, label in enumerate(labels)
    )
    table = tuple(tuple(int(n) for n in row) for row in confusion)
    return Metrics(task="classification", rows=len(truth), values=values, per_class=per_class, confusion=table)


def _score_values(truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> Metrics:
    """R² as 1 - residual / total sum of squares; 0 for a constant truth that is missed, 1 for one that is hit."""
    residual = float(((truth - predicted) ** 2).sum())
    total = float(((truth - truth.mean()) ** 2).sum())
    r2 = 1 - residual / total if total > 0 else float(residual == 0)
    values = {
        "r2": r2,
        "mae": float(np.abs(truth - predicted).mean()),
        "rmse": float(np.sqrt(residual / len(truth))),
    }
    return Metrics(task="regression", rows=len(truth), values=values)
