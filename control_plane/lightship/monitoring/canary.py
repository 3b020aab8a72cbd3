"""Monitoring: may the canary go on? Judged against devices that serve the old model at the same time.

Rules of this room:
* pure: counts of two groups in, a verdict with its reasons out;
* three outcomes. `inconclusive` holds the rollout; telemetry that is missing or absurd is inconclusive, never a pass;
* the season, the hour and the customers are the same for both groups, so what differs is the model;
* errors decide. Looking often must not make them more likely to condemn: they are tested at most `looks` times, at
  doubling numbers of labels, each at alpha/looks;
* server errors may be looked at any time: their test is an e-process;
* a difference in what the models predict is a reason to wait for labels, and no fault by itself. Where there are
  enough devices, each is compared with its own past, and the two groups by their devices' changes (Hotelling): devices
  that have always differed make no difference;
* where more of the canary's devices drift than of the control's, they see other inputs, and nothing is concluded.

Sources: Fisher's exact test; Newcombe 1998, Statistics in Medicine 17:873, method 10 (score interval of a difference);
Ville's inequality for nonnegative martingales (the anytime-valid test of server errors).
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import SettingsError

from .groups import between_p, differences, more_drift_p
from .tails import fisher_greater
from .two_sample import two_sample

Outcome = Literal["pass", "fail", "inconclusive"]

#: One-sided 90 %: the quantile of the standard normal distribution.
Z90: Final = 1.2815515655446004
#: Odds ratios over which the e-process of server errors is averaged.
_ODDS: Final = (1.5, 2.0, 4.0, 8.0, 16.0, 64.0)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a device predicted, per class."""

    now: tuple[int, ...]  # since the canary began to serve
    before: tuple[int, ...]  # with the model it had until then


class GroupEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of devices has shown since the canary began to serve. None or NaN: the telemetry is missing."""

    rows: float | None
    predictions: tuple[float, ...] | None = None  # per predicted class; empty for a regressor
    labelled: float | None = None
    errors: float | None = None
    failures: float | None = None  # requests answered with a server error
    requests: float | None = None
    devices: int = 0
    changes: tuple[Change, ...] = ()  # of the devices that predicted before and since
    judged: int = 0  # devices whose inputs were judged for drift
    drifting: int = 0  # of them


class CanarySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may set."""

    min_labels: int = 60  # in both groups, before errors are looked at
    min_rows: int = 100  # in both groups, before anything passes
    margin: float = 0.05  # rise of the error rate that may be shipped
    failure_margin: float = 0.02  # rise of the server-error rate that may be shipped
    alpha: float = 0.01  # chance of condemning a canary that is as good, over all looks
    looks: int = 8
    require_labels: bool = True
    effect_floor: float = 0.02  # w0² below which a difference in predictions is no difference

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            SettingsError: settings.invalid.
        """
        sizes = min(self.min_labels, self.min_rows, self.looks) >= 1
        shares = all(0 < s < 1 for s in (self.margin, self.failure_margin, self.alpha))
        if not (sizes and shares and self.effect_floor >= 0):
            raise SettingsError("settings.invalid", "Canary: sizes and looks are at least 1, shares in (0, 1).")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One question, its answer, and the numbers behind it."""

    name: Literal["rows", "errors", "predictions", "drift", "failures"]
    outcome: Outcome
    sentence: str
    numbers: dict[str, float] = {}


class CanaryVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from all checks."""

    outcome: Outcome
    checks: tuple[Check, ...]

    @property
    def sentence(self) -> str:
        """Why: the checks that decided."""
        return " ".join(c.sentence for c in self.checks if c.outcome == self.outcome) or self.checks[0].sentence


class _Rate(NamedTuple):
    """Events among trials, both known and possible."""

    events: int
    trials: int

    @property
    def value(self) -> float:
        return self.events / self.trials if self.trials else 0.0


def due_look(labelled: float | None, settings: CanarySettings | None = None, taken: int = -1) -> int | None:
    """The look that is due when the smaller group has `labelled` labels, or None when there is none.

    Look k is due from min_labels·2^k labels on, and once only: pass the last look taken as `taken`. Looks that were
    jumped over are lost, which costs nothing.
    """
    settings = settings or CanarySettings()
    if labelled is None or not math.isfinite(labelled) or labelled < settings.min_labels:
        return None
    look = min(int(labelled / settings.min_labels).bit_length() - 1, settings.looks - 1)
    return look if look > taken else None


def judge_canary(
    canary: GroupEvidence, control: GroupEvidence, settings: CanarySettings, look: int | None
) -> CanaryVerdict:
    """Judge the canary against concurrent control devices.

    Fail: at this look, Fisher's one-sided p of the canary's errors is at most alpha/looks; or its server errors
    exceed the control's beyond chance and `failure_margin`. Pass: enough rows; errors are shown, at this look, to
    rise by no more than `margin` (upper 90 % bound); server errors likewise; and predictions are alike, or the
    errors have answered that question. Everything else is inconclusive.

    Args:
        canary: the devices with the new model.
        control: devices with the old one, over the same time.
        settings: margins and levels.
        look: what `due_look` gives for the smaller number of labels; None between looks, when errors decide nothing.
    """
    errors = _errors(
        _rate(canary.errors, canary.labelled), _rate(control.errors, control.labelled), settings, look, "the control"
    )
    checks = (
        _rows((canary, control), settings),
        errors,
        _paired(canary, control, settings) or _predictions(canary, control, settings),
        _drift(canary, control, settings),
        _failures(canary, control, settings),
    )
    return combine(checks, settings)


def judge_first(
    canary: GroupEvidence,
    reference_errors: int,
    reference_labelled: int,
    settings: CanarySettings,
    look: int | None,
) -> CanaryVerdict:
    """Judge a first rollout, where no device serves another model to compare with.

    Errors are compared with those of the bundle's own held-out rows, server errors with `failure_margin` itself.
    It is the weaker question: a field that is harder than the held-out rows looks like a worse model.

    Args:
        canary: the devices with the model.
        reference_errors: errors on the held-out rows, from the bundle's profile.
        reference_labelled: the number of those rows.
        settings: margins and levels.
        look: what `due_look` gives for the canary's labels; None between looks.
    """
    known = _rate(reference_errors, reference_labelled)
    checks = (
        _rows((canary,), settings),
        _errors(_rate(canary.errors, canary.labelled), known, settings, look, "the held-out rows"),
        _failures_alone(_rate(canary.failures, canary.requests), settings),
    )
    return combine(checks, settings)


def combine(checks: tuple[Check, ...], settings: CanarySettings) -> CanaryVerdict:
    """The verdict that follows from `checks`.

    A caller that keeps the errors check of the last look may put it in the place of one made between looks.
    """
    outcomes = {c.name: c.outcome for c in checks}
    if "fail" in outcomes.values():
        return CanaryVerdict(outcome="fail", checks=checks)
    if outcomes["errors"] == "pass":
        outcomes["predictions"] = "pass"  # whether another prediction is a worse one has been answered
    elif not settings.require_labels:
        outcomes["errors"] = "pass"
    passes = set(outcomes.values()) == {"pass"}
    return CanaryVerdict(outcome="pass" if passes else "inconclusive", checks=checks)


def _rows(groups: tuple[GroupEvidence, ...], settings: CanarySettings) -> Check:
    rows = [_count(g.rows) for g in groups]
    known = [r for r in rows if r is not None]
    if len(known) < len(rows):
        return Check(name="rows", outcome="inconclusive", sentence="The number of rows is not known for every group.")
    fewest = min(known)
    if fewest < settings.min_rows:
        sentence = f"Expected at least {settings.min_rows} rows in each group, found {fewest}."
        return Check(name="rows", outcome="inconclusive", sentence=sentence, numbers={"rows": fewest})
    return Check(
        name="rows", outcome="pass", sentence=f"Each group served at least {fewest} rows.", numbers={"rows": fewest}
    )


def _errors(
    canary: _Rate | None, known: _Rate | None, settings: CanarySettings, look: int | None, against: str
) -> Check:
    if canary is None or known is None:
        return Check(name="errors", outcome="inconclusive", sentence="Label telemetry is missing or inconsistent.")
    fewest = min(canary.trials, known.trials)
    numbers = {"canary": canary.value, "control": known.value, "labelled": float(fewest)}
    if fewest < settings.min_labels:
        sentence = f"Expected {settings.min_labels} labels in each group, found {fewest}."
        return Check(name="errors", outcome="inconclusive", sentence=sentence, numbers=numbers)
    if look is None or not 0 <= look < settings.looks:
        sentence = f"{fewest} labels: the next look at the errors is not due."
        return Check(name="errors", outcome="inconclusive", sentence=sentence, numbers=numbers)
    p = fisher_greater(canary.events, canary.trials, known.events, known.trials)
    upper = difference_upper(canary.events, canary.trials, known.events, known.trials)
    numbers |= {"p_value": p, "upper": upper, "look": float(look)}
    rates = f"The canary errs in {canary.value:.1%}, {against} in {known.value:.1%} of labelled rows"
    if p <= settings.alpha / settings.looks:
        return Check(name="errors", outcome="fail", sentence=f"{rates} (p = {p:.1e}): worse.", numbers=numbers)
    bound = f"{rates}; the rise is below {upper:.1%}"
    if upper <= settings.margin:
        return Check(name="errors", outcome="pass", sentence=f"{bound}, as it should be.", numbers=numbers)
    sentence = f"{bound}, which is above the margin of {settings.margin:.1%}."
    return Check(name="errors", outcome="inconclusive", sentence=sentence, numbers=numbers)


def _predictions(canary: GroupEvidence, control: GroupEvidence, settings: CanarySettings) -> Check:
    if canary.predictions == control.predictions == ():
        sentence = "The model predicts numbers: there are no classes to compare."
        return Check(name="predictions", outcome="pass", sentence=sentence)
    ours, theirs = _counts(canary.predictions), _counts(control.predictions)
    if ours is None or theirs is None or len(ours) != len(theirs) or not sum(ours) or not sum(theirs):
        return Check(name="predictions", outcome="inconclusive", sentence="There are no predictions to compare.")
    test = two_sample(ours, theirs)
    p = float(test.p_value(settings.effect_floor))
    numbers = {"p_value": p, "statistic": float(test.statistic), "df": float(test.df)}
    if min(sum(ours), sum(theirs)) < settings.min_rows:
        sentence = f"Expected {settings.min_rows} predictions in each group."
        return Check(name="predictions", outcome="inconclusive", sentence=sentence, numbers=numbers)
    if p <= settings.alpha:
        sentence = f"The canary predicts other classes than the control (p = {p:.1e}); labels will tell."
        return Check(name="predictions", outcome="inconclusive", sentence=sentence, numbers=numbers)
    return Check(name="predictions", outcome="pass", sentence="Predictions are alike.", numbers=numbers)


def _paired(canary: GroupEvidence, control: GroupEvidence, settings: CanarySettings) -> Check | None:
    """Predictions, each device's against its own past; None with too few devices."""
    ours, theirs = _moved(canary.changes, settings.min_rows), _moved(control.changes, settings.min_rows)
    if ours is None or theirs is None or ours.shape[1] != theirs.shape[1]:
        return None
    devices, free = len(ours) + len(theirs), ours.shape[1] - 1
    if free < 1 or min(len(ours), len(theirs)) < 2 or devices < 3 * free + 1:
        return None
    p = between_p(ours, theirs)
    apart = ours.mean(axis=0) - theirs.mean(axis=0)
    totals = np.sum([c.now for c in (*canary.changes, *control.changes)], axis=0, dtype=np.float64)
    effect = float((apart**2 / np.maximum(totals / totals.sum(), 1e-3)).sum())
    numbers = {"p_value": p, "effect": effect, "devices": float(devices)}
    if p <= settings.alpha and effect > settings.effect_floor:
        sentence = f"On the canary's devices predictions have changed otherwise than on the control's (p = {p:.1e}); "
        return Check(
            name="predictions", outcome="inconclusive", sentence=f"{sentence}labels will tell.", numbers=numbers
        )
    return Check(name="predictions", outcome="pass", sentence="Predictions have changed alike.", numbers=numbers)


def _moved(changes: tuple[Change, ...], least: int) -> npt.NDArray[np.float64] | None:
    """Per device, its shares now less those before, `[devices, classes]`; devices with few rows are left out."""
    held = [c for c in changes if len(c.now) == len(c.before) and min(sum(c.now), sum(c.before)) >= least]
    if not held or len({len(c.now) for c in held}) > 1:
        return None
    return differences([c.now for c in held], [c.before for c in held])


def _drift(canary: GroupEvidence, control: GroupEvidence, settings: CanarySettings) -> Check:
    numbers = {"canary": float(canary.drifting), "control": float(control.drifting)}
    if not canary.judged or not control.judged:
        return Check(name="drift", outcome="pass", sentence="Inputs were not judged in both groups.", numbers=numbers)
    p = more_drift_p(canary.drifting, canary.judged, control.drifting, control.judged)
    said = f"{canary.drifting} of {canary.judged} devices of the canary drift, {control.drifting} of {control.judged} "
    said += "of the control's"
    if p <= settings.alpha:
        sentence = f"{said} (p = {p:.1e}): they see other inputs."
        return Check(name="drift", outcome="inconclusive", sentence=sentence, numbers=numbers | {"p_value": p})
    return Check(name="drift", outcome="pass", sentence=f"{said}.", numbers=numbers | {"p_value": p})


def _failures(canary: GroupEvidence, control: GroupEvidence, settings: CanarySettings) -> Check:
    ours, theirs = _rate(canary.failures, canary.requests), _rate(control.failures, control.requests)
    if ours is None or theirs is None:
        return Check(name="failures", outcome="inconclusive", sentence="Request telemetry is missing or inconsistent.")
    fewest = min(ours.trials, theirs.trials)
    numbers = {"canary": ours.value, "control": theirs.value, "requests": float(fewest)}
    if not fewest:
        return Check(name="failures", outcome="inconclusive", sentence="A group has no requests.", numbers=numbers)
    # Were both alike, a server error would be the canary's as often as a request is.
    share = ours.trials / (ours.trials + theirs.trials)
    evidence = e_value(ours.events, theirs.events, share)
    upper = difference_upper(ours.events, ours.trials, theirs.events, theirs.trials)
    numbers |= {"e_value": evidence, "upper": upper}
    rates = f"Server errors: {ours.value:.2%} of the canary's requests, {theirs.value:.2%} of the control's"
    worse = evidence >= 1 / settings.alpha and ours.value - theirs.value > settings.failure_margin
    bounded = upper <= settings.failure_margin
    return _failure_check(rates, settings, numbers, worse=worse, bounded=bounded, requests=fewest)


def _failures_alone(canary: _Rate | None, settings: CanarySettings) -> Check:
    if canary is None:
        return Check(name="failures", outcome="inconclusive", sentence="Request telemetry is missing or inconsistent.")
    numbers = {"canary": canary.value, "requests": float(canary.trials)}
    if not canary.trials:
        return Check(name="failures", outcome="inconclusive", sentence="There are no requests.", numbers=numbers)
    evidence = e_value(canary.events, canary.trials - canary.events, settings.failure_margin)
    upper = wilson(canary.events, canary.trials)[1]
    numbers |= {"e_value": evidence, "upper": upper}
    rates = f"Server errors: {canary.value:.2%} of the canary's requests"
    worse = evidence >= 1 / settings.alpha
    bounded = upper <= settings.failure_margin
    return _failure_check(rates, settings, numbers, worse=worse, bounded=bounded, requests=canary.trials)


def _failure_check(
    rates: str, settings: CanarySettings, numbers: dict[str, float], *, worse: bool, bounded: bool, requests: int
) -> Check:
    if worse:
        return Check(name="failures", outcome="fail", sentence=f"{rates}: too many.", numbers=numbers)
    if bounded and requests >= settings.min_rows:
        return Check(name="failures", outcome="pass", sentence=f"{rates}.", numbers=numbers)
    sentence = f"{rates}; {requests} requests don't bound them to {settings.failure_margin:.1%} yet."
    return Check(name="failures", outcome="inconclusive", sentence=sentence, numbers=numbers)


def e_value(hits: int, misses: int, share: float) -> float:
    """Evidence that a trial hits more often than `share`; it exceeds 1/alpha with chance at most alpha, ever.

    The mean over odds ratios ρ of the likelihood ratio of θ = ρs/(ρs + 1 − s) to s = `share`: a nonnegative
    martingale that starts at 1 while the chance is s, so Ville's inequality allows a look after every trial.
    """
    if not 0 < share < 1:
        return 1.0
    total = 0.0
    for odds in _ODDS:
        scale = odds * share + 1 - share
        total += math.exp(min(hits * math.log(odds) - (hits + misses) * math.log(scale), 700.0))
    return total / len(_ODDS)


def wilson(events: int, trials: int, z: float = Z90) -> tuple[float, float]:
    """Wilson's score interval of a rate: lower and upper bound, each one-sided at the level of `z`."""
    p, square = events / trials, z * z
    centre = p + square / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def difference_upper(events_a: int, trials_a: int, events_b: int, trials_b: int, z: float = Z90) -> float:
    """The one-sided upper bound of rate a − rate b (Newcombe's method 10)."""
    a, b = events_a / trials_a, events_b / trials_b
    return a - b + math.hypot(wilson(events_a, trials_a, z)[1] - a, b - wilson(events_b, trials_b, z)[0])


def _count(value: float | None) -> int | None:
    """A known, possible count, or None."""
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else None


def _counts(values: tuple[float, ...] | None) -> tuple[int, ...] | None:
    counts = tuple(_count(v) for v in values or ())
    known = tuple(c for c in counts if c is not None)
    return known if known and len(known) == len(counts) else None


def _rate(events: float | None, trials: float | None) -> _Rate | None:
    """A rate whose two counts are known and fit each other, or None."""
    hits, among = _count(events), _count(trials)
    return _Rate(hits, among) if hits is not None and among is not None and hits <= among else None
