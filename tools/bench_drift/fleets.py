"""Bench drift: a hundred devices, 200 rows an hour each, with offsets of their own or none.

Rules: a device is compared with two weeks of its own; pooled counts are here only to show why. Levels are shared out
over thirty features and the hours of a year.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship.monitoring.fleet import few_p
from lightship.monitoring.groups import paired_p
from lightship.monitoring.simulate import normal_shares
from lightship.monitoring.two_sample import two_sample

from .bench import FEATURES, YEAR, Bench
from .streams import ROWS, Counts

Floats = npt.NDArray[np.float64]
DEVICES: Final = 100
_MONTH: Final = 720
_PATIENCE: Final = 72
_PAST: Final = 336
_LINE: Final = 1 / YEAR / FEATURES
CUTS: Final = np.array([-1.28155, -0.84162, -0.52440, -0.25335, 0.0, 0.25335, 0.52440, 0.84162, 1.28155])
_TRAINING: Final = np.full(10, 1_000)
#: How far, and how many of the hundred.
_SHIFTS: Final = {
    "0.05 sd on all": (0.05, DEVICES), "0.1 sd on all": (0.1, DEVICES),
    "0.5 sd on 5": (0.5, 5), "1 sd on 5": (1.0, 5),
}  # fmt: skip
_RULES: Final[dict[str, Callable[[Counts, Counts], float]]] = {
    "pooled against training": lambda now, _: float(two_sample(now.sum(axis=0), _TRAINING).p_value()),
    "paired Hotelling": paired_p,
    "count of small p": lambda now, past: few_p(two_sample(now, past).p_value().tolist()),
}


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Per offset and rule: false alarms per fleet-month of one feature, and hours until each shift is seen."""
    found = []
    for offset in (0.0, 0.3):
        rng = np.random.default_rng([13, int(10 * offset)])
        alarms = dict.fromkeys(_RULES, 0)
        for _ in range(bench.sizes.months):
            fleet = Fleet(rng, offset)
            for _ in range(_MONTH):
                now = fleet.hour(np.zeros(DEVICES))
                for rule, p in _RULES.items():
                    alarms[rule] += p(now, fleet.past) < _LINE
        waited: dict[str, dict[str, list[float]]] = {rule: {name: [] for name in _SHIFTS} for rule in _RULES}
        for name, (sd, devices) in _SHIFTS.items():
            for _ in range(max(3, bench.sizes.runs // 10)):
                fleet = Fleet(rng, offset)
                shift = np.where(np.arange(DEVICES) < devices, sd, 0.0)
                hours = [fleet.hour(shift) for _ in range(_PATIENCE)]
                for rule, p in _RULES.items():
                    first = next((h for h, now in enumerate(hours, 1) if p(now, fleet.past) < _LINE), np.inf)
                    waited[rule][name].append(first)
        for rule in _RULES:
            delays = {name: _median(waited[rule][name]) for name in _SHIFTS}
            found.append(
                {"offset": offset, "rule": rule, "false_alarms": alarms[rule] / bench.sizes.months, "delays": delays}
            )
            print(f"  {found[-1]}", flush=True)
    return found


class Fleet:
    """Devices with offsets of their own, and two weeks of their past."""

    def __init__(self, rng: np.random.Generator, offset: float) -> None:
        self._rng = rng
        self._offsets = offset * rng.standard_normal(DEVICES)
        self.past = rng.multinomial(ROWS * _PAST, self._shares(np.zeros(DEVICES)))
        self._shifted: tuple[bytes, Floats] = (b"", np.zeros(0))

    def hour(self, shift: Floats) -> Counts:
        """An hour of rows, shifted."""
        key = shift.tobytes()
        if self._shifted[0] != key:
            self._shifted = (key, self._shares(shift))
        return self._rng.multinomial(ROWS, self._shifted[1])

    def _shares(self, shift: Floats) -> Floats:
        return np.stack([normal_shares(CUTS, float(m), 1.0) for m in self._offsets + shift])


def _median(waited: list[float]) -> float | None:
    found = float(np.quantile(waited, 0.5, method="higher"))
    return found if np.isfinite(found) else None
