"""Convert: kinds of models that convert wrongly without a word, or not at all. Pure.

Rules:
* each rule is a fact that was measured, with its reason and the way round, in one table;
* a rule refuses what is wrong and nothing beside it: a setting that agrees stays allowed;
* what no rule knows is left to the parity gate, which looks at the answers.

Source: 84 estimators and pipelines through skl2onnx 1.20 on scikit-learn 1.8 and 1.9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lightship_agent.contract.codes import ConvertError
from lightship_agent.contract.schema import FeatureSchema

from .walk import PLAIN_TREES, Part, final_estimator, parts


@dataclass(frozen=True)
class Rule:
    """One kind that is refused.

    Attributes:
        kinds: class names; a subclass counts.
        applies: which of them, by their settings and the schema.
        reason: what goes wrong.
        way_round: what to do instead.
    """

    kinds: frozenset[str]
    applies: Callable[[Part, FeatureSchema], bool]
    reason: str
    way_round: str


def _always(_part: Part, _schema: FeatureSchema) -> bool:
    return True


def _set(name: str, *values: object) -> Callable[[Part, FeatureSchema], bool]:
    return lambda part, _schema: getattr(part.estimator, name, None) in values


def _truthy(name: str) -> Callable[[Part, FeatureSchema], bool]:
    return lambda part, _schema: bool(getattr(part.estimator, name, False))


def _has_categories(part: Part, _schema: FeatureSchema) -> bool:
    fitted = getattr(part.estimator, "is_categorical_", None)
    if fitted is not None:
        return any(bool(flag) for flag in fitted)
    asked = getattr(part.estimator, "categorical_features", None)
    # "from_dtype" asks for nothing where rows are arrays of numbers.
    return asked is not None and not (isinstance(asked, str) and asked == "from_dtype")


def _weighs_by_distance(part: Part, _schema: FeatureSchema) -> bool:
    weights = getattr(part.estimator, "weights", "uniform")
    return weights is not None and weights != "uniform"


def _sees_gaps(part: Part, schema: FeatureSchema) -> bool:
    return not part.imputed and any(f.nullable for f in schema.features)


def _has_function(part: Part, _schema: FeatureSchema) -> bool:
    return getattr(part.estimator, "func", None) is not None


def _infrequent(part: Part, _schema: FeatureSchema) -> bool:
    return getattr(part.estimator, "handle_unknown", "") == "infrequent_if_exist"


def _predicts_several(part: Part, _schema: FeatureSchema) -> bool:
    if hasattr(part.estimator, "classes_"):
        return isinstance(part.estimator.classes_, list)  # one array of classes per target
    several = getattr(part.estimator, "n_outputs_", 1)
    return isinstance(several, int) and several > 1


def _rule(kinds: str, applies: Callable[[Part, FeatureSchema], bool], reason: str, way_round: str) -> Rule:
    return Rule(frozenset(kinds.split()), applies, reason, way_round)


RULES: Final = (
    _rule(
        "HistGradientBoostingClassifier HistGradientBoostingRegressor",
        _has_categories,
        "splits on categories are exported as splits on numbers: every second answer was wrong",
        "Encode the categories before (ordinal numbers or one-hot) and leave categorical_features unset.",
    ),
    _rule(
        "HistGradientBoostingRegressor",
        _set("loss", "poisson", "gamma"),
        "the exponential of the poisson and gamma losses is left out of the graph: every answer is wrong",
        "Use squared_error on the logarithm of the target, or another loss.",
    ),
    _rule(
        " ".join(sorted(PLAIN_TREES)),
        _sees_gaps,
        "the graph forgets which branch missing values take, and the schema allows missing values",
        "Impute in front of the trees (`impute` in the recipe), or use hist-gradient-boosting, which keeps them.",
    ),
    _rule(
        "KNeighborsClassifier KNeighborsRegressor",
        _weighs_by_distance,
        "weights by distance are ignored in the graph",
        'Use weights="uniform".',
    ),
    _rule(
        "TunedThresholdClassifierCV FixedThresholdClassifier",
        _always,
        "the decision threshold is lost in the graph",
        "Convert the classifier inside, and give the threshold to the manifest: the agent applies it.",
    ),
    _rule(
        "VotingClassifier",
        _truthy("flatten_transform"),
        "the converter does not do flatten_transform=True, the default",
        "Set flatten_transform=False; the answers are the same.",
    ),
    _rule(
        "GaussianProcessClassifier",
        _always,
        "its graph needs an operator that onnxruntime on devices does not have (com.microsoft Solve)",
        "Use GaussianProcessRegressor, svc or mlp.",
    ),
    _rule(
        "TransformedTargetRegressor",
        _always,
        "there is no converter for a transformed target",
        "Transform the target in the data, and fit the regressor itself.",
    ),
    _rule(
        "EllipticEnvelope IsolationForest LocalOutlierFactor OneClassSVM SGDOneClassSVM",
        _always,
        "outlier detectors are neither classifiers nor regressors, and the schema of outputs has no place for them",
        "Label outliers and train a classifier.",
    ),
    _rule(
        "FunctionTransformer",
        _has_function,
        "a Python function can't be put into a graph",
        "Use a named transformer (scaling, PowerTransformer, PolynomialFeatures), or compute the column before.",
    ),
    _rule(
        "SplineTransformer",
        _always,
        "there is no converter for splines",
        "Use PolynomialFeatures or KBinsDiscretizer.",
    ),
    _rule(
        "IterativeImputer KNNImputer",
        _always,
        "there is no converter that runs on the devices' opset",
        "Use SimpleImputer (`impute` in the recipe).",
    ),
    _rule(
        "SimpleImputer",
        _truthy("add_indicator"),
        "the indicator columns are lost in the graph",
        "Put MissingIndicator beside the imputer, or leave add_indicator unset.",
    ),
    _rule(
        "OneHotEncoder",
        _infrequent,
        'handle_unknown="infrequent_if_exist" converts, and fails at run time on an unknown category',
        'Use handle_unknown="ignore".',
    ),
    _rule(
        "CountVectorizer TfidfVectorizer HashingVectorizer DictVectorizer",
        _always,
        "a model takes numbers; text needs a locale that small devices don't have",
        "Compute numbers from text before the model.",
    ),
)


def check_convertible(estimator: Any, schema: FeatureSchema) -> None:
    """Refuse what is known to convert wrongly or not at all, anywhere inside `estimator`.

    Args:
        estimator: fitted.
        schema: of the rows it will get.

    Raises:
        ConvertError: convert.refused, with the reason and the way round.
    """
    for part in parts(estimator):
        for rule in RULES:
            if part.is_a(rule.kinds) and rule.applies(part, schema):
                message = f"{type(part.estimator).__name__} can't be shipped: {rule.reason}."
                raise ConvertError("convert.refused", message, remedy=rule.way_round)
    last = Part(final_estimator(estimator), imputed=False, direct=False)
    if _predicts_several(last, schema):
        message = f"{type(last.estimator).__name__} predicts several targets; expected one."
        raise ConvertError("convert.refused", message, remedy="Train one model per target.")
