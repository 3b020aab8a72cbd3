"""Bench drift: what devices say in their first weeks, when nobody knows yet that their days or weeks have a course.

Rules: hours are known, as they are in the product; the training data are of whole weeks; nothing ever happens.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.replay import Hit, replay
from lightship.monitoring.season import SLOTS

from .bench import FEATURES, Bench
from .quiet import events, hours_of_weeks
from .streams import ROWS, quantiles_of, shares_between

WEEKS: Final = 6
#: As long as no season can be known, and what follows.
FIRST: Final = 3
_WARM_UPS: Final = (48, 336)
_DEVICES: Final = 4  # side by side: what has a season is as wide as a device may be
_COURSES: Final = {
    "daily cycle 0.3 sd": (0.3, 0.0),
    "daily cycle 1 sd": (1.0, 0.0),
    "weekends 1 sd lower": (0.0, 1.0),
    "daily cycle 1 sd, and weekends 1 sd lower": (1.0, 1.0),
}


class Task(NamedTuple):
    """Some devices."""

    course: str
    warm_up: int
    first: int
    devices: int


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Per course and warm-up: alarms per device of the first weeks, and of those after."""
    devices = 8 * bench.sizes.years // 10
    tasks = [
        Task(course, warm_up, first, min(_DEVICES, devices - first))
        for course in _COURSES
        for warm_up in _WARM_UPS
        for first in range(0, devices, _DEVICES)
    ]
    found: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
    with ProcessPoolExecutor(bench.sizes.workers) as pool:
        for task, hits in pool.map(_alarms, tasks):
            key = (task.course, task.warm_up)
            found[key] = found.get(key, np.zeros((2, 2), dtype=np.int64)) + hits
            print(f"  {task.course}, warm-up {task.warm_up}, {task.devices} devices: {hits.tolist()}", flush=True)
    return [
        {"course": course, "warm_up": warm_up, "devices": devices, "warnings": warned, "criticals": critical}
        for (course, warm_up), hits in found.items()
        for warned, critical in [(hits / devices).T.tolist()]
    ]


def _alarms(task: Task) -> tuple[Task, npt.NDArray[np.int64]]:
    """Warnings and criticals, of the first weeks and of those after."""
    rng = np.random.default_rng([11, task.first])
    windows, streams = WEEKS * SLOTS, FEATURES * task.devices
    daily, weekend = _COURSES[task.course]
    counts = np.empty((windows, streams, 10), dtype=np.int16)
    begins = int(rng.integers(SLOTS))  # the hour of the week at which the devices were switched on
    hour = (begins + np.arange(windows)) % SLOTS
    for s in range(streams):
        # A week's course; the training data are of all its hours.
        week = daily * np.sin(2 * np.pi * (np.arange(SLOTS) % 24) / 24) - weekend * (np.arange(SLOTS) >= SLOTS - 48)
        edges = quantiles_of(rng.standard_normal(10_000) + week[rng.integers(0, SLOTS, 10_000)])
        counts[:, s] = rng.multinomial(ROWS, shares_between(edges, week[hour]))
    reference = np.full((streams, 10), 1_000)
    run = replay(
        counts, reference, DriftSettings(warm_up=task.warm_up), per_device=FEATURES, key=f"weeks {task.first}",
        recalibrate=12, hours=hours_of_weeks(windows, begins),
    )  # fmt: skip
    return task, np.array([[events(_within(hits, late), FEATURES) for hits in (run.warnings, run.criticals)]
                           for late in (False, True)])  # fmt: skip


def _within(hits: list[Hit], late: bool) -> list[Hit]:
    return [hit for hit in hits if (hit.window >= FIRST * SLOTS) is late]
