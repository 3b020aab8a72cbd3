"""Bench drift: streams of rows that nothing has happened to, of several natures, as counts per window.

Rules: every stream has a reference of its own, of the same law; whoever alarms on these alarms for nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter  # type: ignore[import-untyped]

from lightship.monitoring.layout import TEST_BINS

Counts = npt.NDArray[np.integer]

REFERENCE: Final = 10_000
ROWS: Final = 200
NATURES: Final = ("AR(1) 0.5", "AR(1) 0.9", "AR(1) 0.99", "daily cycle 0.3 sd", "window effect 0.1 sd")


def independent(rng: np.random.Generator, windows: int, streams: int) -> tuple[Counts, Counts]:
    """Independent rows: counts `[windows, streams, bins]` and the references' `[streams, bins]`."""
    # The chance mass between a reference's own quantiles is Dirichlet.
    shares = rng.dirichlet(np.full(TEST_BINS, REFERENCE / TEST_BINS), size=streams)
    return rng.multinomial(ROWS, shares, size=(windows, streams)).astype(np.int16), _reference(streams)


def dependent(nature: str, rng: np.random.Generator, windows: int, streams: int) -> tuple[Counts, Counts]:
    """Rows of one of the `NATURES`."""
    counts = np.empty((windows, streams, TEST_BINS), dtype=np.int16)
    for s in range(streams):
        edges = np.quantile(_marginal(nature, rng), np.arange(1, TEST_BINS) / TEST_BINS)
        cells = np.searchsorted(edges, _rows(nature, rng, windows)) + TEST_BINS * np.repeat(np.arange(windows), ROWS)
        counts[:, s] = np.bincount(cells, minlength=windows * TEST_BINS).reshape(windows, TEST_BINS)
    return counts, _reference(streams)


def _reference(streams: int) -> Counts:
    return np.full((streams, TEST_BINS), REFERENCE // TEST_BINS)


def _marginal(nature: str, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Independent rows of the same law, over all hours and windows."""
    x = rng.standard_normal(REFERENCE)
    if nature.startswith("daily"):
        x = np.sqrt(1 - 0.045) * x + 0.3 * np.sin(2 * np.pi * rng.random(REFERENCE))
    return x


def _rows(nature: str, rng: np.random.Generator, windows: int) -> npt.NDArray[np.float64]:
    x = rng.standard_normal(windows * ROWS)
    if nature.startswith("AR"):
        rho = float(nature.split()[1])
        return np.asarray(lfilter([np.sqrt(1 - rho * rho)], [1, -rho], x))
    hour = np.arange(windows) % 24
    if nature.startswith("daily"):
        return np.asarray(np.sqrt(1 - 0.045) * x + np.repeat(0.3 * np.sin(2 * np.pi * hour / 24), ROWS))
    return np.asarray(np.sqrt(0.99) * x + np.repeat(0.1 * rng.standard_normal(windows), ROWS))
