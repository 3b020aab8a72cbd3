"""Bench drift: errors that labels tell of, 100 a window, where the bundle knows 10 % from 10,000 held-out rows."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.performance import Labelled, judge_errors

from .bench import Bench

_BATCH: Final = 100
_BEFORE: Final = 100  # windows
_RATES: Final = (0.12, 0.15, 0.20, 0.30, 0.50)
_PATIENCE: Final = 60  # windows


def measure(bench: Bench) -> dict[str, Any]:
    """Labels until a higher rate is critical, and false alarms per device-year at the known one."""
    rng = np.random.default_rng(17)
    settings = DriftSettings()
    delays = [{"rate": rate, "labels": _labels(rng, rate, settings, bench.sizes.runs)} for rate in _RATES]
    alarms = 0
    for _ in range(bench.sizes.years):
        errors = rng.binomial(_BATCH, 0.1, size=bench.sizes.year)
        healthy = [Labelled(w, _BATCH, int(k)) for w, k in enumerate(errors)]
        # Evidence may fade again: every month is looked at where it ends, and the year with it.
        ends = range(min(720, bench.sizes.year), bench.sizes.year + 1, 720)
        alarms += any((s := judge_errors(healthy[:end], 1_000, 10_000, settings)) is not None and s.alarm
                      for end in ends)  # fmt: skip
    return {"delays": delays, "false_alarms": alarms / bench.sizes.years, "years": bench.sizes.years}


def _labels(rng: np.random.Generator, rate: float, settings: DriftSettings, runs: int) -> float | None:
    waited = []
    for _ in range(runs):
        before = [Labelled(w, _BATCH, int(k)) for w, k in enumerate(rng.binomial(_BATCH, 0.1, size=_BEFORE))]
        after = [
            Labelled(_BEFORE + w, _BATCH, int(k)) for w, k in enumerate(rng.binomial(_BATCH, rate, size=_PATIENCE))
        ]
        seen = (judge_errors([*before, *after[:n]], 1_000, 10_000, settings) for n in range(1, _PATIENCE + 1))
        waited.append(next((float(_BATCH * n) for n, s in enumerate(seen, 1) if s is not None and s.alarm), np.inf))
    found = float(np.quantile(waited, 0.5, method="higher"))
    return found if np.isfinite(found) else None
