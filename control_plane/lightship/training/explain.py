"""Training: which features a model listens to, by permutation on rows it has not seen.

Rules:
* bounded: the rows predicted in total have a limit, whatever the model and its width;
* permuted copies are predicted in blocks: one call per row would cost more than the model itself;
* an importance is a share: never negative, all of them sum to 1, or all are 0 where shuffling harms nothing.

Source: Breiman, "Random Forests", Machine Learning 45, 2001, section 10.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import TrainError

from .metrics import Predict

MAX_ROWS: Final = 500
MAX_REPEATS: Final = 5
#: Rows predicted in total; repeats, then rows, shrink to keep within it.
BUDGET: Final = 60_000
_MIN_ROWS: Final = 20


def importances(
    model: Any,
    rows: npt.NDArray[np.float32],
    y: npt.NDArray[Any],
    names: tuple[str, ...],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Each feature's share of what shuffling features costs: in accuracy, or in squared error.

    Args:
        model: fitted estimator, or a predict function.
        rows: held-out rows, float32 `[n, width]`; at most `MAX_ROWS` of them are used.
        y: their truth: int64 class indices, or float32 values.
        names: feature names in column order.
        seed: of the sampling and the shuffling.

    Raises:
        TrainError: train.failed when predicting raises.
    """
    predict: Predict = getattr(model, "predict", model)
    rng = np.random.Generator(np.random.PCG64(seed))
    width = len(names)
    count = min(len(rows), MAX_ROWS, max(_MIN_ROWS, BUDGET // width))
    repeats = max(1, min(MAX_REPEATS, BUDGET // (width * count)))
    chosen = rng.permutation(len(rows))[:count]
    x, truth = rows[chosen], y[chosen]
    base = _loss(_predict(predict, x), truth).mean()
    rises = np.zeros(width)
    for j in range(width):
        block = np.tile(x, (repeats, 1))
        for k in range(repeats):
            block[k * count : (k + 1) * count, j] = rng.permutation(x[:, j])
        rises[j] = _loss(_predict(predict, block), np.tile(truth, repeats)).mean() - base
    rises = np.nan_to_num(np.maximum(rises, 0.0))
    total = float(rises.sum())
    shares = rises / total if total > 0 else rises
    return {name: float(share) for name, share in zip(names, shares, strict=True)}


def _loss(predicted: npt.NDArray[Any], truth: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    if np.issubdtype(truth.dtype, np.integer):
        return np.asarray(predicted != truth, dtype=np.float64)
    return np.asarray((predicted.astype(np.float64) - truth) ** 2, dtype=np.float64)


def _predict(predict: Predict, rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a shuffled row may look odd to the estimator; that is the point
        try:
            return np.asarray(predict(rows)).ravel()
        except Exception as e:  # any estimator may raise anything; its words are kept
            raise TrainError("train.failed", f"Explaining raised {type(e).__name__}: {e}.") from e
