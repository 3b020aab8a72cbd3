"""A rate that rises is seen; rows that are alike don't pass for many; chance keeps the budget."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from lightship.monitoring.rate import Trial, dispersion, evidence_path, watch_rate

LINE = 87_600.0
ROWS = 50


def trials(hits: npt.ArrayLike, rows: int = ROWS) -> list[Trial]:
    return [Trial(w, rows, int(k)) for w, k in enumerate(np.asarray(hits))]


def correlated(rng: np.random.Generator, windows: int, rho: float) -> list[Trial]:
    """A quarter of the rows are hits, and rows that follow each other are alike."""
    x = np.empty(windows * ROWS)
    x[0] = rng.standard_normal()
    for i, step in enumerate(rng.standard_normal(len(x) - 1) * math.sqrt(1 - rho**2), 1):
        x[i] = rho * x[i - 1] + step
    return trials((x > 0.6745).reshape(windows, ROWS).sum(axis=1))


def test_independent_rows_have_a_phi_of_about_one() -> None:
    rng = np.random.default_rng(1)
    found = [dispersion(trials(rng.binomial(ROWS, 0.25, 200))) for _ in range(40)]
    assert min(found) >= 1
    assert np.mean(found) < 1.3


def test_rows_that_are_alike_count_for_fewer() -> None:
    rng = np.random.default_rng(2)
    assert 6 < dispersion(correlated(rng, 300, 0.9)) < 20
    assert dispersion(correlated(rng, 300, 0.5)) > 1.6


def test_rows_that_are_alike_raise_no_alarm_and_would_without_phi() -> None:
    rng = np.random.default_rng(3)
    alarms = plain = 0
    for _ in range(10):
        seen = correlated(rng, 1_000, 0.9)
        alarms += max(evidence_path(seen, 0.28, LINE)) >= 1
        plain += max(evidence_path(seen, 0.28, LINE, independent=True)) >= 1
    assert alarms == 0
    assert plain >= 8


def test_few_windows_of_rows_that_are_alike_raise_no_alarm_either() -> None:
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(60):
        seen = correlated(rng, 24, 0.9)
        alarms += any(evidence_path(seen[:n], 0.28, LINE)[-1] >= 1 for n in range(1, 25))
    assert alarms <= 1


def test_most_rows_being_hits_from_the_first_window_on_is_seen_in_three() -> None:
    rng = np.random.default_rng(6)
    assert evidence_path(trials(rng.binomial(100, 0.5, 3), rows=100), 0.11, LINE)[-1] >= 1


def test_a_rise_is_no_dispersion_and_is_dated() -> None:
    rng = np.random.default_rng(4)
    seen = trials([*rng.binomial(ROWS, 0.25, 200), *rng.binomial(ROWS, 0.45, 20)])
    found = watch_rate(seen, 0.28, LINE)
    assert found.phi < 1.6
    assert found.evidence >= 1
    assert found.since in range(196, 204)
    assert found.hits / found.rows == pytest.approx(0.45, abs=0.05)


def test_a_rate_below_what_is_tolerated_has_no_beginning_of_its_own() -> None:
    found = watch_rate(trials([5] * 40), 0.28, LINE)
    assert (found.since, found.rows, found.hits) == (0, 40 * ROWS, 200)
    assert found.evidence < 1e-4


def test_windows_of_nothing_but_hits_or_of_one_row_are_no_trouble() -> None:
    assert dispersion(trials([ROWS] * 5)) == 1
    assert dispersion(trials([0])) == 1
    assert dispersion(trials([1, 0] * 30, rows=1)) >= 1
    assert watch_rate(trials([ROWS] * 40), 0.28, LINE).evidence == pytest.approx(10, rel=0.01)
    assert watch_rate(trials([1]), 0.28, LINE).since == 0
