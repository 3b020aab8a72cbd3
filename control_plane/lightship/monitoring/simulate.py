"""Monitoring: what will be seen, and how soon, at this volume and budget.

Rules of this room:
* pure; a seed in, the same answer out. Streams are drawn bin by bin, which is exact for independent rows;
* the analytic answer is the ladder's power; the simulated one is the whole rule, with the product's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .drift_settings import DriftSettings
from .layout import TEST_BINS
from .replay import Hit, Replayed, replay
from .tails import ncx2_isf, ncx2_sf

Floats = npt.NDArray[np.float64]
#: Shares of the bins `t` windows after the onset, given the reference's cut points on the normal scale.
Shares = Callable[[Floats, int], Floats]
NEVER: Final = math.inf
_NORMAL: Final = NormalDist()


@dataclass(frozen=True)
class Shift:
    """A change of one standard normal feature."""

    name: str
    shares: Shares


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """When a shift is seen, in windows after its onset; null: not within the time simulated."""

    name: str
    effect: float  # w² = Σ (p − q)²/q in the end
    analytic: float | None  # the shortest block whose test sees it half of the time
    warning: float | None  # median
    warning_90: float | None
    critical: float | None
    critical_90: float | None


def mean_shift(sd: float) -> Shift:
    """The mean moves by `sd` standard deviations."""
    return Shift(f"mean {sd:+g} sd", lambda cuts, _t: normal_shares(cuts, sd, 1.0))


def spread_shift(factor: float) -> Shift:
    """The standard deviation is multiplied."""
    return Shift(f"spread × {factor:g}", lambda cuts, _t: normal_shares(cuts, 0.0, factor))


def gradual_shift(sd: float, windows: int) -> Shift:
    """The mean moves to `sd` over `windows`."""
    return Shift(
        f"mean to {sd:+g} sd over {windows} windows",
        lambda cuts, t: normal_shares(cuts, sd * min(t / windows, 1.0), 1.0),
    )


def normal_shares(cuts: Floats, mean: float, sd: float) -> Floats:
    """The mass of a normal between cut points."""
    below = [0.0, *(_NORMAL.cdf((c - mean) / sd) for c in cuts.tolist()), 1.0]
    return np.diff(below)


DEFAULT: Final = (
    *(mean_shift(sd) for sd in (0.1, 0.25, 0.5, 1.0)),
    spread_shift(1.25),
    spread_shift(1.5),
    gradual_shift(1.0, 500),
)


def what_is_seen(
    shifts: tuple[Shift, ...],
    settings: DriftSettings,
    *,
    rows: int,
    streams: int,
    reference_rows: int = 10_000,
    runs: int = 24,
    healthy: int = 336,
    drifting: int = 240,
    seed: int = 0,
) -> list[Seen]:
    """When each shift would be seen.

    Args:
        shifts: of one feature each, the others staying healthy.
        settings: budget, floor, ladder.
        rows: per window.
        streams: features, predictions and scores that share the budget.
        reference_rows: training rows.
        runs: simulated devices per shift.
        healthy: windows before the onset.
        drifting: windows after it.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found = []
    for shift in shifts:
        run = _run(rng, shift, settings, (rows, streams, reference_rows), runs, healthy, drifting)
        warned, critical = (_delays(hits, runs, healthy) for hits in (run.warnings, run.criticals))
        q = np.full(TEST_BINS, 1 / TEST_BINS)
        cuts = np.array([_NORMAL.inv_cdf(i / TEST_BINS) for i in range(1, TEST_BINS)])
        effect = float(((shift.shares(cuts, drifting) - q) ** 2 / q).sum())
        found.append(
            Seen(
                name=shift.name,
                effect=effect,
                analytic=_finite(analytic_windows(effect, settings, rows, streams, reference_rows)),
                warning=_finite(float(np.median(warned))),
                warning_90=_finite(float(np.quantile(warned, 0.9, method="higher"))),
                critical=_finite(float(np.median(critical))),
                critical_90=_finite(float(np.quantile(critical, 0.9, method="higher"))),
            )
        )
    return found


def analytic_windows(effect: float, settings: DriftSettings, rows: int, streams: int, reference_rows: int) -> float:
    """The shortest block whose test sees `effect` at least half of the time; infinite where none does."""
    for size in settings.sizes:
        n = rows * size
        scale = n * reference_rows / (n + reference_rows)
        if n < settings.min_rows:
            continue
        df = TEST_BINS - 1
        line = ncx2_isf(settings.alpha(size, streams), df, settings.effect_floor * scale)
        if float(ncx2_sf(line, df, effect * scale)) >= 0.5:
            return float(size)
    return NEVER


def draw(
    rng: np.random.Generator, shift: Shift | None, reference_rows: int, rows: int, windows: int, healthy: int
) -> npt.NDArray[np.int64]:
    """Counts `[windows, bins]` of a stream in the quantile bins of its own reference, shifted from `healthy` on."""
    # The reference's quantiles lie at Beta-distributed levels; the masses between them are Dirichlet.
    levels = np.cumsum(rng.dirichlet(np.full(TEST_BINS, reference_rows / TEST_BINS)))[:-1]
    cuts = np.array([_NORMAL.inv_cdf(float(v)) for v in levels])
    counts = np.empty((windows, TEST_BINS), dtype=np.int64)
    counts[:healthy] = rng.multinomial(rows, normal_shares(cuts, 0.0, 1.0), size=min(healthy, windows))
    for t in range(healthy, windows):
        shares = shift.shares(cuts, t - healthy) if shift else normal_shares(cuts, 0.0, 1.0)
        counts[t] = rng.multinomial(rows, shares)
    return counts


def _run(
    rng: np.random.Generator,
    shift: Shift,
    settings: DriftSettings,
    volume: tuple[int, int, int],
    runs: int,
    healthy: int,
    drifting: int,
) -> Replayed:
    rows, streams, reference_rows = volume
    # A window's place within the blocks is chance: onsets differ by device.
    late = rng.integers(0, settings.sizes[-1], size=runs) if healthy >= 2 * settings.sizes[-1] else np.zeros(runs, int)
    total = healthy + drifting + int(late.max())
    counts = np.empty((total, runs, TEST_BINS), dtype=np.int64)
    for i in range(runs):
        counts[:, i] = draw(rng, shift, reference_rows, rows, total, healthy + int(late[i]))
    reference = np.full((runs, TEST_BINS), reference_rows // TEST_BINS)
    found = replay(counts, reference, settings, per_device=1, budget_streams=streams, recalibrate=8)
    moved = [[h._replace(window=h.window - int(late[h.stream])) for h in hits] for hits in found_of(found)]
    return Replayed(*moved)


def found_of(found: Replayed) -> tuple[list[Hit], list[Hit], list[Hit]]:
    """Warnings, records and criticals."""
    return found.warnings, found.records, found.criticals


def _delays(hits: list[Hit], runs: int, healthy: int) -> Floats:
    """Per run, windows from the onset to the first hit, counting the one it is seen in."""
    delays = np.full(runs, NEVER)
    for hit in hits:
        if hit.window >= healthy:
            delays[hit.stream] = min(delays[hit.stream], hit.window - healthy + 1)
    return delays


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
