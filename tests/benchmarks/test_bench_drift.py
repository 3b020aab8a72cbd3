"""The tools behind `make bench-drift` measure what they say, and its page holds what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench_drift.measures import Delay, Quiet, Size, category_shift, joint_drift
from bench_drift.page import Bar, Figures, page
from bench_drift.streams import NATURES, REFERENCE, ROWS, dependent, independent
from lightship.monitoring.two_sample import two_sample

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "drift.json"


def test_independent_streams_are_what_they_are_called() -> None:
    counts, reference = independent(np.random.default_rng(1), 300, 8)
    assert (counts.sum(axis=2) == ROWS).all()
    assert (reference.sum(axis=1) == REFERENCE).all()
    assert two_sample(counts, reference).statistic.mean() == pytest.approx(9.0, abs=0.6)


@pytest.mark.parametrize("nature", NATURES)
def test_dependent_streams_have_the_references_law_and_more_spread_than_chance(nature: str) -> None:
    counts, reference = dependent(nature, np.random.default_rng(2), 480, 3)
    assert (counts.sum(axis=2) == ROWS).all()
    tests = two_sample(counts, reference)
    assert tests.statistic.mean() > 9.6
    if "0.99" not in nature:
        shares = counts.sum(axis=(0, 1)) / counts.sum()
        assert shares == pytest.approx(np.full(10, 0.1), abs=0.02)


def test_a_category_shift_moves_what_it_says() -> None:
    cuts = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    before, after = (category_shift(d).shares(cuts, 0) for d in (0.0, 0.1))
    assert np.abs(after - before).sum() / 2 == pytest.approx(0.1)


def test_swapped_columns_are_seen_and_nothing_is_not() -> None:
    found = joint_drift()
    assert found["nothing"] == 0.0
    assert found["two columns swapped"] == 1.0


def figures(warnings: float = 0.0, delay: float | None = 1.0) -> Figures:
    natures = [("independent", 0.0), ("independent", 0.02), *((n, 0.02) for n in NATURES)]
    quiet = [
        Quiet(nature=n, floor=f, years=4, bare=9.0, warnings=warnings, records=0.0, criticals=0.0) for n, f in natures
    ]
    names = ["mean +0.5 sd", "mean +0.25 sd", "mean +1 sd", "spread × 1.25", "category, total variation 0.05"]
    names += ["missing 1% to 5%", "mean to +1 sd over 500 windows"]
    facts = {"effect": 0.1, "warning": delay, "warning_90": None, "critical": None, "critical_90": None}
    delays = [Delay(shift=n, floor=f, **facts) for n in names for f in (0.005, 0.02)]  # type: ignore[arg-type]
    fleets = {"false alarms per fleet-month": 0.0, "0.05 sd on all": 1.0, "1 sd on 5 of 100": 9.0}
    concept = {"0.10 to 0.20": 300.0, "false alarms per device-year": 0.0}
    cost = {"bytes remembered per device": 6_000.0}
    return Figures(Size(4, 1, 8), quiet, delays, {"two columns swapped": 1.0}, fleets, concept, cost, "a machine")


def test_bars_are_missed_by_false_alarms_and_by_what_is_never_seen() -> None:
    assert all(bar.holds for bar in figures().bars())
    missed = {bar.name for bar in figures(warnings=30.0, delay=None).bars() if not bar.holds}
    assert any("false alarms" in name for name in missed)
    assert any("delay" in name for name in missed)
    assert Bar("delay", float("inf"), 3.0).plain()["value"] is None


def test_the_page_says_what_was_missed() -> None:
    assert "**missed**" in page(figures(delay=None))
    assert "**missed**" not in page(figures())


@pytest.mark.skipif(not RESULTS.exists(), reason="make bench-drift has not been run")
def test_the_stored_figures_are_those_of_the_page() -> None:
    stored = json.loads(RESULTS.read_text())
    text = RESULTS.with_suffix(".md").read_text()
    assert len({bar["name"] for bar in stored["bars"]}) == len(stored["bars"])
    assert all(bar["name"] in text for bar in stored["bars"])
    assert text.count("**missed**") == sum(not bar["holds"] for bar in stored["bars"])
