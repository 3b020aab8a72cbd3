"""Bench drift: streams of rows that nothing has happened to, of several natures, as counts per window.

Rules: every stream has a reference of its own, of the same law; whoever alarms on these alarms for nothing.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter  # type: ignore[import-untyped]

from lightship.monitoring.layout import TEST_BINS

Counts = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

REFERENCE: Final = 10_000
ROWS: Final = 200
INDEPENDENT: Final = "independent"
NATURES: Final = ("AR(1) 0.5", "AR(1) 0.9", "AR(1) 0.99", "daily cycle 0.3 sd", "window effect 0.1 sd")
_DAILY, _EFFECT = 0.3, 0.1


def independent(rng: np.random.Generator, windows: int, streams: int) -> tuple[Counts, Counts]:
    """Independent rows: counts `[windows, streams, bins]` and the references' `[streams, bins]`."""
    # The chance mass between a reference's own quantiles is Dirichlet.
    shares = rng.dirichlet(np.full(TEST_BINS, REFERENCE / TEST_BINS), size=streams)
    return rng.multinomial(ROWS, shares, size=(windows, streams)).astype(np.int16), _reference(streams)


def dependent(nature: str, rng: np.random.Generator, windows: int, streams: int) -> tuple[Counts, Counts]:
    """Rows of one of the `NATURES`."""
    counts = np.empty((windows, streams, TEST_BINS), dtype=np.int16)
    for s in range(streams):
        edges = quantiles_of(marginal(nature, rng))
        if nature.startswith("AR"):
            # Adding up comparisons is quicker than searching, and the same.
            x = rows(nature, rng, windows).astype(np.float32)
            cell = np.zeros(len(x), dtype=np.uint8)
            for edge in edges.astype(np.float32):
                cell += x >= edge
            flat = cell + TEST_BINS * np.repeat(np.arange(windows, dtype=np.int32), ROWS)
            counts[:, s] = np.bincount(flat, minlength=windows * TEST_BINS).reshape(windows, TEST_BINS)
        else:
            counts[:, s] = _drawn(nature, rng, windows, edges)
    return counts, _reference(streams)


def quantiles_of(rows: Floats) -> Floats:
    """The cut points that a reference of these rows has."""
    return np.asarray(np.quantile(rows, np.arange(1, TEST_BINS) / TEST_BINS))


def shares_between(edges: Floats, middle: Floats, sd: float = 1.0) -> Floats:
    """The mass of normal rows in each bin, given each window's mean, `[windows, bins]`."""
    below = _below((edges - middle[:, None]) / sd)
    return np.maximum(np.diff(below, axis=1, prepend=0.0, append=1.0), 0.0)


def _drawn(nature: str, rng: np.random.Generator, windows: int, edges: Floats) -> Counts:
    """Given a window's mean, its rows are independent: the counts can be drawn at once."""
    middle, sd = _middle(nature, rng, windows)
    return rng.multinomial(ROWS, shares_between(edges, middle, sd))


def _middle(nature: str, rng: np.random.Generator, windows: int) -> tuple[Floats, float]:
    """Each window's mean, and the spread of rows around it."""
    if nature.startswith("daily"):
        return _DAILY * np.sin(2 * np.pi * (np.arange(windows) % 24) / 24), float(np.sqrt(1 - _DAILY**2 / 2))
    return _EFFECT * rng.standard_normal(windows), float(np.sqrt(1 - _EFFECT**2))


def _below(x: Floats) -> Floats:
    """The normal distribution function, from a table of it; good to 1e-8."""
    grid, values = _table()
    return np.interp(x, grid, values)


@cache
def _table() -> tuple[Floats, Floats]:
    grid = np.linspace(-8, 8, 64_001)
    normal = NormalDist()
    return grid, np.array([normal.cdf(g) for g in grid.tolist()])


def _reference(streams: int) -> Counts:
    return np.full((streams, TEST_BINS), REFERENCE // TEST_BINS)


def marginal(nature: str, rng: np.random.Generator, size: Any = REFERENCE) -> Floats:
    """Independent rows of the same law, over all hours and windows."""
    x = rng.standard_normal(size)
    if nature.startswith("daily"):
        hour = rng.integers(0, 24, size)
        x = np.sqrt(1 - _DAILY**2 / 2) * x + _DAILY * np.sin(2 * np.pi * hour / 24)
    return np.asarray(x)


def rows(nature: str, rng: np.random.Generator, windows: int) -> Floats:
    """The rows of one stream, in their order."""
    x = rng.standard_normal(windows * ROWS)
    if nature.startswith("AR"):
        rho = float(nature.split()[1])
        return np.asarray(lfilter([np.sqrt(1 - rho * rho)], [1, -rho], x))
    if nature == INDEPENDENT:
        return x
    middle, sd = _middle(nature, rng, windows)
    return np.asarray(sd * x + np.repeat(middle, ROWS))
