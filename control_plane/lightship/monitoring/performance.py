"""Monitoring: has the model become worse, as far as labels tell?

Rules of this room:
* pure; labels per window in, evidence out. It is made anew from all windows each time, so labels may be late, split and
  in any order: only what each window has in the end counts;
* the error rate of the held-out rows and their number come with the bundle: nothing is learnt on the device;
* e-SR: R ← (1 + R)·LR over windows, LR the likelihood of the window's errors at a worse rate over that at p0 + floor,
  averaged over five worse rates. R ≥ A comes no more often than every A windows while the rate is within the floor.

Sources: Shiryaev–Roberts as an e-detector: Shin, Ramdas, Rinaldo 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from .drift_settings import DriftSettings
from .verdict import Performance

#: Odds ratios of the worse rates.
_ODDS: Final = (1.25, 1.5, 2.0, 3.0, 6.0)
#: Evidence is kept below so many times the line, so that it fades when errors do.
_MOST: Final = 10.0


class Labelled(NamedTuple):
    """What labels have said of a window."""

    window: int
    labelled: int
    errors: int


def judge_errors(labels: Iterable[Labelled], errors: int, labelled: int, settings: DriftSettings) -> Performance | None:
    """Judge the labels that have come so far; None where the bundle knows no error rate, or no label came.

    Args:
        labels: per window; several entries of one window add up, their order doesn't matter.
        errors: on the held-out rows, from the profile.
        labelled: the number of those rows.
        settings: floor and budget.
    """
    windows = _merged(labels)
    if not labelled or not windows:
        return None
    known = (errors + 0.5) / (labelled + 1)
    tolerated = tolerated_rate(errors, labelled, settings)
    line = settings.performance_line
    sums = [0.0] * len(_ODDS)
    since, total, wrong = windows[0].window, 0, 0
    for w in windows:
        sums = [min((1 + r) * x, _MOST * line) for r, x in zip(sums, _ratios(w, tolerated), strict=True)]
        total, wrong = total + w.labelled, wrong + w.errors
        if sum(sums) / len(sums) < 1:
            since, total, wrong = w.window + 1, 0, 0
    evidence = sum(sums) / len(sums) / line
    everything = sum(w.labelled for w in windows), sum(w.errors for w in windows)
    if not total:
        total, wrong, since = *everything, windows[0].window
    return Performance(
        labelled=total,
        errors=wrong,
        rate=wrong / total,
        expected=known,
        tolerated=tolerated,
        since=since,
        evidence=evidence,
        alarm=evidence >= 1,
    )


def tolerated_rate(errors: int, labelled: int, settings: DriftSettings) -> float:
    """p0 + floor: the floor is at least two standard errors of p0 itself, which is an estimate too."""
    known = (errors + 0.5) / (labelled + 1)
    floor = max(settings.performance_floor, 2 * math.sqrt(known * (1 - known) / labelled))
    return min(known + floor, 0.99)


def _merged(labels: Iterable[Labelled]) -> list[Labelled]:
    found: dict[int, tuple[int, int]] = {}
    for label in labels:
        n, k = found.get(label.window, (0, 0))
        found[label.window] = (n + label.labelled, k + min(label.errors, label.labelled))
    return [Labelled(w, n, k) for w, (n, k) in sorted(found.items()) if n > 0]


def _ratios(window: Labelled, tolerated: float) -> Sequence[float]:
    """The likelihood ratio of each worse rate."""
    right = window.labelled - window.errors
    ratios = []
    for odds in _ODDS:
        worse = odds * tolerated / (1 - tolerated + odds * tolerated)
        logs = window.errors * math.log(worse / tolerated) + right * math.log((1 - worse) / (1 - tolerated))
        ratios.append(math.exp(max(min(logs, 600.0), -600.0)))
    return ratios
