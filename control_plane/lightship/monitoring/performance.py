"""Monitoring: has the model become worse, as far as labels tell?

Rules of this room:
* pure; labels per window in, evidence out. It is made anew from all windows each time, so labels may be late, split and
  in any order: only what each window has in the end counts;
* the error rate of the held-out rows and their number come with the bundle: nothing is learnt on the device;
* whether errors have become more is the question of `rate`; here is what is tolerated: p0, and a floor above it;
* a regressor's residuals are watched by the same rule, in `residuals`: all streams of labels share one budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightship_agent.contract.vectors import add

from .drift_settings import DriftSettings
from .rate import Trial, watch_rate
from .verdict import Performance


class Labelled(NamedTuple):
    """What labels have said of a window; of a regressor also in which cells of the profile its residuals were."""

    window: int
    labelled: int
    errors: int
    residuals: Sequence[int] = ()
    sums: Sequence[int] = ()  # of their steps: Σ, Σ²


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
        phi=found.phi,
        alarm=found.evidence >= 1,
    )


def tolerated_rate(errors: int, labelled: int, settings: DriftSettings) -> float:
    """p0 + floor: the floor is at least two standard errors of p0 itself, which is an estimate too."""
    known = (errors + 0.5) / (labelled + 1)
    floor = max(settings.performance_floor, 2 * math.sqrt(known * (1 - known) / labelled))
    return min(known + floor, 0.99)


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
