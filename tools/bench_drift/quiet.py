"""Bench drift: alarms of streams to which nothing happens, through the whole rule: ladder, alarm of record and floor.

Rules: seeds are fixed and belong to the group of device-years, not to the process that draws it.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.policy import PolicySettings
from lightship.monitoring.replay import Hit, replay
from lightship.monitoring.season import SLOTS, Hour
from lightship.monitoring.two_sample import two_sample
from lightship_agent.files import write_durably

from .bench import FEATURES, YEAR, Bench, Sizes
from .streams import INDEPENDENT, NATURES, Counts, dependent, independent

#: Device-years side by side: more take less time, and memory. Where hours are known, a layout may have 160 streams.
_GROUP: Final = 5
#: Where the floor is 0 every difference counts: only there does the budget show.
_FLOORS: Final = {INDEPENDENT: (0.0, 0.02)}


_SLICE: Final = 250  # windows
RECOVERY: Final = PolicySettings().recovery


class Task(NamedTuple):
    """Some device-years."""

    nature: str
    floor: float
    first: int
    devices: int
    windows: int


class Quiet(msgspec.Struct, frozen=True, kw_only=True):
    """Alarms per device-year of one nature. Tests of a device that follow each other closely are one alarm."""

    nature: str
    floor: float
    years: float
    bare: float  # single windows beyond the uncalibrated line
    warnings: float
    records: float
    criticals: float
    tests: float  # beyond their line, each counted
    at_most: float  # criticals: the upper 99 % of what so many in so many years are compatible with


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Every nature, in as many processes as there are CPUs; what was simulated before is read."""
    folder = bench.folder / f"quiet-{bench.sizes.years}-{bench.sizes.year}"
    folder.mkdir(parents=True, exist_ok=True)
    if bench.again:
        for place in folder.glob("*.json"):
            place.unlink()
    simulate(bench.sizes, folder)
    return read(bench.sizes, folder)


def simulate(sizes: Sizes, folder: Path) -> None:
    """What is not in the folder yet; natures take turns."""
    wanted = [task for task in _tasks(sizes) if not _place(folder, task).exists()]
    with ProcessPoolExecutor(sizes.workers) as pool:
        for task, hits in pool.map(_alarms, wanted):
            write_durably(_place(folder, task), json.dumps(hits).encode())
            print(f"  {task.nature}, floor {task.floor:g}, {task.devices} years: {hits}", flush=True)


def read(sizes: Sizes, folder: Path) -> list[dict[str, Any]]:
    """What the folder holds, added up."""
    found: dict[tuple[str, float], list[Any]] = {}
    for task in _tasks(sizes):
        if (place := _place(folder, task)).exists():
            found.setdefault((task.nature, task.floor), []).append((task.devices, json.loads(place.read_bytes())))
    return [
        msgspec.to_builtins(
            _quiet(*kind, sum(n for n, _ in told) * sizes.year / YEAR, np.sum([hits for _, hits in told], axis=0))
        )
        for kind, told in found.items()
    ]


def _tasks(sizes: Sizes) -> list[Task]:
    kinds = [(nature, floor) for nature in (INDEPENDENT, *NATURES) for floor in _FLOORS.get(nature, (0.02,))]
    return [
        Task(nature, floor, first, min(_GROUP, sizes.years - first), sizes.year)
        for first in range(0, sizes.years, _GROUP)
        for nature, floor in kinds
    ]


def _place(folder: Path, task: Task) -> Path:
    return folder / f"{task.nature}, floor {task.floor:g}, from {task.first}.json"


def _quiet(nature: str, floor: float, years: float, hits: Any) -> Quiet:
    bare, warnings, records, criticals, tests = (hits / years).tolist()
    return Quiet(
        nature=nature,
        floor=floor,
        years=years,
        bare=bare,
        warnings=warnings,
        records=records,
        criticals=criticals,
        tests=tests,
        at_most=upper(int(hits[3]), 0.01) / years,
    )


def upper(count: int, tail: float) -> float:
    """The Poisson mean of which `count` or fewer are seen with a chance of `tail` only."""
    low, high = float(count), count + 10 * math.sqrt(count + 1) + 10
    for _ in range(60):
        middle = (low + high) / 2
        term = math.exp(-middle)
        total = term
        for k in range(1, count + 1):
            term *= middle / k
            total += term
        low, high = (middle, high) if total > tail else (low, middle)
    return high


def _bare(counts: Counts, reference: Counts, settings: DriftSettings) -> int:
    p = two_sample(counts, reference).p_value(settings.effect_floor)
    return int((p < settings.alpha(1, FEATURES)).sum())


def events(hits: list[Hit], per_device: int) -> int:
    """How often somebody is called: the policy's dwell. A device's event is over after three clean blocks.

    They are blocks as long as the shortest that alarmed, since only those could have seen it.
    """
    opened: dict[int, tuple[float, int]] = {}  # device: the last hit, the shortest block
    found = 0
    for hit in sorted(hits):
        device = hit.stream // per_device
        last, shortest = opened.get(device, (-math.inf, 1))
        if hit.window > last + RECOVERY * shortest:
            found, shortest = found + 1, hit.size
        opened[device] = (hit.window, min(shortest, hit.size))
    return found


def hours_of_weeks(windows: int, begins: int = 0) -> list[Hour]:
    """The hours of so many hourly windows."""
    return [Hour((begins + w) % SLOTS, (begins + w) // SLOTS) for w in range(windows)]


def _alarms(task: Task) -> tuple[Task, list[int]]:
    """Bare, warnings, records, criticals, tests; and of which task they are."""
    rng = np.random.default_rng([7, task.first])
    counts: Counts
    streams = FEATURES * task.devices
    if task.nature == INDEPENDENT:
        counts, reference = independent(rng, task.windows, streams)
    else:
        counts, reference = dependent(task.nature, rng, task.windows, streams)
    settings = DriftSettings(effect_floor=task.floor)
    hours = hours_of_weeks(task.windows)
    whole = replay(counts, reference, settings, per_device=FEATURES, key=f"{task.first}", recalibrate=12, hours=hours)
    bare = sum(_bare(counts[w : w + _SLICE], reference, settings) for w in range(0, task.windows, _SLICE))
    warned, critical = (events(hits, FEATURES) for hits in (whole.warnings, whole.criticals))
    found = (bare, warned, len(whole.records), critical, len(whole.warnings))
    return task, list(found)
