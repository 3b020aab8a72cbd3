"""Convert: the parity gate - is the ONNX model the same model? Not a report: what does not agree does not ship.

Rules:
* no label may differ where the original is not in doubt itself; a handful of exact ties may;
* numbers of continuous models differ by at most 1e-4; trees may differ more on at most one row in a thousand,
  for a row on a threshold falls to one side or the other;
* a model in fewer bits is compared with itself in 32, on rows as they come and not at the edges of what may come: an
  INT8 model covers what its training rows show. Its limits are wider, and stated;
* values and decision scores are measured against their own size, probabilities as they are;
* one row at a time and 64 at a time must say the same; NaN comes out in the same places.

Source: measured on 84 estimators; agreeing conversions stay below 4e-5.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import ConvertError

from .convert_child import class_keys
from .converter import Converted
from .golden import golden_rows
from .rows import evenly, parity_rows
from .session import Answer, OnnxModel, margins
from .walk import TREES, parts

__all__ = ["ParityReport", "check_import", "check_parity", "golden_rows", "parity_rows", "require"]

Rule = Literal["continuous", "trees", "import", "fp16", "int8"]
TOLERANCE: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rule allows.

    Attributes:
        tolerance: how far a number may be off,
        share: but for this share of the rows;
        flips: the share of the rows that may get another label where the original is not in doubt,
        tie: which it is where its two best scores are closer than this;
        ties: the share of the rows that may get another label where it is.
    """

    tolerance: float = TOLERANCE
    share: float = 0.0
    flips: float = 0.0
    tie: float = 2e-5
    ties: float = 1e-3


LIMITS: Final[dict[Rule, Limits]] = {
    "continuous": Limits(),
    "import": Limits(),
    "trees": Limits(tolerance=1e-3, share=1e-3),
    # Half floats have eleven bits. Of eight bits and seven nobody expects the same numbers, but the same answers.
    "fp16": Limits(tolerance=5e-3, tie=5e-3, ties=1e-2),
    "int8": Limits(tolerance=5e-2, share=2e-2, flips=1e-2, tie=2e-2, ties=2e-2),
}
TIE: Final = LIMITS["continuous"].tie
_BATCH: Final = 64
_SINGLE_ROWS: Final = 512
_SHOWN: Final = 10


class RowFailure(msgspec.Struct, frozen=True, kw_only=True):
    """One row that does not agree: the position among the parity rows, and both answers."""

    row: int
    what: str
    expected: tuple[float, ...]
    found: tuple[float, ...]


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The evidence.

    Attributes:
        rule: how it was judged.
        rows: how many were compared.
        label_flips: rows with another label where the original is not in doubt.
        tie_flips: rows with another label where it is.
        max_diff: the largest difference of a score or value.
        p99_diff: that 99 % of rows stay below.
        share_over: rows whose difference exceeds the rule's tolerance, as a share.
        tolerance: of the rule.
        batch_diff: the largest difference between one row at a time and 64 at a time.
        nan_rows: rows where only one of the two says NaN.
        metrics: of a foreign model on reference data: accuracy, or mean absolute error.
        passed: whether all rules hold.
        reasons: one sentence per rule that does not.
        failures: the first rows that do not agree.
    """

    rule: Rule
    rows: int
    label_flips: int
    tie_flips: int
    max_diff: float
    p99_diff: float
    share_over: float
    tolerance: float
    batch_diff: float
    nan_rows: int
    metrics: dict[str, float] = {}
    passed: bool
    reasons: tuple[str, ...]
    failures: tuple[RowFailure, ...]


@dataclass(frozen=True, eq=False)
class _Expected:
    """What the original says: class indices, and scores `[n, C]` (also for ties) or values `[n, 1]`."""

    rows: int
    labels: npt.NDArray[np.int64] | None
    numbers: npt.NDArray[np.float64] | None


def check_parity(estimator: Any, converted: Converted, rows: npt.NDArray[np.float32]) -> ParityReport:
    """Compare the original with the converted model on `rows`.

    Args:
        estimator: the original, fitted.
        converted: what became of it.
        rows: float32 `[n, width]`, from `parity_rows`.

    Raises:
        ConvertError: convert.parity when the original refuses rows that its schema allows; convert.failed when the
            ONNX model fails while predicting.
    """
    model = OnnxModel(converted.onnx, converted.outputs)
    expected = _ask(estimator, converted, rows)
    found = model.answer(rows, _BATCH)
    rule: Rule = "trees" if any(p.is_a(TREES) for p in parts(estimator)) else "continuous"
    return _judge(rule, converted, expected, found, _batch_difference(model, rows, found))


def check_reduced(before: Converted, after: Converted, rows: npt.NDArray[np.float32]) -> ParityReport:
    """Compare a model in fewer bits with what it was made of, on `rows`, by the limits of its precision.

    Args:
        before: in 32 bits, itself proven.
        after: the same in fewer.
        rows: float32 `[n, width]`, held out.

    Raises:
        ConvertError: convert.failed when either fails while predicting.
    """
    assert after.precision != "fp32"
    told = OnnxModel(before.onnx, before.outputs).answer(rows, _BATCH)
    model = OnnxModel(after.onnx, after.outputs)
    found = model.answer(rows, _BATCH)
    expected = _Expected(len(rows), told.labels, told.numbers)
    return _judge(after.precision, after, expected, found, _batch_difference(model, rows, found))


def require(report: ParityReport) -> None:
    """Refuse to go on when parity does not hold.

    Raises:
        ConvertError: convert.parity.
    """
    if not report.passed:
        remedy = _REDUCED if report.rule in ("fp16", "int8") else _CONVERTED
        raise ConvertError("convert.parity", " ".join(report.reasons), remedy=remedy)


_CONVERTED: Final = (
    "Train without arithmetic in front of trees, with scaled inputs for linear models and sigmoid calibration, "
    "or choose another estimator."
)
_REDUCED: Final = "Stay at fp32, or train with scaled inputs (`scale`): one scale serves all features."


def check_import(
    converted: Converted, rows: npt.NDArray[np.float32], y: npt.NDArray[Any] | None = None
) -> ParityReport:
    """What can be said of a foreign model: it answers, alike one by one and in batches, and how often it is right.

    Args:
        converted: from `import_onnx`.
        rows: reference rows, float32 `[n, width]`.
        y: their truth, where known: int64 class indices, or values.

    Raises:
        ConvertError: convert.failed when the model fails while predicting.
    """
    model = OnnxModel(converted.onnx, converted.outputs)
    found = model.answer(rows, _BATCH)
    single = _batch_difference(model, rows, found)
    numbers = found.numbers
    silent = 0 if numbers is None else int(np.isnan(numbers).any(axis=1).sum())
    reasons = _batch_reasons(single)
    if silent:
        reasons.append(f"{silent} of {len(rows)} rows get no number (NaN).")
    metrics: dict[str, float] = {}
    if y is not None and found.labels is not None:
        metrics["accuracy"] = float((found.labels == y).mean())
    elif y is not None and found.values is not None:
        metrics["mae"] = float(np.abs(found.values.astype(np.float64) - y).mean())
    return ParityReport(
        rule="import",
        rows=len(rows),
        label_flips=single.label_flips,
        tie_flips=0,
        max_diff=single.difference,
        p99_diff=0.0,
        share_over=0.0,
        tolerance=TOLERANCE,
        batch_diff=single.difference,
        nan_rows=silent,
        metrics=metrics,
        passed=not reasons,
        reasons=tuple(reasons),
        failures=(),
    )


def _ask(estimator: Any, converted: Converted, rows: npt.NDArray[np.float32]) -> _Expected:
    """The original's answers.

    Raises:
        ConvertError: convert.parity when it raises.
    """
    outputs = converted.outputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            predicted = np.asarray(estimator.predict(rows)).ravel()
            if outputs.task == "regression":
                return _Expected(len(rows), None, predicted.astype(np.float64)[:, None])
            numbers = _original_scores(estimator, rows, len(outputs.labels))
        except Exception as e:  # any estimator may raise anything; its words are kept
            message = f"The original refuses rows that its schema allows: {type(e).__name__}: {str(e).strip()[:500]}"
            raise ConvertError("convert.parity", message) from e
    keys, order = class_keys(estimator, outputs.labels)
    if keys is None:
        labels = predicted.astype(np.int64)
    else:
        place = {str(k): i for i, k in enumerate(keys)}
        labels = np.array([place[str(p if isinstance(keys[0], str) else int(p))] for p in predicted], dtype=np.int64)
    return _Expected(len(rows), labels, None if numbers is None else numbers[:, order])


def _original_scores(estimator: Any, rows: npt.NDArray[np.float32], classes: int) -> npt.NDArray[np.float64] | None:
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(rows), dtype=np.float64)
    if not hasattr(estimator, "decision_function"):
        return None
    scores = np.asarray(estimator.decision_function(rows), dtype=np.float64)
    if scores.ndim == 1:
        return np.stack([-scores, scores], axis=1)
    return scores if scores.shape[1] == classes else None


def _scale(converted: Converted, expected: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What differences are measured against: 1 for probabilities, else a number's own size or the usual spread."""
    if converted.outputs.score_kind == "probability" and converted.outputs.task == "classification":
        return np.ones_like(expected)
    finite = expected[np.isfinite(expected)]
    spread = float(finite.std()) if len(finite) else 0.0
    return np.asarray(np.maximum(np.nan_to_num(np.abs(expected), posinf=0.0), spread or 1.0), dtype=np.float64)


def _differences(
    expected: npt.NDArray[np.float64], found: npt.NDArray[np.float64], scale: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Per row: the largest scaled difference, and whether NaN is in other places."""
    with np.errstate(invalid="ignore"):
        diff = np.where(expected == found, 0.0, np.abs(expected - found) / scale)
    gaps = np.isnan(expected) != np.isnan(found)
    diff[np.isnan(expected) & np.isnan(found)] = 0.0
    return np.asarray(np.nan_to_num(diff, nan=np.inf).max(axis=1)), gaps.any(axis=1)


def _judge(rule: Rule, converted: Converted, expected: _Expected, found: Answer, single: _Single) -> ParityReport:
    seen = _compare(rule, converted, expected, found)
    reasons = [*_reasons(rule, seen), *_batch_reasons(single)]
    return ParityReport(
        rule=rule,
        rows=len(seen.diff),
        label_flips=int(seen.flips.sum()),
        tie_flips=int(seen.ties.sum()),
        max_diff=float(seen.diff.max()),
        p99_diff=float(np.quantile(seen.diff, 0.99, method="lower")),
        share_over=float(seen.over.mean()),
        tolerance=LIMITS[rule].tolerance,
        batch_diff=single.difference,
        nan_rows=int(seen.gaps.sum()),
        passed=not reasons,
        reasons=tuple(reasons),
        failures=_failures(expected, found, seen),
    )


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Per row: the scaled difference, whether it is over the tolerance, and whether labels or NaN differ."""

    diff: npt.NDArray[np.float64]
    over: npt.NDArray[np.bool_]
    flips: npt.NDArray[np.bool_]
    ties: npt.NDArray[np.bool_]
    gaps: npt.NDArray[np.bool_]


def _compare(rule: Rule, converted: Converted, expected: _Expected, found: Answer) -> _Comparison:
    count = expected.rows
    diff, gaps, flips, ties = np.zeros(count), np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, bool)
    if expected.numbers is not None and found.numbers is not None:
        diff, gaps = _differences(expected.numbers, found.numbers, _scale(converted, expected.numbers))
    if expected.labels is not None:
        assert found.labels is not None  # every converted classifier has a label output
        other = expected.labels != found.labels
        doubt = _in_doubt(converted, expected.numbers, count, LIMITS[rule].tie)
        flips, ties = other & ~doubt, other & doubt
    return _Comparison(diff, diff > LIMITS[rule].tolerance, flips, ties, gaps)


def _in_doubt(
    converted: Converted, scores: npt.NDArray[np.float64] | None, count: int, tie: float
) -> npt.NDArray[np.bool_]:
    if scores is None:
        return np.zeros(count, dtype=bool)
    limit = tie * _scale(converted, scores).max(axis=1)
    return np.asarray(margins(scores) < limit)


def _reasons(rule: Rule, seen: _Comparison) -> list[str]:
    count, limits = len(seen.diff), LIMITS[rule]
    reasons = []
    if seen.flips.sum() > limits.flips * count:
        reasons.append(f"{int(seen.flips.sum())} of {count} rows get another label.")
    if seen.ties.sum() > max(1, count * limits.ties):
        reasons.append(f"{int(seen.ties.sum())} of {count} rows get another label where the original nearly ties.")
    if seen.gaps.any():
        reasons.append(f"{int(seen.gaps.sum())} of {count} rows have NaN in other places.")
    if seen.over.mean() > limits.share:
        reasons.append(
            f"{int(seen.over.sum())} of {count} rows differ by more than {limits.tolerance:g} "
            f"(at most {limits.share:.1%} may), the worst by {seen.diff.max():.3g}."
        )
    return reasons


def _failures(expected: _Expected, found: Answer, seen: _Comparison) -> tuple[RowFailure, ...]:
    shown = []
    for row in np.flatnonzero(seen.flips | seen.over | seen.gaps)[:_SHOWN].tolist():
        if seen.flips[row] and expected.labels is not None and found.labels is not None:
            wanted, got, what = expected.labels[row : row + 1], found.labels[row : row + 1], "label"
        else:
            assert expected.numbers is not None  # only numbers differ by more than a tolerance
            assert found.numbers is not None
            wanted, got, what = expected.numbers[row], found.numbers[row], "numbers"
        pair = (tuple(float(v) for v in wanted), tuple(float(v) for v in got))
        shown.append(RowFailure(row=row, what=what, expected=pair[0], found=pair[1]))
    return tuple(shown)


@dataclass(frozen=True)
class _Single:
    """One row at a time against 64 at a time."""

    rows: int
    label_flips: int
    difference: float


def _batch_difference(model: OnnxModel, rows: npt.NDArray[np.float32], batched: Answer) -> _Single:
    some = evenly(len(rows), _SINGLE_ROWS)
    single = model.answer(rows[some], 1)
    flips, difference = 0, 0.0
    one, many = single.numbers, batched.numbers
    doubt = np.zeros(len(some), dtype=bool)
    if one is not None and many is not None:
        scale = np.maximum(1.0, np.nan_to_num(np.abs(many[some]), posinf=0.0))
        diff, gaps = _differences(many[some], one, scale)
        difference = float("inf") if gaps.any() else float(diff.max())
        if single.scores is not None:
            doubt = margins(many[some]) < TIE * scale.max(axis=1)
    if single.labels is not None and batched.labels is not None:
        flips = int(((single.labels != batched.labels[some]) & ~doubt).sum())
    return _Single(len(some), flips, difference)


def _batch_reasons(single: _Single) -> list[str]:
    reasons = []
    if single.label_flips:
        reasons.append(f"{single.label_flips} of {single.rows} rows get another label alone than in a batch.")
    if single.difference > TOLERANCE:
        reasons.append(f"A row alone and in a batch differs by {single.difference:.3g}.")
    return reasons
