"""All devices together: a shift too small for any one of them is seen, and what moves all at once by nature is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.monitoring import common_shift as c
from lightship.monitoring.common_shift import Common, looks_due
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.layout import Layout
from lightship.monitoring.simulate import normal_shares
from lightship_agent.contract.codes import DriftError
from lightship_agent.contract.profile import FeatureBins, ReferenceProfile

DEVICES, ROWS = 40, 200
CUTS = np.array([-1.28155, -0.84162, -0.52440, -0.25335, 0.0, 0.25335, 0.52440, 0.84162, 1.28155])
DRIFT = DriftSettings(warm_up=8, baseline=60, horizon_windows=1_000)
NAMES = tuple(f"d{i}" for i in range(DEVICES))
Counts = npt.NDArray[np.float64]


def layout() -> Layout:
    counts = (0, *[500] * 10, 0, 0)
    bins = FeatureBins(name="temperature", low=-4.0, high=4.0, edges=tuple(CUTS.tolist()), counts=counts)
    return Layout(ReferenceProfile(rows=5_000, features=(bins,)), DRIFT, {})


class Fleet:
    """Devices that count one standard normal feature each, every one with an offset of its own."""

    def __init__(self, seed: int, devices: int = DEVICES) -> None:
        self.rng = np.random.default_rng(seed)
        self.offsets = 0.3 * self.rng.standard_normal(devices)
        self.past = self.counts(0.0, ROWS * 336)

    def counts(self, shift: float, rows: int = ROWS) -> Counts:
        shares = np.stack([normal_shares(CUTS, float(o + shift), 1.0) for o in self.offsets])
        return self.rng.multinomial(rows, shares)[:, None, :].astype(np.float64)

    def look(self, shift: float) -> c.Look:
        names = NAMES[: len(self.offsets)]
        return c.look(names, self.counts(shift), self.past, np.ones((len(names), 1), dtype=np.bool_))


class Watched:
    """What is remembered, and all that followed."""

    def __init__(self, drift: DriftSettings = DRIFT) -> None:
        self.layout, self.drift = layout(), drift
        self.common = Common.fresh("digest", self.layout, drift)
        self.actions: list[c.Action] = []

    def learn(self, look: c.Look, *, fleet: Sequence[str] = ()) -> tuple[c.Action, ...]:
        windows = dict.fromkeys(look.devices, self.common.looks)
        self.common, actions = c.learn(self.common, self.layout, look, windows, self.drift, fleet=fleet, recovery=3)
        self.actions += actions
        return actions


def healthy(fleet: Fleet, watched: Watched, looks: int = 70) -> None:
    for _ in range(looks):
        watched.learn(fleet.look(0.0))


def opened(actions: Sequence[c.Action]) -> list[c.Open]:
    return [a for a in actions if isinstance(a, c.Open)]


def test_a_shift_too_small_for_any_device_is_a_warning_once_and_ends_when_it_ends() -> None:
    fleet, watched = Fleet(1), Watched()
    healthy(fleet, watched)
    assert watched.actions == []

    for _ in range(20):
        watched.learn(fleet.look(0.1))

    (alarm,) = watched.actions
    assert isinstance(alarm, c.Open)
    assert alarm.level == "warning"
    assert [s.name for s in alarm.shifts] == ["temperature"]
    assert 0.005 < alarm.shifts[0].effect < 0.02
    assert alarm.sentence.startswith("All 40 devices have moved together in temperature, each against its own past")
    assert "No single device may show it" in alarm.sentence

    healthy(fleet, watched, 3)
    assert watched.actions[1:] == [c.Close(reason="recovered")]


def test_a_shift_that_is_more_than_a_device_may_is_critical() -> None:
    fleet, watched = Fleet(2), Watched()
    healthy(fleet, watched)
    for _ in range(20):
        watched.learn(fleet.look(0.3))
    (alarm,) = opened(watched.actions)
    assert alarm.level == "critical"
    assert "more than is tolerated of one device (0.02)" in alarm.sentence


def test_a_warning_that_grows_is_confirmed_and_no_second_alarm() -> None:
    fleet, watched = Fleet(3), Watched()
    healthy(fleet, watched)
    for shift in [0.1] * 20 + [0.4] * 5:
        watched.learn(fleet.look(shift))
    assert [type(a) for a in watched.actions] == [c.Open, c.Confirm]


def test_a_shift_below_the_floor_is_tolerated_for_ever_however_sure_it_is() -> None:
    fleet, watched = Fleet(4), Watched()
    healthy(fleet, watched)
    for _ in range(60):
        watched.learn(fleet.look(0.05))
    assert watched.actions == []
    assert watched.common.last[0].evidence >= 1, "it is there, and seen"


def test_offsets_of_devices_are_no_shift_of_all() -> None:
    fleet, watched = Fleet(5), Watched()
    healthy(fleet, watched, 400)
    assert watched.actions == []


def test_nights_that_all_devices_have_are_learnt_as_what_looks_are_like() -> None:
    fleet, watched = Fleet(6), Watched(DriftSettings(warm_up=8, baseline=120, horizon_windows=1_000))
    for hour in range(500):
        watched.learn(fleet.look(0.3 * np.sin(hour / 24 * 2 * np.pi)))
    assert watched.actions == []


def test_looks_that_resemble_the_one_before_count_for_fewer() -> None:
    fleet, alone, alike = Fleet(13), Watched(), Watched()
    rng, level = np.random.default_rng(14), 0.0
    for _ in range(60):
        level = 0.95 * level + np.sqrt(1 - 0.95**2) * rng.standard_normal()
        alone.learn(fleet.look(0.0))
        alike.learn(fleet.look(0.2 * level))
    assert alone.common.worth[0] == 1.0
    assert alike.common.worth[0] < 0.3


def test_weather_that_lasts_for_days_and_comes_again_is_no_alarm() -> None:
    fleet, watched = Fleet(15), Watched(DriftSettings(warm_up=48, horizon_windows=1_000))
    rng, level = np.random.default_rng(16), 0.0
    for _ in range(900):
        watched.learn(fleet.look(0.1 * level))
        level = 0.99 * level + np.sqrt(1 - 0.99**2) * rng.standard_normal()
    assert watched.actions == []


def test_nothing_is_said_before_what_is_normal_was_learnt() -> None:
    fleet, watched = Fleet(7), Watched()
    for _ in range(DRIFT.baseline):
        watched.learn(fleet.look(0.0 if watched.common.looks < 20 else 0.3))
    assert watched.actions == []


def test_what_the_fleet_is_known_to_drift_in_is_not_said_twice() -> None:
    fleet, watched = Fleet(8), Watched()
    healthy(fleet, watched)
    for _ in range(20):
        watched.learn(fleet.look(0.3), fleet=["temperature"])
    assert watched.actions == []


def test_too_few_devices_say_nothing() -> None:
    fleet, watched = Fleet(9, devices=8), Watched()
    healthy(fleet, watched)
    for _ in range(20):
        watched.learn(fleet.look(1.0))
    assert watched.actions == []
    assert watched.common.last[0].p_value == 1.0


def test_one_device_that_goes_mad_is_no_common_shift() -> None:
    fleet, watched = Fleet(10), Watched()
    healthy(fleet, watched)
    fleet.offsets[0] += 5.0
    for _ in range(30):
        watched.learn(fleet.look(0.0))
    assert watched.actions == []


def test_it_is_remembered_to_the_bit() -> None:
    fleet, watched = Fleet(11), Watched()
    healthy(fleet, watched)
    for _ in range(10):
        watched.learn(fleet.look(0.2))
    again = c.from_bytes(c.to_bytes(watched.common))
    assert c.to_bytes(again) == c.to_bytes(watched.common)
    look = fleet.look(0.2)
    one = c.learn(again, watched.layout, look, {}, DRIFT, fleet=(), recovery=3)
    other = c.learn(watched.common, watched.layout, look, {}, DRIFT, fleet=(), recovery=3)
    assert c.to_bytes(one[0]) == c.to_bytes(other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("data", [b"", b"\x00", b"nonsense", b"\x81\xa1a\x01"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DriftError) as refused:
        c.from_bytes(data)
    assert refused.value.code == "drift.unknown"


def test_facts_say_what_is_learnt_and_then_what_is_seen() -> None:
    fleet, watched = Fleet(12), Watched()
    assert "once 10 of them have a history" in c.facts(watched.common, DRIFT)
    healthy(fleet, watched, 5)
    assert "40 devices were compared with their own past 5 times; 60 looks are learnt" in c.facts(watched.common, DRIFT)
    healthy(fleet, watched, 60)
    assert "the most telling common shift is in temperature" in c.facts(watched.common, DRIFT)


def pending(**counts: int) -> dict[str, int]:
    """Devices by how many windows they have to offer: `none`, `one`, `two`, `four`."""
    sizes = {"none": 0, "one": 1, "two": 2, "four": 4}
    return {f"{word}-{i}": sizes[word] for word, n in counts.items() for i in range(n)}


@pytest.mark.parametrize(
    ("waiting", "looks"),
    [
        (pending(one=9), 0),  # too few devices
        (pending(one=10), 1),
        (pending(one=79, none=21), 1),  # nobody knows those with nothing: they were in no look yet
        (pending(two=80, one=20), 2),
        (pending(two=79, one=21), 1),
        (pending(four=100), 4),
    ],
)
def test_a_look_is_taken_for_each_window_that_four_in_five_have(waiting: Mapping[str, int], looks: int) -> None:
    assert looks_due(waiting, ()) == looks


@pytest.mark.parametrize(
    ("waiting", "looks"),
    [
        (pending(one=79, none=21), 0),  # some are to come
        (pending(one=60, two=19, none=21), 0),
        (pending(one=58, two=21, none=21), 1),  # as many are ahead as are behind: those stay away
        (pending(one=10, four=10, none=80), 1),  # a site is away
        (pending(one=11, four=9, none=80), 0),
    ],
)
def test_a_look_waits_for_those_that_were_there_before_and_not_for_ever(waiting: Mapping[str, int], looks: int) -> None:
    assert looks_due(waiting, waiting) == looks


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 60).map(str), st.integers(0, 200), max_size=60), st.data())
def test_windows_that_nobody_has_are_never_looked_at(waiting: dict[str, int], data: Any) -> None:
    took_part = data.draw(st.sets(st.integers(0, 60).map(str)))
    looks = looks_due(waiting, took_part)
    assert 0 <= looks <= max(waiting.values(), default=0)
    assert looks == 0 or sum(n >= 1 for n in waiting.values()) >= c.LEAST
