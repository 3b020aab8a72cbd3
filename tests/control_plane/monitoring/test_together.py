"""Features that go together otherwise, while each alone looks the same, alarm within the budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from lightship.data.profile import reference_profile
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.joint import SETTLED, JointHistory, Together, judge_together
from lightship.monitoring.memory import Memory, pack, unpack
from lightship.monitoring.verdict import Verdict
from lightship_agent.contract.moments import Moments
from lightship_agent.contract.profile import ReferenceProfile, WindowCounts
from lightship_agent.monitor.tally import Tally

FEATURES, ROWS, STRETCH = 8, 200, 8
NAMES = tuple(f"f{i}" for i in range(FEATURES))
Floats = npt.NDArray[np.float32]


def covariance(**changed: float) -> npt.NDArray[np.float64]:
    """f0 and f1 go together; `f2f3=0.6` and the like change a pair."""
    matrix = np.eye(FEATURES)
    for pair, value in {"f0f1": 0.5, **changed}.items():
        i, j = int(pair[1]), int(pair[3])
        matrix[i, j] = matrix[j, i] = value
    return matrix


def drawn(rng: np.random.Generator, rows: int, **changed: float) -> Floats:
    root = np.linalg.cholesky(covariance(**changed))
    return (rng.standard_normal((rows, FEATURES)) @ root.T).astype(np.float32)


@cache
def profile() -> ReferenceProfile:
    return reference_profile(drawn(np.random.default_rng(0), 10_000), NAMES)


@dataclass
class Device:
    """Counts rows as the agent does, and is watched as the control plane does."""

    rng: np.random.Generator
    settings: DriftSettings

    def __post_init__(self) -> None:
        self.tally = Tally(profile())
        self.windows: list[WindowCounts] = []
        self.verdicts: list[Verdict] = []
        self.memory: Memory | None = None

    def stretch(self, **changed: float) -> Verdict:
        """Eight windows, and then their products."""
        first = len(self.windows)
        for i in range(STRETCH):
            rows = drawn(self.rng, ROWS, **changed)
            self.tally.count(rows, np.full(ROWS, -1), np.full(ROWS, np.nan, dtype=np.float32))
            self.windows.append(self.tally.take()[0])
            told = self._told(first) if i == STRETCH - 1 else []
            begins = max(0, len(self.windows) - self.settings.history)
            verdict, self.memory = watch_stream(
                profile(), self.windows[begins:], begins, self.settings, self.memory, "k", together=told
            )
            self.verdicts.append(verdict)
        return self.verdicts[-1]

    def _told(self, first: int) -> list[Together]:
        products = self.tally.take_products()
        assert products is not None
        return [Together(first, len(self.windows) - 1, products, total(self.windows[first:]))]


def total(windows: list[WindowCounts]) -> Moments:
    known = [w.moments for w in windows if w.moments is not None]
    summed = known[0]
    for m in known[1:]:
        summed += m
    return summed


def test_a_pair_that_comes_together_alarms_where_no_feature_does_and_is_critical_when_it_does_so_again() -> None:
    device = Device(np.random.default_rng(1), DriftSettings(levels=1))
    for _ in range(SETTLED + 2):
        device.stretch()
    assert {v.level for v in device.verdicts} == {"ok"}
    first, second = device.stretch(f2f3=0.4), device.stretch(f2f3=0.4)
    assert [(a.name, a.kind, a.confirmed) for a in first.alarms] == [("f2 with f3", "joint", False)]
    assert (first.level, second.level) == ("warning", "critical")
    assert first.joint is not None
    assert first.joint.now == pytest.approx(0.4, abs=0.1)
    said = " ".join(explain("pump-1", second, device.settings))
    assert "f2 and f3 go together otherwise than in training" in said
    assert "It is critical" in said
    assert "Nothing stands out" not in said


def test_nothing_is_said_before_a_device_was_seen_for_a_while() -> None:
    device = Device(np.random.default_rng(2), DriftSettings(levels=1))
    for _ in range(SETTLED):
        assert device.stretch(f2f3=0.4).alarms == ()


def test_a_stretch_is_judged_once_and_what_is_remembered_survives_storage() -> None:
    device = Device(np.random.default_rng(3), DriftSettings(levels=1))
    device.stretch()
    memory = device.memory
    assert memory is not None
    assert memory.joint.stretches == 1
    assert unpack(pack(memory)).joint == memory.joint
    device.windows.append(device.windows[-1])
    again = watch_stream(
        profile(), device.windows, 0, device.settings, memory, "k", together=[products_like(device)]
    ).memory
    assert again.joint == memory.joint


def products_like(device: Device) -> Together:
    """The first stretch once more."""
    reference = profile().moments
    assert reference is not None
    assert reference.products is not None
    return Together(0, STRETCH - 1, reference.products, total(device.windows[:STRETCH]))


def test_products_of_other_rows_than_the_moments_say_nothing() -> None:
    device = Device(np.random.default_rng(4), DriftSettings(levels=1))
    device.stretch()
    reference = profile().moments
    assert reference is not None
    judged = judge_together(products_like(device), reference, NAMES, JointHistory(), device.settings)
    assert judged.shift is None
    assert not judged.alarm
    assert judged.history == JointHistory(window=STRETCH - 1)


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_devices_keep_the_budget_also_with_a_correlation_of_their_own(own: float) -> None:
    settings = DriftSettings(budget=0.01, horizon_windows=8, effect_floor=0.0)
    reference = profile().moments
    assert reference is not None
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(24):
        history = JointHistory()
        for n in range(SETTLED + 34):
            tally = Tally(profile())
            rows = drawn(rng, 400, f4f5=own)
            tally.count(rows, np.full(400, -1), np.full(400, np.nan, dtype=np.float32))
            moments, products = tally.take()[0].moments, tally.take_products()
            assert moments is not None
            assert products is not None
            stretch = Together(STRETCH * n, STRETCH * n + 7, products, moments)
            judged = judge_together(stretch, reference, NAMES, history, settings)
            alarms += judged.alarm
            history = judged.history
    assert alarms <= 4  # 24 × 34 × 0.0005 = 0.4 is expected at most


def test_a_change_below_the_floor_is_tolerated_at_any_number_of_rows() -> None:
    settings = DriftSettings(effect_floor=0.02)
    reference = profile().moments
    assert reference is not None
    tally, rng = Tally(profile()), np.random.default_rng(6)
    tally.count(drawn(rng, 200_000, f2f3=0.1), np.full(200_000, -1), np.full(200_000, np.nan, dtype=np.float32))
    moments, products = tally.take()[0].moments, tally.take_products()
    assert moments is not None
    assert products is not None
    known = JointHistory(stretches=20, spread=20.0, worst=20.0)
    stretch = Together(0, 7, products, moments)
    assert not judge_together(stretch, reference, NAMES, known, settings).alarm
    assert judge_together(stretch, reference, NAMES, known, DriftSettings(effect_floor=0.0)).alarm
