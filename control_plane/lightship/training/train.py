"""Training: one run - split, fit, evaluate on rows the model has not seen.

Rules:
* estimators learn class indices 0..C-1, so that the converted model's label is an index into the schema's labels;
* training uses the dataset's float32 rows as they are;
* what an estimator raises becomes `train.failed` in its own words; what it warns of is kept with the run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._param_validation import InvalidParameterError  # the one class that says "bad value"

from lightship.data.dataset import Dataset, Split, split
from lightship_agent.contract.codes import TrainError

from .metrics import Metrics, evaluate, score
from .recipe import Recipe, build_estimator, check_task, recipe_digest

__all__ = ["FittedRun", "evaluate", "fit"]

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedRun:
    """A fitted estimator and the evidence about it.

    Attributes:
        recipe: what was asked for.
        recipe_digest: its digest.
        dataset_digest: of the data.
        estimator: the fitted estimator or pipeline.
        metrics: on the held-out rows.
        train: indices of the training rows, int64.
        heldout: indices of the held-out rows, int64.
        heldout_rows: float32 `[n, width]`.
        heldout_y: the truth, int64 class indices or float32 values `[n]`.
        heldout_predictions: the model's answers, of the same kind.
        warnings: what the estimator warned of.
        started: Unix seconds, by the caller's clock.
        ended: Unix seconds, by the caller's clock.
    """

    recipe: Recipe
    recipe_digest: str
    dataset_digest: str
    estimator: Any
    metrics: Metrics
    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]
    heldout_rows: npt.NDArray[np.float32]
    heldout_y: npt.NDArray[Any]
    heldout_predictions: npt.NDArray[Any]
    warnings: tuple[str, ...]
    started: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long fitting and evaluating took."""
        return self.ended - self.started


def fit(
    dataset: Dataset,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.time,
    allow_modules: tuple[str, ...] = (),
) -> FittedRun:
    """Fit `recipe` on `dataset` and evaluate it on the held-out share.

    Args:
        dataset: the data.
        recipe: what to fit.
        progress: is told each step in a few words.
        clock: Unix seconds.
        allow_modules: packages besides scikit-learn that the recipe may name.

    Raises:
        TrainError: train.unknown-estimator, train.recipe, train.failed.
        DataError: data.empty when there are too few rows to hold some out.
    """
    tell = progress or (lambda _: None)
    started = clock()
    estimator = build_estimator(recipe, allow_modules=allow_modules)
    check_task(estimator, dataset.task, recipe.estimator)
    parts = split(dataset, recipe.test_share, recipe.seed)
    _check_classes(dataset, parts)
    tell(f"fitting {recipe.estimator} on {len(parts.train)} rows")
    said = _fit(estimator, dataset.x[parts.train], dataset.y[parts.train])
    tell(f"evaluating on {len(parts.heldout)} held-out rows")
    rows, truth = dataset.x[parts.heldout], dataset.y[parts.heldout]
    predictions = _predict(estimator, rows, dataset.y.dtype)
    return FittedRun(
        recipe=recipe,
        recipe_digest=recipe_digest(recipe),
        dataset_digest=dataset.digest,
        estimator=estimator,
        metrics=score(dataset.task, truth, predictions, dataset.labels),
        train=parts.train,
        heldout=parts.heldout,
        heldout_rows=rows,
        heldout_y=truth,
        heldout_predictions=predictions,
        warnings=said,
        started=started,
        ended=clock(),
    )


def _check_classes(dataset: Dataset, parts: Split) -> None:
    if dataset.task != "classification":
        return
    if len(dataset.labels) < 2:
        message = f"Expected at least two classes in {dataset.target!r}, found {', '.join(dataset.labels)}."
        raise TrainError("train.failed", message, remedy="Add rows of another class.")
    seen = set(dataset.y[parts.train].tolist())
    unseen = [label for i, label in enumerate(dataset.labels) if i not in seen]
    if unseen:
        message = f"No training rows of: {', '.join(unseen[:20])}."
        raise TrainError("train.failed", message, remedy="Add rows of these classes, or drop the classes.")


def _fit(estimator: Any, x: npt.NDArray[np.float32], y: npt.NDArray[Any]) -> tuple[str, ...]:
    """Fit in place; the distinct warnings, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            estimator.fit(x, y)
        except InvalidParameterError as e:
            raise TrainError("train.recipe", str(e)) from e
        except Exception as e:  # any estimator may raise anything; its words are kept
            remedy = "Set `impute`, or use hist-gradient-boosting, which takes gaps." if np.isnan(x).any() else ""
            message = f"{type(estimator).__name__} raised {type(e).__name__}: {str(e).strip()}"
            raise TrainError("train.failed", message, remedy=remedy) from e
    return tuple(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught))


def _predict(estimator: Any, rows: npt.NDArray[np.float32], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once while fitting
        try:
            predicted: npt.NDArray[Any] = np.asarray(estimator.predict(rows)).ravel().astype(kind)
        except Exception as e:  # any estimator may raise anything; its words are kept
            raise TrainError("train.failed", f"Predicting raised {type(e).__name__}: {e}.") from e
    if not np.isfinite(predicted).all():
        raise TrainError("train.failed", "The fitted model predicts values that are not finite.")
    return predicted
