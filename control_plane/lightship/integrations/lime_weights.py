"""Integrations: local surrogates by the `lime` package, at training time, for the model card.

Rules:
* loaded only by a run whose recipe says `explain = "lime"`; the extra is `lightship[lime]`;
* a weight is that of a standardised feature in a linear model fitted around one row: what moves the score there;
* rows with gaps are left out, since a surrogate has no answer for them.

Source: Ribeiro et al., "Why should I trust you?", KDD 2016; lime, "LimeTabularExplainer".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import TrainError

Floats = npt.NDArray[np.float64]
#: Invented neighbours per explained row.
NEIGHBOURS: Final = 500
MAX_ROWS: Final = 50


def check() -> None:
    """Whether the extra is installed.

    Raises:
        TrainError: train.no-extra.
    """
    _load()


def contributions(
    scores: Callable[[npt.NDArray[np.float32]], Floats],
    rows: npt.NDArray[np.float32],
    background: npt.NDArray[np.float32],
    *,
    asked: int,
    seed: int,
) -> tuple[Floats, str]:
    """The weight of each feature for each score around each row, `[n, width, scores]`, and how that was found.

    Args:
        scores: `[m, width]` → `[m, scores]`.
        rows: held-out rows without gaps, float32 `[n, width]`; at most `MAX_ROWS` are explained.
        background: training rows, whose spread the neighbours have.
        asked: rows that the model may be asked about in total.
        seed: of the neighbours.

    Raises:
        TrainError: train.no-extra; train.failed in the package's words.
    """
    lime, tabular = _load()
    known = background[~np.isnan(background).any(axis=1)]
    if not len(rows) or len(known) < 2:
        message = 'explain = "lime" found no rows without missing values.'
        raise TrainError("train.failed", message, remedy='Impute, or choose explain = "shap" or "permutation".')
    try:
        explainer = tabular.LimeTabularExplainer(
            known.astype(np.float64), mode="regression", discretize_continuous=False, random_state=seed
        )
        kinds = scores(rows[:1]).shape[1]
        chosen = rows[: min(MAX_ROWS, max(1, asked // (NEIGHBOURS * kinds)))]
        values = np.zeros((len(chosen), rows.shape[1], kinds))
        for k in range(kinds):
            # As a regression of one score at a time, which needs no probabilities.
            for i, row in enumerate(chosen):
                found = explainer.explain_instance(
                    row.astype(np.float64),
                    _one(scores, k),
                    num_features=rows.shape[1],
                    num_samples=NEIGHBOURS,
                )
                for feature, weight in found.as_map()[1]:
                    values[i, feature, k] = weight
    except Exception as e:  # the package raises whatever it likes; its words are kept
        raise TrainError("train.failed", f"lime raised {type(e).__name__}: {e}.") from e
    return values, f"LIME (lime {_version(lime)}) around {len(chosen)} held-out rows"


def _one(scores: Callable[[npt.NDArray[np.float32]], Floats], kind: int) -> Callable[[Floats], Floats]:
    return lambda rows: scores(rows.astype(np.float32))[:, kind]


def _version(lime: Any) -> str:
    from importlib.metadata import version

    return str(getattr(lime, "__version__", "")) or version("lime")


def _load() -> tuple[Any, Any]:
    try:
        import lime
        import lime.lime_tabular as tabular
    except ImportError as e:
        message = f'explain = "lime" needs the lime package: {e}.'
        raise TrainError("train.no-extra", message, remedy='pip install "lightship[lime]"') from e
    return lime, tabular
