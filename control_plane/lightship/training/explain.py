"""Training: which features a model listens to, on rows it has not seen: by permutation, or by SHAP or LIME if wished.

Rules:
* bounded: the rows predicted in total have a limit, whatever the model and its width;
* permuted copies are predicted in blocks: one call per row would cost more than the model itself;
* an importance is a share: never negative, all of them sum to 1, or all are 0 where shuffling harms nothing.

Source: Breiman, "Random Forests", Machine Learning 45, 2001, section 10.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import TrainError

from .metrics import Predict

How = Literal["permutation", "shap", "lime"]
MAX_ROWS: Final = 500
MAX_REPEATS: Final = 5
#: Rows predicted in total; repeats, then rows, shrink to keep within it.
BUDGET: Final = 60_000
_MIN_ROWS: Final = 20


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """What a run knows about its model's reasons.

    Attributes:
        shares: each feature's share of all that features do; they sum to 1, or are all 0.
        method: how that was found, in words.
        effects: by feature, how its value goes with what it adds to the second class's score, or to the value: the
            correlation, -1 to 1. Empty where there are more classes than two, or the method does not tell.
    """

    shares: dict[str, float]
    method: str
    effects: dict[str, float] = {}


def explain(
    how: How,
    estimator: Any,
    rows: npt.NDArray[np.float32],
    y: npt.NDArray[Any],
    names: tuple[str, ...],
    *,
    background: npt.NDArray[np.float32],
    seed: int = 0,
) -> Explained:
    """What matters to `estimator`, found as `how` says.

    Args:
        how: permutation; shap or lime, which need their extras.
        estimator: fitted.
        rows: held-out rows, float32 `[n, width]`; at most `MAX_ROWS` of them are used.
        y: their truth.
        names: feature names in column order.
        background: training rows, float32 `[m, width]`.
        seed: of all sampling.

    Raises:
        TrainError: train.no-extra, train.failed.
    """
    if how == "permutation":
        shares = importances(estimator, rows, y, names, seed=seed)
        return Explained(shares=shares, method="loss of quality when the feature is shuffled, on held-out rows")
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rows[rng.permutation(len(rows))[:MAX_ROWS]]
    known = background[rng.permutation(len(background))[:MAX_ROWS]]
    scores = _scores(estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both packages warn of much that is no matter here
        if how == "shap":
            from lightship.integrations import shap_values

            values, method = shap_values.contributions(estimator, scores, chosen, known, asked=BUDGET, seed=seed)
        else:
            from lightship.integrations import lime_weights

            chosen = chosen[~np.isnan(chosen).any(axis=1)]
            values, method = lime_weights.contributions(scores, chosen, known, asked=BUDGET, seed=seed)
    size = np.abs(values).mean(axis=(0, 2))
    total = float(size.sum())
    shares = {name: float(v) for name, v in zip(names, size / total if total > 0 else size, strict=True)}
    # Weights of a surrogate are slopes already: their mean's sign is the direction, as far as they agree.
    effects = _agreement(values) if how == "lime" else _correlation(chosen[: len(values)], values)
    return Explained(shares=shares, method=method, effects=dict(zip(names, effects, strict=True)) if effects else {})


def check_explainable(how: How) -> None:
    """Refuse early what would fail after the fit.

    Raises:
        TrainError: train.no-extra.
    """
    if how == "shap":
        from lightship.integrations import shap_values

        shap_values.check()
    elif how == "lime":
        from lightship.integrations import lime_weights

        lime_weights.check()


def _scores(estimator: Any) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """Probabilities where there are any, else what it predicts, always `[n, kinds]`."""
    ask = getattr(estimator, "predict_proba", None) or estimator.predict

    def scores(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        found = np.asarray(ask(np.asarray(rows, dtype=np.float32)), dtype=np.float64)
        return found.reshape(len(rows), -1)

    return scores


def _one_score(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The contributions to the second of two classes, or to the only score; None where there are more."""
    kinds = values.shape[2]
    return values[:, :, kinds - 1] if kinds <= 2 else None


def _correlation(rows: npt.NDArray[np.float32], values: npt.NDArray[np.float64]) -> list[float]:
    one = _one_score(values)
    if one is None:
        return []
    found = []
    for column, added in zip(rows.T.astype(np.float64), one.T, strict=True):
        there = ~np.isnan(column)
        a, b = column[there], added[there]
        both = len(a) > 1 and a.std() > 0 and b.std() > 0
        found.append(float(np.corrcoef(a, b)[0, 1]) if both else 0.0)
    return found


def _agreement(values: npt.NDArray[np.float64]) -> list[float]:
    one = _one_score(values)
    if one is None:
        return []
    size = np.abs(one).mean(axis=0)
    return [float(v) for v in np.divide(one.mean(axis=0), size, out=np.zeros_like(size), where=size > 0)]


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
