"""Monitoring: has the model become worse, as far as labels tell?

Rules of this room:
* pure; labels per window in, evidence out. It is made anew from all windows each time, so labels may be late, split and
  in any order: only what each window has in the end counts;
* the error rate of the held-out rows and their number come with the bundle: nothing is learnt on the device;
* e-SR: R ← (1 + R)·LR over windows, LR the likelihood of the window's errors at a worse rate over that at p0 + floor,
  averaged over five worse rates. R ≥ A comes no more often than every A windows while the rate is within the floor;
* a regressor's residuals are watched by the same rule, in `residuals`: all streams of labels share one budget.

Sources: Shiryaev-Roberts as an e-detector: Shin, Ramdas, Rinaldo 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from lightship_agent.contract.vectors import add

from .drift_settings import DriftSettings
from .verdict import Performance

#: Odds ratios of the worse rates.
_ODDS: Final = (1.25, 1.5, 2.0, 3.0, 6.0)
#: Evidence is kept below so many times the line, so that it fades when errors do.
_MOST: Final = 10.0
#: Logarithm of the largest likelihood ratio of one window.
_LARGEST: Final = 600.0


class Labelled(NamedTuple):
    """What labels have said of a window; of a regressor also in which cells of the profile its residuals were."""

    window: int
    labelled: int
    errors: int
    residuals: Sequence[int] = ()
    sums: Sequence[int] = ()  # of their steps: Σ, Σ²


class Trial(NamedTuple):
    """Rows of a window, and how many of them were what is watched for."""

    window: int
    rows: int
    hits: int


class Rate(NamedTuple):
    """What e-SR makes of a rate that may not rise."""

    rows: int  # since `since`, as all that follows
    hits: int
    since: int
    evidence: float  # relative to the line


def judge_errors(
    labels: Iterable[Labelled], errors: int, labelled: int, settings: DriftSettings, *, streams: int = 1
) -> Performance | None:
    """Judge the labels that have come so far; None where the bundle knows no error rate, or no label came.

    Args:
        labels: per window; several entries of one window add up, their order doesn't matter.
        errors: on the held-out rows, from the profile.
        labelled: the number of those rows.
        settings: floor and budget.
        streams: that share the budget of labels, this one among them.
    """
    trials = [Trial(w.window, w.labelled, min(w.errors, w.labelled)) for w in merged(labels)]
    if not labelled or not trials:
        return None
    tolerated = tolerated_rate(errors, labelled, settings)
    found = watch_rate(trials, tolerated, settings.performance_line(streams))
    return Performance(
        labelled=found.rows,
        errors=found.hits,
        rate=found.hits / found.rows,
        expected=(errors + 0.5) / (labelled + 1),
        tolerated=tolerated,
        since=found.since,
        evidence=found.evidence,
        alarm=found.evidence >= 1,
    )


def tolerated_rate(errors: int, labelled: int, settings: DriftSettings) -> float:
    """p0 + floor: the floor is at least two standard errors of p0 itself, which is an estimate too."""
    known = (errors + 0.5) / (labelled + 1)
    floor = max(settings.performance_floor, 2 * math.sqrt(known * (1 - known) / labelled))
    return min(known + floor, 0.99)


def watch_rate(trials: Sequence[Trial], tolerated: float, line: float) -> Rate:
    """e-SR over windows, which ascend and of which each has rows; at least one.

    Args:
        trials: what was seen.
        tolerated: the rate up to which nothing is wrong.
        line: what the evidence must reach.
    """
    sums = [0.0] * len(_ODDS)
    begin = 0
    for i, ratios in enumerate(_ratios(trials, tolerated)):
        sums = [min((1 + r) * x, _MOST * line) for r, x in zip(sums, ratios, strict=True)]
        if sum(sums) < len(sums):
            begin = i + 1
    told = trials[begin:] or trials
    rows, hits = sum(t.rows for t in told), sum(t.hits for t in told)
    return Rate(rows, hits, told[0].window, sum(sums) / len(sums) / line)


def merged(labels: Iterable[Labelled]) -> list[Labelled]:
    """One entry per window that has labels, in the order of windows."""
    found: dict[int, Labelled] = {}
    for label in labels:
        before = found.get(label.window)
        found[label.window] = label if before is None else _both(before, label)
    return [label for _, label in sorted(found.items()) if label.labelled > 0]


def _both(a: Labelled, b: Labelled) -> Labelled:
    residuals = add(a.residuals, b.residuals) if a.residuals and b.residuals else a.residuals or b.residuals
    sums = add(a.sums, b.sums) if a.sums and b.sums else a.sums or b.sums
    return Labelled(a.window, a.labelled + b.labelled, a.errors + b.errors, residuals, sums)


def _ratios(trials: Sequence[Trial], tolerated: float) -> list[list[float]]:
    """Per window the likelihood ratio of each worse rate."""
    rows, hits = (np.array([t[i] for t in trials], dtype=np.float64)[:, None] for i in (1, 2))
    odds = np.array(_ODDS)
    worse = odds * tolerated / (1 - tolerated + odds * tolerated)
    logs = hits * np.log(worse / tolerated) + (rows - hits) * np.log((1 - worse) / (1 - tolerated))
    found: list[list[float]] = np.exp(np.clip(logs, -_LARGEST, _LARGEST)).tolist()
    return found
