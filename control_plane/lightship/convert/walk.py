"""Convert: what an estimator is made of.

Rules:
* pure, and without importing scikit-learn: parts are told apart by the names of their classes, so that a missing
  or renamed class can't break the walk;
* ensembles of trees are looked at as one thing; their hundreds of members are not walked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

IMPUTERS: Final = frozenset({"SimpleImputer", "KNNImputer", "IterativeImputer"})
#: Trees that skl2onnx converts without their rule for missing values.
PLAIN_TREES: Final = frozenset({"BaseDecisionTree", "BaseForest", "DecisionTreeClassifier", "DecisionTreeRegressor"})
TREES: Final = PLAIN_TREES | {"BaseGradientBoosting", "BaseHistGradientBoosting"}
_MEMBERS: Final = (
    "estimators_",
    "estimators",
    "estimator_",
    "estimator",
    "final_estimator_",
    "regressor_",
    "regressor",
    "calibrated_classifiers_",
)


@dataclass(frozen=True, eq=False)
class Part:
    """One part of an estimator.

    Attributes:
        estimator: the part.
        imputed: whether a step in front of it fills gaps.
        direct: whether it sees the model's own columns, untouched but for filled gaps.
    """

    estimator: Any
    imputed: bool
    direct: bool

    def is_a(self, names: frozenset[str] | set[str]) -> bool:
        """Whether the part's class, or one it derives from, has one of `names`."""
        return not names.isdisjoint(kind.__name__ for kind in type(self.estimator).__mro__)


def parts(estimator: Any) -> tuple[Part, ...]:
    """The estimator and everything inside it, outermost first."""
    return tuple(_walk(Part(estimator, imputed=False, direct=True), set()))


def final_estimator(estimator: Any) -> Any:
    """The last step of a pipeline (of a pipeline), or the estimator itself."""
    while hasattr(estimator, "steps"):
        estimator = estimator.steps[-1][1]
    return estimator


def _walk(part: Part, seen: set[int]) -> Iterator[Part]:
    if id(part.estimator) in seen or part.estimator is None or isinstance(part.estimator, str):
        return
    seen.add(id(part.estimator))
    yield part
    if hasattr(part.estimator, "steps"):
        yield from _walk_steps(part, seen)
        return
    for transformer in _columns(part.estimator):
        yield from _walk(Part(transformer, imputed=part.imputed, direct=False), seen)
    if part.is_a(TREES):
        return
    for name in _MEMBERS:
        for member in _listed(getattr(part.estimator, name, None)):
            yield from _walk(Part(member, imputed=part.imputed, direct=part.direct), seen)


def _walk_steps(part: Part, seen: set[int]) -> Iterator[Part]:
    imputed, direct = part.imputed, part.direct
    for _, step in part.estimator.steps:
        within = list(_walk(Part(step, imputed=imputed, direct=direct), seen))
        yield from within
        if within:
            imputed = imputed or any(p.is_a(IMPUTERS) for p in within)
            direct = direct and within[0].is_a(IMPUTERS)


def _columns(estimator: Any) -> list[Any]:
    """Members of a ColumnTransformer or FeatureUnion, fitted ones where there are."""
    rows = getattr(estimator, "transformers_", None) or getattr(estimator, "transformers", None) or []
    members = [row[1] for row in rows]
    return members + [row[1] for row in getattr(estimator, "transformer_list", None) or []]


def _listed(value: Any) -> list[Any]:
    if value is None or isinstance(value, (str, type)):
        return []
    if hasattr(value, "ravel"):
        return list(value.ravel())
    if isinstance(value, (list, tuple)):
        return [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in value]
    return [value]
