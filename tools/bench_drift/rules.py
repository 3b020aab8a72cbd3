"""Bench drift: rules of others, written anew, for hours that the packages themselves would take days for.

Rules: each is what the documentation of its tool gives as default. Evidently's is checked against the package's own
numbers, on as many windows as there is patience for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from lightship.monitoring.layout import TEST_BINS
from lightship.monitoring.two_sample import two_sample

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

#: Evidently's, of a reference above 1,000 rows: Wasserstein's distance over the reference's standard deviation.
_WASSERSTEIN: Final = 0.1


def counts(hours: Floats, reference: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts `[hours, features, bins]` of rows `[hours, rows, features]` in quantile bins, and the reference's."""
    features = reference.shape[1]
    now = np.empty((len(hours), features, TEST_BINS), dtype=np.int64)
    past = np.empty((features, TEST_BINS), dtype=np.int64)
    at = TEST_BINS * np.arange(len(hours))[:, None]
    for j in range(features):
        edges = np.quantile(reference[:, j], np.arange(1, TEST_BINS) / TEST_BINS, method="inverted_cdf")
        past[j] = np.bincount(np.searchsorted(edges, reference[:, j], side="right"), minlength=TEST_BINS)
        cells = np.searchsorted(edges, hours[:, :, j], side="right") + at
        now[:, j] = np.bincount(cells.ravel(), minlength=TEST_BINS * len(hours)).reshape(-1, TEST_BINS)
    return now, past


def wasserstein(hours: Floats, reference: Floats) -> Floats:
    """Evidently's distance `[hours, features]`; the reference's rows are a multiple of the window's."""
    known = np.sort(reference, axis=0).astype(np.float64)
    rows = hours.shape[1]
    pieces = known.reshape(rows, len(known) // rows, -1)  # what each row of a sorted window is moved to
    found = np.empty((len(hours), known.shape[1]))
    for h, hour in enumerate(hours):
        found[h] = np.abs(np.sort(hour, axis=0)[:, None, :] - pieces).mean(axis=(0, 1))
    return np.asarray(found / reference.std(axis=0))


def _psi(line: float) -> Callable[[Floats, Floats], Bools]:
    def judge(hours: Floats, reference: Floats) -> Bools:
        now, past = counts(hours, reference)
        p = np.maximum(now / now.sum(axis=-1, keepdims=True), 1e-4)
        q = np.maximum(past / past.sum(axis=-1, keepdims=True), 1e-4)
        return np.asarray(((p - q) * np.log(p / q)).sum(axis=-1) > line)

    return judge


def _chi2(hours: Floats, reference: Floats) -> Bools:
    return np.asarray(two_sample(*counts(hours, reference)).p_value() < 0.05 / reference.shape[1])


def _evidently(hours: Floats, reference: Floats) -> Bools:
    return np.asarray(wasserstein(hours, reference) >= _WASSERSTEIN)


#: Title, and what it says of each hour and feature.
REWRITTEN: Final[dict[str, Callable[[Floats, Floats], Bools]]] = {
    "PSI > 0.1": _psi(0.1),
    "PSI > 0.2": _psi(0.2),
    "PSI > 0.25": _psi(0.25),
    "χ², Bonferroni over a window's features": _chi2,
    "Evidently's default, rewritten": lambda hours, reference: np.asarray(
        wasserstein(hours, reference) >= _WASSERSTEIN
    ),
}
