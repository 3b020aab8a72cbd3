"""Devices with a label that drift, unlike the others, are named as what they are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.fleet import FleetVerdict, judge_fleet
from lightship.monitoring.policy import PolicyState
from lightship.monitoring.segments import (
    Lasting,
    SegmentAlarm,
    SegmentVerdict,
    SegmentWell,
    follow,
    judge_company,
    judge_segments,
    with_segments,
)
from lightship.monitoring.verdict import Verdict

from .test_fleet import HEALTHY, SILENT, drifting

BY_SITE = DriftSettings(segments=("site",))
NO_FLEET = FleetVerdict(kind="none", devices=(), judged=12, shared=(), p_value=1.0, own={}, sentence="")


def fleet(north: list[Verdict], south: list[Verdict]) -> tuple[dict[str, Verdict], dict[str, dict[str, str]]]:
    verdicts = {f"n{i}": v for i, v in enumerate(north)} | {f"s{i}": v for i, v in enumerate(south)}
    labels = {d: {"site": "north" if d[0] == "n" else "south", "line": "1"} for d in verdicts}
    return verdicts, labels


def judge(north: list[Verdict], south: list[Verdict], drift: DriftSettings = BY_SITE) -> tuple[SegmentVerdict, ...]:
    return judge_segments(*fleet(north, south), drift)


def test_all_devices_of_a_site_and_no_others_are_named_so() -> None:
    (found,) = judge([drifting("temp")] * 5, [HEALTHY] * 7)
    assert (found.name, found.size, found.others, found.shared) == ("site=north", 5, 7, ("temp",))
    assert found.sentence == "All 5 devices with site=north drift in temp; none of the other 7 does."


def test_most_of_a_site_and_a_few_others_are_counted() -> None:
    (found,) = judge([drifting("temp")] * 5 + [HEALTHY], [HEALTHY] * 9 + [drifting("temp")])
    assert found.sentence == "5 of 6 devices with site=north drift in temp; of the other 10 only 1 do."


def test_what_all_drift_in_is_no_segments() -> None:
    assert judge([drifting("temp")] * 5, [drifting("temp")] * 7) == ()


@pytest.mark.parametrize(
    ("north", "south"),
    [
        ([HEALTHY] * 5, [HEALTHY] * 7),
        ([drifting("temp"), *[HEALTHY] * 5], [HEALTHY] * 7),  # one sick device
        ([drifting(f"f{i}") for i in range(5)], [HEALTHY] * 7),  # five sick ones, each in its own way
        ([drifting("temp")] * 2, [HEALTHY] * 7),  # fewer than three are no segment
        ([drifting("temp")] * 2 + [SILENT] * 5, [HEALTHY] * 7),  # silent ones have no vote
        ([drifting("temp")] * 5, []),  # there are no others
    ],
)
def test_nothing_less_is_a_segment(north: list[Verdict], south: list[Verdict]) -> None:
    assert judge(north, south) == ()


def test_without_labels_that_are_asked_for_nothing_is_judged() -> None:
    assert judge([drifting("temp")] * 5, [HEALTHY] * 7, DriftSettings()) == ()
    assert judge([drifting("temp")] * 5, [HEALTHY] * 7, DriftSettings(segments=("owner",))) == ()


def test_a_label_that_all_share_is_no_segment_and_costs_none_of_the_budget() -> None:
    verdicts, labels = fleet([drifting("temp")] * 4, [HEALTHY] * 8)
    one = judge_segments(verdicts, labels, BY_SITE)
    assert judge_segments(verdicts, labels, DriftSettings(segments=("line", "site"))) == one


@settings(deadline=None, max_examples=60)
@given(drift=st.integers(0, 6), size=st.integers(3, 6), others=st.integers(1, 8), too=st.integers(0, 8))
def test_one_more_drifting_device_elsewhere_never_makes_a_segment(drift: int, size: int, others: int, too: int) -> None:
    drift, too = min(drift, size), min(too, others - 1)
    north = [drifting("temp")] * drift + [HEALTHY] * (size - drift)
    few = [drifting("temp")] * too + [HEALTHY] * (others - too)
    more = [drifting("temp")] * (too + 1) + [HEALTHY] * (others - too - 1)
    named = {s.name for s in judge(north, few)}
    assert ("site=north" in {s.name for s in judge(north, more)}) <= ("site=north" in named)


def test_the_fleets_sentence_names_the_segment_that_is_half_of_it() -> None:
    verdicts, labels = fleet([drifting("temp")] * 6, [HEALTHY] * 6)
    whole = judge_fleet(verdicts, BY_SITE)
    assert whole.kind == "fleet"
    said = with_segments(whole, judge_segments(verdicts, labels, BY_SITE)).sentence
    assert said.endswith("All 6 devices with site=north drift in temp; none of the other 6 does.")
    assert with_segments(NO_FLEET, judge_segments(verdicts, labels, BY_SITE)).sentence == NO_FLEET.sentence


# -- from look to look --------------------------------------------------------------------------------------------


class Looks:
    """Carries the state from look to look."""

    def __init__(self) -> None:
        self.state: dict[str, Lasting] = {}
        self.window = 0

    def see(
        self, found: tuple[SegmentVerdict, ...], fleet: FleetVerdict = NO_FLEET, *, again: bool = False
    ) -> list[type]:
        self.window += not again
        windows = {f"n{i}": self.window for i in range(5)}
        self.state, actions = follow(self.state, found, windows, fleet, 3)
        return [type(a) for a in actions]


def test_an_alarm_opens_at_the_second_look_and_closes_after_three_clean_ones() -> None:
    found = judge([drifting("temp")] * 5, [HEALTHY] * 7)
    looks = Looks()
    assert [looks.see(found) for _ in range(4)] == [[], [SegmentAlarm], [], []]
    assert [looks.see(()) for _ in range(4)] == [[], [], [SegmentWell], []]
    assert looks.state == {}


def test_looking_again_at_the_same_windows_changes_nothing() -> None:
    found = judge([drifting("temp")] * 5, [HEALTHY] * 7)
    looks = Looks()
    looks.see(found)
    before = looks.state
    assert looks.see(found, again=True) == []
    assert looks.see((), again=True) == []
    assert looks.state == before


def test_one_look_alone_is_forgotten() -> None:
    looks = Looks()
    looks.see(judge([drifting("temp")] * 5, [HEALTHY] * 7))
    assert looks.see(()) == []
    assert looks.state == {}


def test_what_the_fleet_alarms_for_the_segment_does_not() -> None:
    verdicts, labels = fleet([drifting("temp")] * 6, [HEALTHY] * 6)
    found, whole = judge_segments(verdicts, labels, BY_SITE), judge_fleet(verdicts, BY_SITE)
    looks = Looks()
    assert [looks.see(found, whole) for _ in range(4)] == [[]] * 4


def test_what_is_remembered_survives_storage() -> None:
    looks = Looks()
    looks.see(judge([drifting("temp")] * 5, [HEALTHY] * 7))
    state = PolicyState(segments=looks.state)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=PolicyState) == state


def faint(name: str) -> Verdict:
    return msgspec.structs.replace(drifting(name), p_value=0.005)


def company(verdicts: list[Verdict], **known: Any) -> tuple[SegmentVerdict, ...]:
    named = {f"d{i}": v for i, v in enumerate(verdicts)}
    return judge_company(named, known.get("parts", ()), known.get("fleet", NO_FLEET), DriftSettings())


def test_a_few_of_many_that_drift_alike_are_a_company_that_nobody_labelled() -> None:
    (found,) = company([drifting("temp")] * 5 + [HEALTHY] * 95)
    assert found.devices == ("d0", "d1", "d2", "d3", "d4")
    assert found.name == "drift in temp"
    assert found.sentence.startswith("5 of 100 devices drift in temp, which is no chance (p = ")
    assert found.sentence.endswith("look for what they share, such as a batch, a firmware, a place.")


@pytest.mark.parametrize(
    "verdicts",
    [
        [drifting("temp")] * 2 + [HEALTHY] * 98,  # two are sick one by one
        [drifting(f"f{i}") for i in range(5)] + [HEALTHY] * 95,  # each in its own way
        [HEALTHY] * 100,
        [faint("temp")] * 5 + [HEALTHY] * 500,  # so many are to be expected
        [],
    ],
)
def test_nothing_less_is_a_company(verdicts: list[Verdict]) -> None:
    assert company(verdicts) == ()


def test_what_a_segment_or_the_fleet_drifts_in_is_theirs() -> None:
    verdicts = [drifting("temp")] * 5 + [HEALTHY] * 95
    (found,) = company(verdicts)
    assert company(verdicts, parts=(msgspec.structs.replace(found, name="site=north"),)) == ()
    assert company(verdicts, fleet=msgspec.structs.replace(NO_FLEET, kind="fleet", shared=("temp",))) == ()
