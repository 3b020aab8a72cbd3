"""Bench drift: how long it takes until a shift of one feature of thirty is seen.

Rules: devices have a baseline of their own that is full; onsets fall anywhere within the longest block.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.simulate import (
    Shift,
    gradual_shift,
    mean_shift,
    normal_shares,
    spread_shift,
    what_is_seen,
)
from lightship.monitoring.tails import beta_binomial_sf

from .bench import FEATURES, Bench
from .streams import REFERENCE, ROWS

Floats = npt.NDArray[np.float64]

FLOORS: Final = (0.0, 0.005, 0.02)
_DRIFTING: Final = 200  # windows
_GRADUAL: Final = 500
_PATIENCE: Final = 512  # windows, for missing rates


class Delay(msgspec.Struct, frozen=True, kw_only=True):
    """Windows until a shift is seen; null: not within the time simulated."""

    shift: str
    floor: float
    effect: float
    alone: float | None  # the shortest block whose test, without calibration, sees it half of the time
    warning: float | None
    warning_90: float | None
    critical: float | None
    critical_90: float | None


class Task(NamedTuple):
    """One shift at one floor."""

    number: int
    floor: float
    runs: int


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Every shift at every floor, and missing rates."""
    runs = bench.sizes.runs
    tasks = [Task(n, floor, runs) for floor in FLOORS for n in range(len(shifts()))]
    with ProcessPoolExecutor(bench.sizes.workers) as pool:
        found = list(pool.map(_seen, tasks))
    rates = ((0.01, 0.05), (0.0, 0.01), (0.01, 0.02))
    found += [_missing(a, b, floor, runs) for floor in (0.002, 0.005) for a, b in rates]
    return [msgspec.to_builtins(delay) for delay in found]


def shifts() -> tuple[Shift, ...]:
    """Of one feature each."""
    return (
        mean_shift(0.1), mean_shift(0.25), mean_shift(0.5), mean_shift(1.0),
        spread_shift(1.25), spread_shift(1.5), spread_shift(0.8),
        gradual_shift(1.0, _GRADUAL), category_shift(0.05), category_shift(0.1),
    )  # fmt: skip


def category_shift(distance: float) -> Shift:
    """A share of the rows moves from some of ten categories to others: the total variation is `distance`."""

    def shares(cuts: Floats, _t: int) -> Floats:
        moved = normal_shares(cuts, 0.0, 1.0)
        given = max(1, round(distance / 0.05))  # categories that give; one more of them takes
        moved[:given] -= distance / given
        moved[-given - 1 :] += distance / (given + 1)
        return moved

    return Shift(f"category, total variation {distance:g}", shares)


def _seen(task: Task) -> Delay:
    settings = DriftSettings(effect_floor=task.floor)
    shift = shifts()[task.number]
    (seen,) = what_is_seen(
        (shift,), settings, rows=ROWS, streams=FEATURES, runs=task.runs, drifting=_DRIFTING, seed=3 + task.number
    )
    told = msgspec.to_builtins(seen)
    told["shift"] = told.pop("name")
    told["alone"] = told.pop("analytic")
    return msgspec.convert({**told, "floor": task.floor}, Delay)


def _missing(before: float, after: float, floor: float, runs: int) -> Delay:
    """A missing rate that rises, by the product's exact tail, on the ladder; critical: seen again on other rows."""
    settings = DriftSettings(quality_floor=floor)
    rng = np.random.default_rng(9)
    warned, critical = [], []
    for _ in range(runs):
        known = int(rng.binomial(REFERENCE, before))
        start = int(rng.integers(0, settings.sizes[-1]))
        gone = np.concatenate([rng.binomial(ROWS, before, size=start), rng.binomial(ROWS, after, size=_PATIENCE)])
        crossed = _crossings(gone, known, settings)
        seen = [end - start for end, _ in crossed if end > start]
        warned.append(float(seen[0]) if seen else np.inf)
        twice = [end - start for n, (end, size) in enumerate(crossed)
                 if any(e <= end - size for e, _ in crossed[:n] if e > start)]  # fmt: skip
        critical.append(float(twice[0]) if twice else np.inf)
    return Delay(
        shift=f"missing {before:.0%} to {after:.0%}",
        floor=floor,
        effect=after - before,
        alone=None,
        warning=_quantile(warned, 0.5),
        warning_90=_quantile(warned, 0.9),
        critical=_quantile(critical, 0.5),
        critical_90=_quantile(critical, 0.9),
    )


def _crossings(gone: npt.NDArray[np.int64], known: int, settings: DriftSettings) -> list[tuple[int, int]]:
    """The ends and lengths of the blocks in which too much is missing."""
    sums = np.concatenate([[0], np.cumsum(gone)])
    a, b = known + 0.5 + settings.quality_floor * REFERENCE, max(REFERENCE - known + 0.5, 1.0)
    found = []
    for size in settings.sizes:
        alpha = settings.quality_alpha(size, 3 * FEATURES)
        lines: dict[int, bool] = {}
        for end in range(size, len(sums), size):
            x = int(sums[end] - sums[end - size])
            if x not in lines:
                lines[x] = beta_binomial_sf(x - 1, size * ROWS, a, b) < alpha
            if lines[x]:
                found.append((end, size))
    return sorted(found)


def _quantile(values: list[float], level: float) -> float | None:
    found = float(np.quantile(values, level, method="higher"))
    return found if np.isfinite(found) else None
