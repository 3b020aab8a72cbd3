"""Training: the gate - may this model go on? Pure.

Rules:
* every limit of the recipe is checked and said, the ones that hold as well;
* a metric that was not measured, or is not a number, does not hold;
* the champion is judged on the same rows as the challenger, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from lightship_agent.contract.codes import GateError

from .metrics import LOWER_IS_BETTER, PRIMARY, Metrics


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison; `sentence` says it in words."""

    name: str
    value: float | None
    limit: float
    holds: bool
    sentence: str


class GateDecision(msgspec.Struct, frozen=True, kw_only=True):
    """All comparisons, and whether all hold."""

    passed: bool
    checks: tuple[Check, ...]


def decide_gate(
    metrics: Metrics,
    gate: Mapping[str, float],
    champion: Metrics | None = None,
    max_regression: float = 0.02,
) -> GateDecision:
    """Compare `metrics` with the recipe's limits and with the champion.

    Args:
        metrics: of the challenger.
        gate: limits by metric name (`Metrics.flat`): minima, but maxima for `mae` and `rmse`.
        champion: metrics of the current champion on the same rows; None when there is none.
        max_regression: how much less than the champion's the primary metric may be.
    """
    measured = metrics.flat
    checks = [_limit(name, measured.get(name), limit) for name, limit in sorted(gate.items())]
    if champion is not None:
        checks.append(_against(metrics, champion, max_regression))
    return GateDecision(passed=all(c.holds for c in checks), checks=tuple(checks))


def require_gate(decision: GateDecision) -> None:
    """Refuse to go on when a check does not hold.

    Raises:
        GateError: gate.metric, or gate.champion when only the comparison with the champion failed.
    """
    broken = [c for c in decision.checks if not c.holds]
    if not broken:
        return
    code = "gate.champion" if all(c.name.startswith("champion:") for c in broken) else "gate.metric"
    raise GateError(code, " ".join(c.sentence for c in broken))


def _limit(name: str, value: float | None, limit: float) -> Check:
    lower = name in LOWER_IS_BETTER
    side = "at most" if lower else "at least"
    if value is None or not math.isfinite(value):
        said = "was not measured" if value is None else f"is {value}"
        sentence = f"{name} {said}, expected {side} {limit:g}."
        return Check(name=name, value=None, limit=limit, holds=False, sentence=sentence)
    holds = value <= limit if lower else value >= limit
    sentence = f"{name} is {value:.4f}, {'as' if holds else 'not as'} expected {side} {limit:g}."
    return Check(name=name, value=value, limit=limit, holds=holds, sentence=sentence)


def _against(metrics: Metrics, champion: Metrics, max_regression: float) -> Check:
    primary = PRIMARY[metrics.task]
    name = f"champion:{primary}"
    ours, theirs = metrics.values.get(primary, math.nan), champion.values.get(primary, math.nan)
    limit = theirs - max_regression
    comparable = (metrics.task, metrics.rows) == (champion.task, champion.rows)
    if not comparable or not math.isfinite(ours) or not math.isfinite(limit):
        sentence = f"{primary} can't be compared: champion and challenger were not measured on the same rows."
        return Check(name=name, value=None, limit=0.0, holds=False, sentence=sentence)
    holds = ours >= limit
    sentence = (
        f"{primary} is {ours:.4f} against the champion's {theirs:.4f}, "
        f"{'within' if holds else 'worse than'} the allowed regression of {max_regression:g}."
    )
    return Check(name=name, value=ours, limit=limit, holds=holds, sentence=sentence)
