"""Labels tell when the model has become worse, late and in any order; scores tell what they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.monitoring.cbpe import calibration_table, estimate
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.performance import Labelled, judge_errors, tolerated_rate
from lightship_agent.contract.profile import count_outputs

from .streams import Stream

SETTINGS = DriftSettings()


def labels(rng: np.random.Generator, windows: int, rate: float, n: int = 100, first: int = 0) -> list[Labelled]:
    return [Labelled(first + w, n, int(rng.binomial(n, rate))) for w in range(windows)]


def test_errors_that_double_are_seen_within_hours_and_dated() -> None:
    rng = np.random.default_rng(1)
    delays = []
    for _ in range(20):
        healthy = labels(rng, 100, 0.10)
        worse = labels(rng, 40, 0.20, first=100)
        before = judge_errors(healthy, 200, 2_000, SETTINGS)
        assert before is not None
        assert not before.alarm
        found = [judge_errors([*healthy, *worse[:n]], 200, 2_000, SETTINGS) for n in range(1, 41)]
        at = next(i for i, f in enumerate(found, 1) if f is not None and f.alarm)
        delays.append(at)
        assert found[at - 1].since in range(90, 104)  # type: ignore[union-attr]
    assert np.median(delays) <= 6


def test_a_rate_within_the_floor_keeps_the_budget() -> None:
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(30):
        found = judge_errors(labels(rng, 2_000, 0.115, n=20), 1_000, 10_000, SETTINGS)
        alarms += found is not None and found.alarm
    assert alarms <= 1  # 30 runs of 2,000 windows, at a tenth of one per 8,760


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1_000), cut=st.integers(1, 99))
def test_neither_order_nor_splitting_of_labels_changes_anything(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    whole = labels(rng, 12, 0.2)
    split = [
        part
        for w in whole
        for part in (
            Labelled(w.window, cut, min(w.errors, cut)),
            Labelled(w.window, w.labelled - cut, w.errors - min(w.errors, cut)),
        )
    ]
    order = rng.permutation(len(split))
    if all(p.errors <= p.labelled for p in split):
        shuffled = [split[i] for i in order]
        assert judge_errors(shuffled, 100, 1_000, SETTINGS) == judge_errors(whole, 100, 1_000, SETTINGS)


def test_a_rate_that_was_measured_on_few_rows_gets_a_wide_floor() -> None:
    assert tolerated_rate(10, 100, SETTINGS) > 0.16
    assert tolerated_rate(10_000, 100_000, SETTINGS) == pytest.approx(0.11, abs=1e-4)


def test_without_labels_or_a_known_rate_nothing_is_said() -> None:
    assert judge_errors([], 10, 100, SETTINGS) is None
    assert judge_errors([Labelled(0, 10, 9)], 0, 0, SETTINGS) is None


def test_errors_make_a_verdict_critical_though_nothing_drifts() -> None:
    stream = Stream(60)
    windows = stream.windows(10)
    worse = [Labelled(w, 100, 40) for w in range(10)]
    verdict, _ = watch_stream(stream.profile, windows, 0, SETTINGS, None, "k", labels=worse)
    assert verdict.level == "critical"
    assert [(a.name, a.kind) for a in verdict.alarms] == [("errors", "performance")]


# -- without labels -----------------------------------------------------------------------------------------------


def scored(rng: np.random.Generator, rows: int, spread: float) -> tuple[np.ndarray, ...]:
    """Rows of a calibrated binary model: scores, labels, predictions and the truth."""
    logit = rng.standard_normal(rows) * spread
    chance = 1 / (1 + np.exp(-logit))
    truth = (rng.random(rows) < chance).astype(np.int64)
    said = (chance > 0.5).astype(np.int64)
    return np.stack([1 - chance, chance], axis=1).astype(np.float32), said, truth


def histogram(scores: np.ndarray, said: np.ndarray) -> np.ndarray:
    return np.reshape(count_outputs(said, scores, 2)[1], (2, -1))


def test_the_estimate_follows_the_accuracy_of_harder_inputs_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(3)
    scores, said, truth = scored(rng, 40_000, 2.0)
    right = said == truth
    hits, base = histogram(scores[right], said[right]), histogram(scores, said)
    for spread in (0.7, 2.0, 3.0):
        now, answers, real = scored(rng, 5_000, spread)
        found = estimate(histogram(now, answers), hits, base)
        assert found is not None
        realised = float((answers == real).mean())
        chance = now.max(axis=1)
        by_row = float(chance.mean())
        assert found.accuracy == pytest.approx(realised, abs=0.02)
        assert found.accuracy == pytest.approx(by_row, abs=0.006)
        assert found.low - 0.01 < realised < found.high + 0.01
        assert found.f1 is not None
        assert found.auc is not None
        order = np.argsort(now[:, 1], kind="stable")
        rank = np.empty(len(order))
        rank[order] = np.arange(1, len(order) + 1)
        n1 = real.sum()
        auc = (rank[real == 1].sum() - n1 * (n1 + 1) / 2) / (n1 * (len(real) - n1))
        assert found.auc == pytest.approx(float(auc), abs=0.02)


def test_flipped_labels_move_the_estimate_by_nothing_and_it_says_so() -> None:
    rng = np.random.default_rng(4)
    scores, said, truth = scored(rng, 20_000, 2.0)
    right = said == truth
    found = estimate(histogram(scores, said), histogram(scores[right], said[right]), histogram(scores, said))
    assert found is not None
    assert found.accuracy == pytest.approx(found.expected, abs=0.005)
    assert "does not" in found.blind_spot


def test_the_calibration_rises_with_the_score() -> None:
    rng = np.random.default_rng(5)
    total = rng.integers(0, 30, (3, 21))
    chance, error = calibration_table(rng.binomial(total, 0.7), total)
    assert (np.diff(chance, axis=1) >= -1e-12).all()
    assert ((chance > 0) & (chance < 1)).all()
    assert (error > 0).all()


def test_no_scores_no_estimate() -> None:
    nothing = np.zeros((2, 21))
    assert estimate(nothing, nothing + 1, nothing + 1) is None
    assert estimate(nothing + 1, nothing, nothing) is None
