"""Training: the recipe, everything that decides a run besides the data.

Rules:
* a recipe is a small file (TOML or JSON) with a digest: the same recipe on the same dataset is the same run;
* an estimator is a short name from the table, or a dotted path under `sklearn.`; other packages only when the
  caller lists them: a recipe must not be able to import whatever it likes;
* no arithmetic in front of trees: scaling in float64 here and in float32 on the device moves rows across thresholds.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from sklearn.base import BaseEstimator, is_classifier, is_regressor
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils._param_validation import InvalidParameterError  # the one class that says "bad value"

from lightship_agent.contract.codes import TrainError
from lightship_agent.contract.manifest import PROVIDERS
from lightship_agent.contract.wire import canonical_json, sha256_hex

SHORT_NAMES: Final[dict[str, str]] = {
    "logistic-regression": "sklearn.linear_model.LogisticRegression",
    "random-forest": "sklearn.ensemble.RandomForestClassifier",
    "extra-trees": "sklearn.ensemble.ExtraTreesClassifier",
    "gradient-boosting": "sklearn.ensemble.GradientBoostingClassifier",
    "hist-gradient-boosting": "sklearn.ensemble.HistGradientBoostingClassifier",
    "mlp": "sklearn.neural_network.MLPClassifier",
    "svc": "sklearn.svm.SVC",
    "decision-tree": "sklearn.tree.DecisionTreeClassifier",
    "k-neighbors": "sklearn.neighbors.KNeighborsClassifier",
    "gaussian-nb": "sklearn.naive_bayes.GaussianNB",
    "linear-regression": "sklearn.linear_model.LinearRegression",
    "ridge": "sklearn.linear_model.Ridge",
    "random-forest-regressor": "sklearn.ensemble.RandomForestRegressor",
    "extra-trees-regressor": "sklearn.ensemble.ExtraTreesRegressor",
    "gradient-boosting-regressor": "sklearn.ensemble.GradientBoostingRegressor",
    "hist-gradient-boosting-regressor": "sklearn.ensemble.HistGradientBoostingRegressor",
    "mlp-regressor": "sklearn.neural_network.MLPRegressor",
    "svr": "sklearn.svm.SVR",
    "decision-tree-regressor": "sklearn.tree.DecisionTreeRegressor",
    "k-neighbors-regressor": "sklearn.neighbors.KNeighborsRegressor",
}
_TREE_MODULES: Final = ("sklearn.tree.", "sklearn.ensemble.")
#: Of `sklearn.ensemble`, those whose members are the user's own and need not be trees.
_NOT_TREES: Final = ("Voting", "Stacking")


MAX_THREADS: Final = 64


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to fit, how to judge it, when it may go on, and how devices shall run it.

    Attributes:
        estimator: a short name or a dotted path.
        params: keyword arguments of the estimator.
        scale: put a StandardScaler in front (refused for trees, which need none).
        impute: fill gaps in front of everything else; for models that don't take NaN.
        test_share: held-out share, within (0, 1).
        seed: of the split and of the estimator.
        gate: the least a metric may be, by name; for `mae` and `rmse`, the most.
        max_regression: how far below the champion a challenger may be on the same rows.
        explain: how the features' importances are found; `shap` and `lime` need the extras of these names.
        precision: what the model on devices computes in; fp16 and int8 are for networks.
        providers: what shall compute there rather than the CPU, the best first; a device takes what it has and allows.
        intra_op_threads: that one prediction may take there.
        graph_optimization: how far the runtime there may rearrange the graph.
    """

    estimator: str
    params: dict[str, Any] = {}
    scale: bool = False
    impute: Literal["", "mean", "median"] = ""
    test_share: float = 0.25
    seed: int = 0
    gate: dict[str, float] = {}
    max_regression: float = 0.02
    explain: Literal["permutation", "shap", "lime"] = "permutation"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    providers: tuple[str, ...] = ()
    intra_op_threads: int = 1
    graph_optimization: Literal["all", "extended", "basic", "none"] = "all"

    def __post_init__(self) -> None:
        """Numbers make sense.

        Raises:
            TrainError: train.recipe.
        """
        if not 0 < self.test_share < 1:
            raise TrainError("train.recipe", f"test_share: expected a share within 0 and 1, found {self.test_share}.")
        if not 0 <= self.seed < 2**32:
            raise TrainError("train.recipe", f"seed: expected 0 to 4294967295, found {self.seed}.")
        if not math.isfinite(self.max_regression) or self.max_regression < 0:
            raise TrainError("train.recipe", f"max_regression: expected 0 or more, found {self.max_regression}.")
        check_wishes(self.providers, self.intra_op_threads)
        for metric, limit in self.gate.items():
            if not math.isfinite(limit):
                raise TrainError("train.recipe", f"gate.{metric}: expected a number, found {limit}.")


def check_wishes(providers: tuple[str, ...], threads: int) -> None:
    """Refuse wishes that no device could know of.

    Raises:
        TrainError: train.recipe.
    """
    unknown = [name for name in providers if name not in PROVIDERS]
    if unknown:
        message = f"providers: expected some of {', '.join(PROVIDERS)}, found {unknown[0][:40]!r}."
        raise TrainError("train.recipe", message)
    if not 1 <= threads <= MAX_THREADS:
        raise TrainError("train.recipe", f"intra_op_threads: expected 1 to {MAX_THREADS}, found {threads}.")


def load_recipe(path: Path) -> Recipe:
    """The recipe in a `.toml` or `.json` file.

    Raises:
        TrainError: train.recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plain = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as e:
        raise TrainError("train.recipe", f"{path}: {e.strerror or e}.") from e
    except ValueError as e:  # TOML, JSON and UTF-8 errors all are
        raise TrainError("train.recipe", f"{path.name} is not readable as TOML or JSON: {e}.") from e
    return parse_recipe(plain)


def parse_recipe(plain: Any) -> Recipe:
    """The recipe in plain data.

    Raises:
        TrainError: train.recipe.
    """
    try:
        return msgspec.convert(plain, Recipe)
    except msgspec.ValidationError as e:
        known = ", ".join(Recipe.__struct_fields__)
        raise TrainError("train.recipe", f"The recipe is malformed: {e}.", remedy=f"Its fields are: {known}.") from e


def recipe_digest(recipe: Recipe) -> str:
    """sha256 of the canonical JSON."""
    return sha256_hex(canonical_json(recipe))


def build_estimator(recipe: Recipe, *, allow_modules: tuple[str, ...] = ()) -> Any:
    """The unfitted estimator of `recipe`, in a pipeline where it scales or imputes, seeded.

    Args:
        recipe: what to build.
        allow_modules: top-level packages besides scikit-learn that may be imported.

    Raises:
        TrainError: train.unknown-estimator, train.recipe.
    """
    kind = resolve_estimator(recipe.estimator, allow_modules=allow_modules)
    if recipe.scale and is_tree_model(kind):
        message = f"{kind.__name__} is made of trees: scaling moves rows across its thresholds, and trees need none."
        raise TrainError("train.recipe", message, remedy="Drop `scale` from the recipe.")
    estimator = _construct(kind, recipe.params)
    steps: list[tuple[str, Any]] = []
    if recipe.impute:
        steps.append(("impute", SimpleImputer(strategy=recipe.impute, keep_empty_features=True)))
    if recipe.scale:
        steps.append(("scale", StandardScaler()))
    model = Pipeline([*steps, ("model", estimator)]) if steps else estimator
    _seed(model, recipe.seed)
    return model


def resolve_estimator(name: str, *, allow_modules: tuple[str, ...] = ()) -> Any:
    """The estimator class of a short name or dotted path.

    Raises:
        TrainError: train.unknown-estimator, with the nearest names.
    """
    path = SHORT_NAMES.get(name, name)
    module, _, attribute = path.rpartition(".")
    top = path.partition(".")[0]
    if not module or top not in ("sklearn", *allow_modules):
        near = difflib.get_close_matches(name, SHORT_NAMES, n=3, cutoff=0.4)
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(SHORT_NAMES)}."
        message = f"{name!r} is neither a known estimator nor a path under: {', '.join(('sklearn', *allow_modules))}."
        raise TrainError("train.unknown-estimator", message, remedy=remedy)
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        near = _near_in_module(module, attribute)
        remedy = f"Did you mean {' or '.join(near)}?" if near else ""
        raise TrainError("train.unknown-estimator", f"There is no {path!r}: {e}.", remedy=remedy) from e
    if not (isinstance(kind, type) and issubclass(kind, BaseEstimator) and hasattr(kind, "predict")):
        raise TrainError("train.unknown-estimator", f"{path!r} is not a classifier or regressor class.")
    return kind


def _near_in_module(module: str, attribute: str) -> list[str]:
    try:
        names = [n for n in dir(importlib.import_module(module)) if n[:1].isupper()]
    except ImportError:
        return []
    return [f"{module}.{n}" for n in difflib.get_close_matches(attribute, names, n=3)]


def is_tree_model(kind: type) -> bool:
    """Whether the class splits on thresholds (trees, forests, boosting)."""
    return any(
        f"{base.__module__}.".startswith(_TREE_MODULES) and not base.__name__.startswith(_NOT_TREES)
        for base in kind.__mro__
        if not base.__name__.startswith(("Base", "_Base"))
    )


def check_task(estimator: Any, task: str, name: str) -> None:
    """Refuse a classifier for a regression dataset, and the other way round.

    Raises:
        TrainError: train.recipe.
    """
    fits = is_classifier(estimator) if task == "classification" else is_regressor(estimator)
    if fits:
        return
    other = f"{name}-regressor" if task == "regression" else name.removesuffix("-regressor")
    remedy = f"Use {other!r}." if other in SHORT_NAMES and other != name else ""
    wanted = "classifier" if task == "classification" else "regressor"
    raise TrainError("train.recipe", f"The dataset asks for a {wanted}; {name!r} is not one.", remedy=remedy)


def _construct(kind: Any, params: dict[str, Any]) -> Any:
    try:
        estimator = kind(**params)
    except TypeError as e:
        valid = sorted(kind().get_params(deep=False)) if _constructible(kind) else []
        remedy = f"Valid names: {', '.join(valid)}." if valid else ""
        raise TrainError("train.recipe", f"{kind.__name__}: {e}.", remedy=remedy) from e
    check = getattr(estimator, "_validate_params", None)
    if check is None:
        return estimator
    try:
        check()
    except InvalidParameterError as e:
        remedy = f"Valid names: {', '.join(sorted(estimator.get_params(deep=False)))}."
        raise TrainError("train.recipe", str(e), remedy=remedy) from e
    return estimator


def _constructible(kind: Any) -> bool:
    try:
        kind()
    except TypeError:
        return False
    return True


def _seed(model: Any, seed: int) -> None:
    """Give every part that draws random numbers the recipe's seed, unless the recipe set one itself."""
    unset = {k: seed for k, v in model.get_params().items() if k.split("__")[-1] == "random_state" and v is None}
    model.set_params(**unset)
