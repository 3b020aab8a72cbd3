"""The fleet tells a sick device from a changed world."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.fleet import FleetVerdict, few_p, judge_fleet
from lightship.monitoring.verdict import Alarm, FeatureShift, Verdict

SETTINGS = DriftSettings()


def shift(name: str, *, alarm: bool = True, p: float = 1e-12) -> FeatureShift:
    return FeatureShift(
        name=name,
        kind="feature",
        psi=0.5,
        psi_low=0.3,
        psi_high=0.7,
        p_value=p,
        level_windows=1,
        first_window=9,
        rows=200,
        score=0.5,
        alarm=alarm,
        current=(),
        reference=(),
    )


def drifting(*names: str, confirmed: bool = False) -> Verdict:
    alarms = tuple(Alarm(name=n, kind="shift", level_windows=1, first_window=9, confirmed=confirmed) for n in names)
    return Verdict(
        level="critical" if confirmed else "warning",
        window=9,
        rows=200,
        tested=(1, 2),
        alarms=alarms,
        evidence=tuple(shift(n) for n in names),
        quality=(),
        p_value=1e-9,
    )


HEALTHY = Verdict(level="ok", window=9, rows=200, tested=(1, 2), alarms=(), evidence=(), quality=(), p_value=0.6)
SILENT = msgspec.structs.replace(HEALTHY, tested=(), p_value=None, rows=3)
UNEASY = msgspec.structs.replace(HEALTHY, evidence=(shift("f1", alarm=False, p=1e-5),), p_value=0.005)


def judge(verdicts: list[Verdict]) -> FleetVerdict:
    return judge_fleet({f"d{i}": v for i, v in enumerate(verdicts)}, SETTINGS)


def test_a_healthy_fleet_is_none() -> None:
    assert judge([HEALTHY] * 5).kind == "none"
    assert judge([]).kind == "none"
    assert "enough rows" in judge([SILENT]).sentence


@pytest.mark.parametrize(("drift", "devices"), [(2, 2), (2, 3), (2, 4), (3, 5), (3, 6), (10, 20), (500, 1_000)])
def test_half_of_the_devices_and_at_least_two_are_the_fleet(drift: int, devices: int) -> None:
    verdict = judge([drifting("f1")] * drift + [HEALTHY] * (devices - drift))
    assert (verdict.kind, verdict.shared, len(verdict.devices)) == ("fleet", ("f1",), drift)
    fewer = judge([drifting("f1")] * (drift - 1) + [HEALTHY] * (devices - drift + 1))
    assert fewer.kind == "local"


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 100])
def test_one_drifting_device_is_never_the_fleet_and_is_named(devices: int) -> None:
    verdict = judge([drifting("f1")] + [HEALTHY] * (devices - 1))
    assert (verdict.kind, verdict.devices) == ("local", ("d0",))
    assert "d0" in verdict.sentence


def test_a_device_that_is_alone_says_that_it_can_not_tell() -> None:
    assert "can't tell" in judge([drifting("f1")]).sentence


def test_two_devices_that_drift_in_different_features_are_two_sick_devices() -> None:
    verdict = judge([drifting("f1"), drifting("f2")])
    assert (verdict.kind, verdict.devices) == ("local", ("d0", "d1"))


def test_devices_without_rows_have_no_vote() -> None:
    assert judge([drifting("f1"), drifting("f1")] + [SILENT] * 50).kind == "fleet"


def test_a_device_below_its_own_alarm_line_counts_when_others_show_the_same() -> None:
    verdict = judge([drifting("f1"), UNEASY, UNEASY, HEALTHY])
    assert (verdict.kind, verdict.devices) == ("fleet", ("d0", "d1", "d2"))


def test_uneasy_devices_alone_are_the_fleet_only_when_the_budget_can_bear_it() -> None:
    assert judge([UNEASY, UNEASY, HEALTHY]).kind == "none"  # 3e-4 an hour would be two alarms a year
    assert judge([UNEASY] * 8 + [HEALTHY] * 2).kind == "fleet"


def test_what_a_member_shows_alone_is_told_apart_from_what_it_shares() -> None:
    verdict = judge([drifting("f1", "f4", confirmed=True)] + [drifting("f1", confirmed=True)] * 4)
    assert verdict.kind == "fleet"
    assert verdict.own == {"d0": ("f4",)}


def test_a_member_shows_nothing_alone_that_half_of_the_others_lean_towards() -> None:
    first, shared = drifting("f1", "f4", confirmed=True), drifting("f1", confirmed=True)
    first = msgspec.structs.replace(first, leaning=("f1", "f4"))
    leans = msgspec.structs.replace(shared, leaning=("f1", "f4"))
    assert judge([first, leans, leans, shared, shared]).own == {}
    assert judge([first, leans, shared, shared, shared]).own == {"d0": ("f4",)}
    assert judge([first, leans]).own == {}
    assert judge([first]).own == {"d0": ("f1", "f4")}


@settings(deadline=None)
@given(drift=st.integers(0, 30), healthy=st.integers(0, 30))
def test_another_drifting_device_never_makes_it_less_of_a_fleet(drift: int, healthy: int) -> None:
    order = {"none": 0, "local": 1, "fleet": 2}
    now = judge([drifting("f1")] * drift + [HEALTHY] * healthy)
    more = judge([drifting("f1")] * (drift + 1) + [HEALTHY] * healthy)
    assert order[more.kind] >= order[now.kind]
    assert more.p_value <= now.p_value or drift == 0


def test_a_few_devices_far_out_and_many_a_little_are_both_unlikely_and_chance_is_not() -> None:
    healthy = [(i + 0.5) / 100 for i in range(100)]
    assert few_p(healthy) == 1.0
    assert few_p([1e-9] * 5 + healthy[5:]) < 1e-20
    assert few_p([0.009] * 12 + healthy[12:]) < 1e-6
    assert few_p([]) == 1.0


def test_the_count_of_small_p_values_is_conservative() -> None:
    rng = np.random.default_rng(6)
    found = np.array([few_p(p) for p in rng.random((4_000, 40)).tolist()])
    assert (found < 0.05).mean() <= 0.05
    assert (found < 0.001).mean() <= 0.003
