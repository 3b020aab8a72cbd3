"""Bench drift: what labels tell. Errors, 100 a window, where the bundle knows 10 % from 10,000 held-out rows; and a
regressor's residuals, 50 a window, with held-out rows of their own law, 2,000.

Rules: the product's own rule decides, and is asked as the product asks it: in the light of the windows that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship.data.moments import reference_residuals
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.performance import Labelled, judge_errors, tolerated_rate
from lightship.monitoring.rate import Trial, evidence_path
from lightship.monitoring.residuals import sides
from lightship_agent.contract.profile import ResidualReference

from .bench import Bench
from .streams import INDEPENDENT, ROWS, marginal, rows

_BATCH: Final = 100
_BEFORE: Final = 100  # windows
_RATES: Final = (0.12, 0.15, 0.20, 0.30, 0.50)
_PATIENCE: Final = 60  # windows
_RESIDUALS: Final = 50  # labels a window
_HELD_OUT: Final = 2_000
_TAILS: Final = "heavy tails (t, 3)"
#: Of residuals to which nothing happens.
QUIET: Final = (INDEPENDENT, _TAILS, "AR(1) 0.5", "AR(1) 0.9", "daily cycle 0.3 sd", "window effect 0.1 sd")
#: Of residuals that move: bias in sd, and spread.
MOVED: Final = {
    "bias +0.25 sd": (0.25, 1.0),
    "bias +0.5 sd": (0.5, 1.0),
    "bias -1 sd": (-1.0, 1.0),
    "spread × 1.25": (0.0, 1.25),
    "spread × 1.5": (0.0, 1.5),
    "spread × 2": (0.0, 2.0),
}
#: Alarms that are no farther from each other, in windows, are one event.
_ONE_EVENT: Final = 24

Values = npt.NDArray[np.float32]


def measure(bench: Bench) -> dict[str, Any]:
    """Labels until a higher rate is critical, and false alarms per device-year at the known one."""
    rng = np.random.default_rng(17)
    settings, sizes = DriftSettings(), bench.sizes
    delays = [{"rate": rate, "labels": _labels(rng, rate, settings, sizes.runs)} for rate in _RATES]
    tolerated = tolerated_rate(1_000, 10_000, settings)
    alarms = sum(
        _events(rng.binomial(_BATCH, 0.1, size=sizes.year), _BATCH, tolerated, settings.performance_line())
        for _ in range(sizes.years)
    )
    return {
        "delays": delays, "false_alarms": alarms / sizes.years, "years": sizes.years,
        "residuals": [_moved(name, bias, spread, settings, sizes.runs) for name, (bias, spread) in MOVED.items()],
        "residuals_quiet": [_quiet(nature, settings, sizes.years, sizes.year) for nature in QUIET],
    }  # fmt: skip


def _labels(rng: np.random.Generator, rate: float, settings: DriftSettings, runs: int) -> float | None:
    waited = []
    for _ in range(runs):
        before = [Labelled(w, _BATCH, int(k)) for w, k in enumerate(rng.binomial(_BATCH, 0.1, size=_BEFORE))]
        after = [
            Labelled(_BEFORE + w, _BATCH, int(k)) for w, k in enumerate(rng.binomial(_BATCH, rate, size=_PATIENCE))
        ]
        seen = (judge_errors([*before, *after[:n]], 1_000, 10_000, settings) for n in range(1, _PATIENCE + 1))
        waited.append(next((float(_BATCH * n) for n, s in enumerate(seen, 1) if s is not None and s.alarm), np.inf))
    return _median(waited)


def _median(waited: list[float]) -> float | None:
    found = float(np.quantile(waited, 0.5, method="higher"))
    return found if np.isfinite(found) else None


# -- residuals ----------------------------------------------------------------------------------------------------


def _moved(name: str, bias: float, spread: float, settings: DriftSettings, runs: int) -> dict[str, Any]:
    """Labels until residuals that have moved are critical, by any of the rates that are watched."""
    rng = np.random.default_rng(18)
    waited = []
    for _ in range(runs):
        before, after = (rng.standard_normal(n * _RESIDUALS) for n in (_BEFORE, _PATIENCE))
        watched = list(_watched(np.concatenate([before, spread * after + bias]), marginal(INDEPENDENT, rng), settings))
        waited.append(min(_first(hits, tolerated, line) for hits, tolerated, line in watched))
    return {"change": name, "labels": _median(waited)}


def _first(hits: npt.NDArray[np.int64], tolerated: float, line: float) -> float:
    """Labels after the change until the evidence is beyond the line."""
    trials = [Trial(w, _RESIDUALS, k) for w, k in enumerate(hits.tolist())]
    for n in range(1, _PATIENCE + 1):
        seen = trials[: _BEFORE + n]
        if evidence_path(seen, tolerated, line)[-1] >= 1:
            return float(n * _RESIDUALS)
    return float(np.inf)


def _quiet(nature: str, settings: DriftSettings, years: int, windows: int) -> dict[str, Any]:
    """Events per device-year while nothing happens, of all rates together; and without φ."""
    rng = np.random.default_rng(19)
    events = plain = 0
    for _ in range(years):
        x, reference = _drawn(nature, rng, windows)
        for hits, tolerated, line in _watched(x, reference, settings):
            events += _events(hits, _RESIDUALS, tolerated, line)
            plain += _events(hits, _RESIDUALS, tolerated, line, independent=True)
    return {"nature": nature, "years": years, "false_alarms": events / years, "without_phi": plain / years}


def _drawn(nature: str, rng: np.random.Generator, windows: int) -> tuple[npt.NDArray[np.float64], Any]:
    if nature == _TAILS:
        return rng.standard_t(3, windows * _RESIDUALS), rng.standard_t(3, _HELD_OUT)
    # Of the streams' windows the first rows are those whose labels come.
    x = rows(nature, rng, windows).reshape(windows, ROWS)[:, :_RESIDUALS]
    return x.ravel(), marginal(nature, rng, _HELD_OUT)


def _watched(
    x: npt.NDArray[np.float64], heldout: npt.NDArray[np.float64], settings: DriftSettings
) -> Iterator[tuple[npt.NDArray[np.int64], float, float]]:
    """Of the errors and of every side of the residuals: hits per window, what is tolerated, and the line."""
    known, residuals = (a.astype(np.float32) for a in (heldout[:_HELD_OUT], x))
    reference = reference_residuals(np.zeros(len(known), np.float32), known)
    assert reference is not None
    watched = sides(reference, settings)
    line = settings.performance_line(len(watched) + 1)
    off, known_off = (np.abs(r) > np.float32(reference.bound) for r in (residuals, known))
    yield _per_window(off), tolerated_rate(int(known_off.sum()), len(known), settings), line
    cells = _cells(residuals, reference)
    for side in watched:
        yield _per_window(side.cells[cells]), side.tolerated, line


def _cells(residuals: Values, reference: ResidualReference) -> npt.NDArray[np.intp]:
    bins = reference.bins
    cuts = np.array([bins.low, *bins.edges, np.nextafter(np.float32(bins.high), np.float32(np.inf))], dtype=np.float32)
    return np.searchsorted(cuts, residuals, side="right")


def _per_window(hits: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.asarray(hits.reshape(-1, _RESIDUALS).sum(axis=1))


def _events(
    hits: npt.NDArray[np.int64], batch: int, tolerated: float, line: float, *, independent: bool = False
) -> int:
    """Alarms of a year, looked at with every window at first, then daily, then monthly.

    At a look, all windows since the one before are judged by what φ is now; windows beyond the line that follow each
    other closely are one event.
    """
    trials = [Trial(w, batch, k) for w, k in enumerate(hits.tolist())]
    looks = [*range(1, 49), *range(72, 337, 24), *range(720, len(trials), 720), len(trials)]
    alarms: list[int] = []
    done = 0
    for look in (n for n in looks if n <= len(trials)):
        seen = trials[:look]
        path = evidence_path(seen, tolerated, line, independent=independent)
        alarms += [w for w in range(done, look) if path[w] >= 1]
        done = look
    return sum(1 for i, w in enumerate(alarms) if not i or w - alarms[i - 1] > _ONE_EVENT)
