"""A regressor's residuals move: labels tell, late and in any order, and the budget holds."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.data.moments import reference_residuals
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.performance import Labelled
from lightship.monitoring.residuals import judge_residuals, label_streams
from lightship.monitoring.verdict import ResidualShift, ResidualSide
from lightship_agent.contract.moments import LIMIT, STEPS
from lightship_agent.contract.profile import Binner, ReferenceProfile, ResidualReference

from .streams import Stream

SETTINGS = DriftSettings()
#: Of a regressor whose unit is not a standard deviation.
UNIT = 3.7
Values = npt.NDArray[np.float32]


class Regressor:
    """A device whose truth is what the model says, and noise."""

    def __init__(self, seed: int, heldout: int = 2_000, tail: float | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self._tail = tail
        residuals = self.draw(heldout)
        reference = reference_residuals(np.zeros(heldout, np.float32), residuals)
        assert reference is not None
        self.reference: ResidualReference = reference
        errors = int((np.abs(residuals) > np.float32(reference.bound)).sum())
        self.profile: ReferenceProfile = msgspec.structs.replace(
            Stream(1, features=2).profile,
            labels=(), predictions=(), scores=(), labelled=heldout, errors=errors, residuals=reference,
        )  # fmt: skip
        self._binner = Binner([reference.bins])

    def draw(self, rows: int) -> Values:
        noise = self.rng.standard_normal(rows) if self._tail is None else self.rng.standard_t(self._tail, rows)
        return (UNIT * noise).astype(np.float32)

    def window(self, window: int, rows: int = 50, bias: float = 0.0, spread: float = 1.0) -> Labelled:
        """Labels of one window, bias in standard deviations."""
        residuals = (self.draw(rows) * spread + bias * UNIT).astype(np.float32)
        steps = np.clip(np.rint(residuals * (STEPS / self.reference.scale)), -LIMIT, LIMIT).astype(np.int64)
        cells = tuple(self._binner.count(residuals[:, None]).tolist())
        errors = int((np.abs(residuals) > self.reference.bound).sum())
        return Labelled(window, rows, errors, cells, (int(steps.sum()), int((steps**2).sum())))

    def windows(self, n: int, first: int = 0, rows: int = 50, bias: float = 0.0, spread: float = 1.0) -> list[Labelled]:
        return [self.window(first + w, rows, bias, spread) for w in range(n)]

    def judge(self, labels: list[Labelled]) -> dict[ResidualSide, ResidualShift]:
        return {s.side: s for s in judge_residuals(labels, self.profile, SETTINGS)}


@pytest.mark.parametrize(
    ("side", "bias", "spread"), [("up", 0.5, 1.0), ("down", -0.5, 1.0), ("wider", 0.0, 1.5), ("up", 6.0, 1.0)]
)
def test_residuals_that_move_are_seen_named_measured_and_dated(side: ResidualSide, bias: float, spread: float) -> None:
    device = Regressor(3)
    labels = [*device.windows(60), *device.windows(20, first=60, bias=bias, spread=spread)]
    assert not any(s.alarm for s in device.judge(labels[:60]).values())
    found = device.judge(labels)[side]
    assert found.alarm
    assert found.since in range(50, 64)
    assert found.bias == pytest.approx(bias, abs=0.15)
    assert found.spread == pytest.approx(spread, abs=0.15)
    assert found.share > found.tolerated > found.expected


@pytest.mark.parametrize("tail", [None, 3.0])
def test_a_bias_and_a_spread_within_the_floor_keep_the_budget(tail: float | None) -> None:
    alarms = 0
    for seed in range(20):
        device = Regressor(seed, tail=tail)
        scale = device.reference.scale / UNIT  # of heavy tails, not 1
        labels = device.windows(1_000, rows=20, bias=0.07 * scale, spread=1.03)
        alarms += any(s.alarm for s in device.judge(labels).values())
    assert alarms <= 1  # 20 runs of 1,000 windows, at a tenth of one per 8,760


def test_residuals_that_became_narrower_alarm_nobody() -> None:
    device = Regressor(5)
    assert not any(s.alarm for s in device.judge(device.windows(200, spread=0.5)).values())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1_000))
def test_neither_the_order_nor_the_splitting_of_labels_changes_anything(seed: int) -> None:
    device = Regressor(7, heldout=300)
    whole = device.windows(8, bias=0.4)
    late = device.windows(8, bias=0.4)
    both = [*whole, *late]
    together = [
        Labelled(
            a.window,
            a.labelled + b.labelled,
            a.errors + b.errors,
            tuple(x + y for x, y in zip(a.residuals, b.residuals, strict=True)),
            tuple(x + y for x, y in zip(a.sums, b.sums, strict=True)),
        )
        for a, b in zip(whole, late, strict=True)
    ]
    order = np.random.default_rng(seed).permutation(len(both))
    assert device.judge([both[i] for i in order]) == device.judge(together)


def test_all_streams_of_labels_together_spend_the_share_of_labels() -> None:
    device = Regressor(9)
    streams = label_streams(device.profile, SETTINGS)
    assert streams == 4
    spent = streams * SETTINGS.horizon_windows / SETTINGS.performance_line(streams)
    assert spent == pytest.approx(SETTINGS.performance_share * SETTINGS.budget)
    assert label_streams(Stream(1).profile, SETTINGS) == 1


def test_windows_without_residuals_or_with_those_of_another_layout_say_nothing() -> None:
    device = Regressor(11)
    old, foreign = Labelled(0, 50, 3), Labelled(1, 50, 3, (25, 25), (0, 0))
    nothing = Labelled(2, 5, 5, (*[0] * (device.reference.bins.cells - 1), 5), (0, 0))  # a model that answered NaN
    assert device.judge([old, foreign, nothing]) == {}
    moved = device.windows(20, first=3, bias=1.0)
    assert device.judge([old, foreign, nothing, *moved]) == device.judge(moved)


def test_residuals_that_are_nearly_all_alike_are_watched_only_where_there_is_a_cut() -> None:
    rng = np.random.default_rng(13)
    exact = np.zeros(1_000, np.float32)
    exact[:300] = rng.standard_normal(300).astype(np.float32)  # 15 % below 0, 70 % at it, 15 % above
    reference = reference_residuals(np.zeros(1_000, np.float32), exact)
    assert reference is not None
    profile = msgspec.structs.replace(Regressor(1).profile, residuals=reference)
    cells = tuple(reference.bins.counts)
    found = judge_residuals([Labelled(w, 1_000, 0, cells, (0, 1)) for w in range(50)], profile, SETTINGS)
    assert not any(s.alarm for s in found)
    assert label_streams(profile, SETTINGS) == len(found) + 1


def test_moved_residuals_make_a_verdict_critical_and_are_told_in_words() -> None:
    device, stream = Regressor(15), Stream(1, features=2)
    labels = device.windows(12, bias=0.6)
    plain = msgspec.structs.replace(stream.profile, labels=(), predictions=(), scores=())
    windows = [msgspec.structs.replace(w, predictions=(), scores=()) for w in stream.windows(12)]
    assert plain.features == device.profile.features
    verdict, _ = watch_stream(device.profile, windows, 0, SETTINGS, None, "k", labels=labels)
    assert verdict.level == "critical"
    assert ("residuals", "performance") in [(a.name, a.kind) for a in verdict.alarms if a.confirmed]
    said = "\n".join(explain("pump-1", verdict, SETTINGS))
    assert "The residuals have moved up: " in said
    assert re.search(r"bias about \+0\.(5|6)\d sd of held-out residuals, spread about (0\.9|1\.0)\d times theirs", said)
    assert "The model answers too low." in said


def test_residuals_as_ever_are_told_with_the_state_of_the_evidence() -> None:
    device = Regressor(17)
    stream = Stream(1, features=2)
    windows = [msgspec.structs.replace(w, predictions=(), scores=()) for w in stream.windows(12)]
    verdict, _ = watch_stream(device.profile, windows, 0, SETTINGS, None, "k", labels=device.windows(12))
    assert [a for a in verdict.alarms if a.kind == "performance"] == []
    said = "\n".join(explain("pump-1", verdict, SETTINGS))
    assert "Residuals since window" in said
    assert "of its line" in said
