"""Bench drift: all devices of a fleet together, with the product's own rule; what moves all at once, and is no drift.

Rules:
* false alarms: a year of hourly looks at a hundred devices with thirty features. The test's ratio is drawn from its own
  law, F with the noncentrality that the hour's common mean has at so many rows: else forty years would take days;
* delays: real counts of a hundred devices with offsets, after two weeks of looks at them.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightship.monitoring import common_shift as c
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.groups import Paired
from lightship.monitoring.layout import Layout
from lightship.monitoring.tails import f_sf
from lightship_agent.contract.profile import FeatureBins, ReferenceProfile

from .bench import FEATURES, YEAR, Bench
from .fleets import CUTS, DEVICES, Fleet
from .streams import ROWS

Floats = npt.NDArray[np.float64]
NATURES: Final = ("nothing", "nights 0.3 sd", "hours 0.1 sd", "hours 0.1 sd, AR(1) 0.9", "hours 0.1 sd, AR(1) 0.99")
SHIFTS: Final = (0.05, 0.1, 0.2, 0.5)
_FREE: Final = 9
_DWELL: Final = 24
_PATIENCE: Final = 200


def measure(bench: Bench) -> dict[str, Any]:
    """False alarms a fleet-year by nature, and looks until each shift alarms."""
    fleets = max(2, bench.sizes.years)
    year = bench.sizes.year
    with ProcessPoolExecutor(bench.sizes.workers) as pool:
        quiet = list(pool.map(_quiet, NATURES, [fleets] * len(NATURES), [year] * len(NATURES)))
    for found in quiet:
        print(f"  together: {found}", flush=True)
    runs = max(3, bench.sizes.runs // 10)
    delays = {f"{sd:g} sd": _delay(sd, runs, floor) for sd in SHIFTS for floor in (0.001,)}
    default = {f"{sd:g} sd": _delay(sd, runs, DriftSettings().common_floor) for sd in SHIFTS}
    print(f"  together: {delays} at floor 0.001, {default} by default", flush=True)
    return {"quiet": quiet, "delays": delays, "default": default, "looks": DriftSettings().baseline}


def _layout(streams: int, settings: DriftSettings) -> Layout:
    cuts = tuple(CUTS.tolist())
    bins = [
        FeatureBins(name=f"f{i}", low=-9.0, high=9.0, edges=cuts, counts=(0, *[1_000] * 10, 0, 0))
        for i in range(streams)
    ]
    return Layout(ReferenceProfile(rows=10_000, features=tuple(bins)), settings, {})


def _quiet(nature: str, fleets: int, year: int) -> dict[str, Any]:
    """As many fleets at once: their streams side by side, and their budgets added."""
    streams = FEATURES * fleets
    settings = DriftSettings(budget=float(fleets), horizon_windows=YEAR)
    layout, rng = _layout(streams, settings), np.random.default_rng([17, NATURES.index(nature)])
    common = c.Common.fresh("bench", layout, settings)
    alarms, last = 0, np.full(fleets, -_YEARS_AGO)
    for hour, means in enumerate(_means(nature, rng, year, streams)):
        common, _ = c.learn(common, layout, _look(rng, means), {}, settings, fleet=(), recovery=3)
        beyond = np.array([s.beyond for s in common.last]).reshape(fleets, FEATURES).any(axis=1)
        alarms += int((beyond & (hour - last > _DWELL)).sum())
        last = np.where(beyond, hour, last)
    years = fleets * year / YEAR
    return {"nature": nature, "years": years, "alarms": alarms / years}


_YEARS_AGO: Final = 10**9


def _means(nature: str, rng: np.random.Generator, hours: int, streams: int) -> Floats:
    """The mean that all devices have in common, in sd, `[hours, streams]`; each stream has a phase of its own."""
    if nature == "nothing":
        return np.zeros((hours, streams))
    if nature.startswith("nights"):
        phase = rng.uniform(0, 24, streams)
        return np.asarray(0.3 * np.sin(2 * np.pi * (np.arange(hours)[:, None] + phase) / 24))
    rho = float(nature.rsplit(" ", 1)[1]) if "AR" in nature else 0.0
    means = np.empty((hours, streams))
    level = rng.standard_normal(streams)
    for hour in range(hours):
        means[hour] = 0.1 * level
        level = rho * level + np.sqrt(1 - rho * rho) * rng.standard_normal(streams)
    return means


def _look(rng: np.random.Generator, means: Floats) -> c.Look:
    rest, rows = DEVICES - _FREE, DEVICES * ROWS
    ratios = rng.noncentral_chisquare(_FREE, rows * means**2 + 1e-12) / _FREE * rest / rng.chisquare(rest, len(means))
    p = f_sf(ratios, np.full(len(means), float(_FREE)), np.full(len(means), float(rest)))
    effects = np.maximum(ratios - 1, 0.0) * _FREE / rows
    streams = [Paired(*one, DEVICES) for one in zip(ratios.tolist(), p.tolist(), effects.tolist(), strict=True)]
    return c.Look(tuple(streams), ("d0",))


def _delay(sd: float, runs: int, floor: float) -> float | None:
    """The median of looks until a shift of one feature of all devices is an alarm."""
    settings = DriftSettings(common_floor=floor)
    layout = _layout(FEATURES, settings)
    waited = []
    for run in range(runs):
        rng = np.random.default_rng([19, run])
        fleet = Fleet(rng, 0.3)
        common = c.Common.fresh("bench", layout, settings)
        for look in range(settings.baseline + _PATIENCE):
            shift = sd if look >= settings.baseline else 0.0
            found = _one(fleet, rng, shift)
            common, actions = c.learn(common, layout, found, {}, settings, fleet=(), recovery=3)
            if actions:
                break
        waited.append(look + 1 - settings.baseline if actions else np.inf)
    median = float(np.quantile(waited, 0.5, method="higher"))
    return median if np.isfinite(median) else None


def _one(fleet: Fleet, rng: np.random.Generator, shift: float) -> c.Look:
    """A look at the shifted feature by its counts, and at the others by the law of healthy ones."""
    now = fleet.hour(np.full(DEVICES, shift)).astype(np.float64)[:, None, :]
    mine = c.look(("d0",) * DEVICES, now, fleet.past.astype(np.float64)[:, None, :], np.ones((DEVICES, 1), np.bool_))
    return c.Look((mine.streams[0], *_look(rng, np.zeros(FEATURES - 1)).streams), mine.devices)
