"""Integrations: Shapley values by the `shap` package, at training time, for the model card.

Rules:
* loaded only by a run whose recipe says `explain = "shap"`; the extra is `lightship[shap]`;
* TreeSHAP for scikit-learn's trees as they are; for everything else permutations over the scores, on few rows;
* nothing of it goes to a device but the shares that it adds up to.

Source: Lundberg et al., "From local explanations to global understanding with explainable AI for trees", Nature Machine
Intelligence 2, 2020; shap, "TreeExplainer", "PermutationExplainer".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import TrainError

Floats = npt.NDArray[np.float64]
#: Rows that every coalition of features is averaged over, where the model is asked and not read.
BACKGROUND_ROWS: Final = 32
_TREES: Final = ("sklearn.ensemble.", "sklearn.tree.")


def check() -> None:
    """Whether the extra is installed.

    Raises:
        TrainError: train.no-extra.
    """
    _load()


def contributions(
    estimator: Any,
    scores: Callable[[npt.NDArray[np.float32]], Floats],
    rows: npt.NDArray[np.float32],
    background: npt.NDArray[np.float32],
    *,
    asked: int,
    seed: int,
) -> tuple[Floats, str]:
    """What each feature adds to each score of each row, `[n, width, scores]`, and how that was found.

    Args:
        estimator: fitted; read as trees where it is some.
        scores: `[m, width]` → `[m, scores]`, for everything else.
        rows: held-out rows, float32 `[n, width]`; all of them for trees, else as many as `asked` allows.
        background: training rows that stand for "unknown".
        asked: rows that the model may be asked about in total, where it is not read as trees.
        seed: of the permutations.

    Raises:
        TrainError: train.no-extra; train.failed in the package's words.
    """
    shap = _load()
    try:
        if type(estimator).__module__.startswith(_TREES):
            found = _trees(shap, estimator, rows)
            if found is not None:
                return found, f"TreeSHAP (shap {shap.__version__}) over {len(rows)} held-out rows"
        few = background[:BACKGROUND_ROWS]
        evaluations = 2 * rows.shape[1] + 1
        chosen = rows[: max(1, asked // (evaluations * len(few)))]
        masker = shap.maskers.Independent(few, max_samples=len(few))
        explainer = shap.PermutationExplainer(scores, masker, seed=seed)
        values = _cube(explainer(chosen, max_evals=evaluations, silent=True).values)
    except Exception as e:  # the package raises whatever it likes; its words are kept
        raise TrainError("train.failed", f"shap raised {type(e).__name__}: {e}.") from e
    return values, f"permutation SHAP (shap {shap.__version__}) over {len(chosen)} held-out rows"


def _trees(shap: Any, estimator: Any, rows: npt.NDArray[np.float32]) -> Floats | None:
    """None for what looks like trees by its module and is none that the package reads."""
    try:
        explainer = shap.TreeExplainer(estimator, feature_perturbation="tree_path_dependent")
    except Exception:  # noqa: BLE001 - it has no error of its own for models it can't read
        return None
    return _cube(explainer.shap_values(rows, check_additivity=False))


def _cube(values: Any) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    return found if found.ndim == 3 else found[:, :, None]


def _load() -> Any:
    try:
        import shap
    except ImportError as e:
        message = f'explain = "shap" needs the shap package: {e}.'
        raise TrainError("train.no-extra", message, remedy='pip install "lightship[shap]"') from e
    return shap
