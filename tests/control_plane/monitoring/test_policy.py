"""One event gives one alarm, one quarantine, one proposal, whatever is delivered how often."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.monitoring.drift import judge_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.fleet import FleetVerdict, judge_fleet
from lightship.monitoring.policy import (
    BESIDES_WINDOWS,
    FOLLOW_WINDOWS,
    Action,
    CloseAlarm,
    ConfirmAlarm,
    FleetAlarm,
    OpenAlarm,
    PolicySettings,
    PolicyState,
    ProposeRetrain,
    Quarantine,
    ReleaseQuarantine,
    RollBack,
    StreamKey,
    decide,
)
from lightship.monitoring.verdict import Alarm, AlarmKind, Verdict
from lightship_agent.contract.codes import SettingsError
from lightship_agent.contract.profile import WindowCounts

from .streams import Stream

SETTINGS = PolicySettings()
OLD, NEW = "a" * 64, "b" * 64
D1 = StreamKey("d1", OLD)
NO_FLEET = FleetVerdict(kind="none", devices=(), judged=3, shared=(), p_value=1.0, own={}, sentence="")


def verdict(
    window: int, *, alarm: str = "", size: int = 1, confirmed: bool = False, tested: tuple[int, ...] = (1,)
) -> Verdict:
    first = window + 1 - size
    alarms = (
        (Alarm(name=alarm, kind="shift", level_windows=size, first_window=first, confirmed=confirmed),) if alarm else ()
    )
    return Verdict(
        level="critical" if confirmed else "warning" if alarm else "ok",
        window=window,
        rows=200,
        tested=tested,
        alarms=alarms,
        evidence=(),
        quality=(),
        p_value=0.5,
    )


class Desk:
    """Carries the state from one call to the next, and keeps what was asked for."""

    def __init__(self, policy: PolicySettings = SETTINGS) -> None:
        self.state, self.policy, self.clock = PolicyState(), policy, 1_000.0
        self.actions: list[Action] = []

    def see(self, verdicts: dict[StreamKey, Verdict], fleet: FleetVerdict = NO_FLEET) -> list[type]:
        self.clock += 1
        self.state, actions = decide(self.state, verdicts, fleet, model="wine", now=self.clock, settings=self.policy)
        self.actions += actions
        return [type(a) for a in actions]

    def count(self, kind: type) -> int:
        return sum(isinstance(a, kind) for a in self.actions)


def fleet_of(*devices: str, shared: tuple[str, ...] = ("f1",)) -> FleetVerdict:
    return FleetVerdict(
        kind="fleet", devices=devices, judged=3, shared=shared, p_value=1e-6, own={}, sentence="They drift."
    )


def local(*devices: str) -> FleetVerdict:
    return msgspec.structs.replace(NO_FLEET, kind="local", devices=devices)


# -- one stream ---------------------------------------------------------------------------------------------------


def test_an_event_opens_once_is_confirmed_once_and_closes_after_three_clean_evaluations() -> None:
    desk = Desk()
    assert desk.see({D1: verdict(0)}) == []
    assert desk.see({D1: verdict(1, alarm="f1")}) == [OpenAlarm]
    assert desk.see({D1: verdict(2, alarm="f1", confirmed=True)}, local("d1")) == [ConfirmAlarm, Quarantine]
    assert desk.see({D1: verdict(3, alarm="f1", confirmed=True)}, local("d1")) == []
    assert [desk.see({D1: verdict(w)}) for w in (4, 5)] == [[], []]
    assert desk.see({D1: verdict(6)}) == [CloseAlarm, ReleaseQuarantine]
    assert desk.state.tracks[D1].event is None


def test_an_alarm_in_between_starts_the_recovery_anew() -> None:
    desk = Desk()
    for w, alarm in enumerate(["f1", "", "", "f1", "", ""]):
        desk.see({D1: verdict(w, alarm=alarm)})
    assert (desk.count(OpenAlarm), desk.count(CloseAlarm)) == (1, 0)


def test_the_same_verdict_or_an_older_one_changes_nothing() -> None:
    desk = Desk()
    desk.see({D1: verdict(5, alarm="f1")})
    before = desk.state
    assert desk.see({D1: verdict(5, alarm="f1")}) == []
    assert desk.see({D1: verdict(4, alarm="f2", confirmed=True)}) == []
    assert desk.state == before


def test_only_a_test_that_could_have_seen_it_gives_the_all_clear() -> None:
    desk = Desk()
    desk.see({D1: verdict(31, alarm="f1", size=32, tested=(1, 2, 4, 8, 16, 32))})
    for w in range(32, 63):
        desk.see({D1: verdict(w, tested=(1, 2))})
    assert desk.count(CloseAlarm) == 0
    for w in (63, 95, 127):
        desk.see({D1: verdict(w, tested=(1, 32))})
    assert desk.count(CloseAlarm) == 1


def test_a_long_block_that_still_holds_a_closed_event_does_not_open_another() -> None:
    desk = Desk()
    desk.see({D1: verdict(39, alarm="f1")})
    for w in (40, 41, 42):
        desk.see({D1: verdict(w)})
    assert desk.count(CloseAlarm) == 1
    assert desk.see({D1: verdict(63, alarm="f1", size=32)}) == []
    assert desk.see({D1: verdict(64, alarm="f1")}) == [OpenAlarm]


def test_another_model_on_the_device_starts_afresh() -> None:
    desk = Desk()
    desk.see({D1: verdict(8, alarm="f1")})
    desk.see({D1: verdict(9, alarm="f1", confirmed=True)}, local("d1"))
    assert desk.see({StreamKey("d1", NEW): verdict(0)}) == [CloseAlarm, ReleaseQuarantine]
    assert set(desk.state.tracks) == {StreamKey("d1", NEW)}
    assert desk.state.quarantined == {}
    assert desk.see({StreamKey("d1", NEW): verdict(1, alarm="f1")}) == [OpenAlarm]


def test_a_silent_device_keeps_its_event() -> None:
    desk = Desk()
    desk.see({D1: verdict(0, alarm="f1")})
    desk.see({StreamKey("d2", OLD): verdict(0)})
    assert desk.state.tracks[D1].event is not None


def test_quarantine_can_be_switched_off() -> None:
    desk = Desk(PolicySettings(quarantine=False))
    desk.see({D1: verdict(0, alarm="f1", confirmed=True)}, local("d1"))
    assert desk.count(Quarantine) == 0


@settings(deadline=None)
@given(alarms=st.lists(st.sampled_from(["", "warning", "critical"]), max_size=60))
def test_alarms_open_and_close_in_turns_for_any_history(alarms: list[str]) -> None:
    desk = Desk()
    for w, level in enumerate(alarms):
        fleet = local("d1") if level else NO_FLEET
        desk.see({D1: verdict(w, alarm="f1" if level else "", confirmed=level == "critical")}, fleet)
    turns = [type(a) for a in desk.actions if isinstance(a, OpenAlarm | CloseAlarm)]
    assert turns == [OpenAlarm, CloseAlarm] * (len(turns) // 2) + [OpenAlarm] * (len(turns) % 2)
    held = [type(a) for a in desk.actions if isinstance(a, Quarantine | ReleaseQuarantine)]
    assert held == [Quarantine, ReleaseQuarantine] * (len(held) // 2) + [Quarantine] * (len(held) % 2)
    assert desk.count(Quarantine) <= desk.count(OpenAlarm)


# -- the fleet ----------------------------------------------------------------------------------------------------


def everyone(window: int, *, alarm: str = "f1", confirmed: bool = False) -> dict[StreamKey, Verdict]:
    return {StreamKey(f"d{i}", OLD): verdict(window, alarm=alarm, confirmed=confirmed) for i in (1, 2, 3)}


def test_a_fleet_that_keeps_drifting_is_alarmed_and_proposed_once() -> None:
    desk = Desk()
    fleet = fleet_of("d1", "d2", "d3")
    assert FleetAlarm not in desk.see(everyone(0), fleet)
    assert desk.see(everyone(0), fleet) == []  # no device has been judged again
    second = desk.see(everyone(1, confirmed=True), fleet)
    assert second.count(FleetAlarm) == second.count(ProposeRetrain) == 1
    for w in range(2, 10):
        desk.see(everyone(w, confirmed=True), fleet)
    assert (desk.count(FleetAlarm), desk.count(ProposeRetrain), desk.count(Quarantine)) == (1, 1, 0)
    proposal = next(a for a in desk.actions if isinstance(a, ProposeRetrain))
    assert (proposal.model, proposal.devices, proposal.excluded) == ("wine", ("d1", "d2", "d3"), ())


def test_drift_that_comes_back_after_recovery_is_another_event() -> None:
    desk = Desk()
    fleet = fleet_of("d1", "d2", "d3")
    for start in (0, 100):
        desk.see(everyone(start), fleet)
        desk.see(everyone(start + 1, confirmed=True), fleet)
        for w in range(2, 6):
            desk.see(everyone(start + w, alarm=""))
        assert desk.state.fleet is None
    assert desk.count(ProposeRetrain) == 2


def test_a_sick_device_is_not_learned_from_when_the_fleet_drifts_later() -> None:
    desk = Desk()
    sick = StreamKey("d3", OLD)
    for w in range(5):
        desk.see({**everyone(w, alarm=""), sick: verdict(w, alarm="f7", confirmed=w > 0)}, local("d3"))
    desk.see(everyone(5), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(6, confirmed=True), fleet_of("d1", "d2", "d3"))
    proposal = next(a for a in desk.actions if isinstance(a, ProposeRetrain))
    assert (proposal.devices, proposal.excluded) == (("d1", "d2"), ("d3",))


def test_a_member_that_is_sick_besides_is_quarantined_once_the_others_could_have_shown_it_too() -> None:
    desk = Desk()
    besides = msgspec.structs.replace(fleet_of("d1", "d2", "d3"), own={"d2": ("f9",)})
    desk.see(everyone(0), fleet_of("d1", "d2", "d3"))
    for w in range(1, BESIDES_WINDOWS + 1):
        assert Quarantine not in desk.see(everyone(w, confirmed=True), besides)
    assert Quarantine in desk.see(everyone(BESIDES_WINDOWS + 1, confirmed=True), besides)
    quarantine = next(a for a in desk.actions if isinstance(a, Quarantine))
    assert (quarantine.key.device, quarantine.names) == ("d2", ("f9",))


def test_a_member_that_shows_something_besides_once_long_after_the_drift_began_is_not_sick() -> None:
    desk = Desk()
    shared = fleet_of("d1", "d2", "d3")
    lucky = msgspec.structs.replace(shared, own={"d2": ("f9",)})
    for w in range(40):
        desk.see(everyone(w, confirmed=w > 0), lucky if w == 20 else shared)
    assert desk.count(Quarantine) == 0
    for w in (40, 41):
        desk.see(everyone(w, confirmed=True), lucky)
    quarantine = next(a for a in desk.actions if isinstance(a, Quarantine))
    assert (quarantine.key.device, quarantine.names) == ("d2", ("f9",))


def test_a_faint_shift_that_shows_in_one_member_first_leaves_none_out_of_the_proposal() -> None:
    desk = Desk()
    first = msgspec.structs.replace(fleet_of("d1", "d2", "d3"), own={"d2": ("f9",)})
    desk.see(everyone(0), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(1, confirmed=True), first)
    desk.see(everyone(2, confirmed=True), fleet_of("d1", "d2", "d3", shared=("f1", "f9")))
    proposal = next(a for a in desk.actions if isinstance(a, ProposeRetrain))
    assert (proposal.devices, proposal.excluded) == (("d1", "d2", "d3"), ())
    assert desk.count(Quarantine) == 0


def test_the_first_device_of_a_fleet_drift_is_let_go_when_the_others_follow() -> None:
    desk = Desk()
    first = StreamKey("d1", OLD)
    desk.see({**everyone(0, alarm=""), first: verdict(0, alarm="f1")}, local("d1"))
    for w in range(1, FOLLOW_WINDOWS + 1):  # it reports less often than the others
        desk.see({**everyone(w, alarm=""), first: verdict(1, alarm="f1", confirmed=True)}, local("d1"))
    assert set(desk.state.quarantined) == {first}
    later = {**everyone(9), first: verdict(2, alarm="f1", confirmed=True)}
    assert ReleaseQuarantine in desk.see(later, fleet_of("d1", "d2", "d3"))
    assert desk.state.quarantined == {}


def test_a_device_that_is_ahead_of_the_others_is_not_called_sick_before_they_had_their_say() -> None:
    desk = Desk()
    ahead = StreamKey("d1", OLD)
    healthy = everyone(0, alarm="")
    desk.see(healthy)
    for w in (1, 2, 3):  # the others have sent nothing since
        desk.see({**healthy, ahead: verdict(w, alarm="f1", confirmed=w > 1)}, local("d1"))
    assert desk.count(Quarantine) == 0
    desk.see(everyone(4), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(5, confirmed=True), fleet_of("d1", "d2", "d3"))
    proposal = next(a for a in desk.actions if isinstance(a, ProposeRetrain))
    assert (proposal.devices, proposal.excluded) == (("d1", "d2", "d3"), ())


def test_a_device_that_is_ahead_and_sick_is_set_aside_when_the_others_had_their_windows_and_did_not_follow() -> None:
    desk = Desk()
    sick = StreamKey("d1", OLD)
    healthy = everyone(0, alarm="")
    desk.see(healthy)
    for w in (1, 2, 3):
        desk.see({**healthy, sick: verdict(w, alarm="f1", confirmed=w > 1)}, local("d1"))
    still = verdict(3, alarm="f1", confirmed=True)
    seen = [desk.see({**everyone(w, alarm=""), sick: still}, local("d1")) for w in range(1, FOLLOW_WINDOWS + 1)]
    assert seen == [[]] * (FOLLOW_WINDOWS - 1) + [[Quarantine]]


def test_a_device_is_set_aside_for_what_is_sure_and_let_go_when_the_fleet_shows_that() -> None:
    desk = Desk()
    first = StreamKey("d1", OLD)
    sure = verdict(1, alarm="f1", confirmed=True)
    faint = Alarm(name="f4", kind="shift", level_windows=1, first_window=1, confirmed=False)
    both = msgspec.structs.replace(sure, alarms=(*sure.alarms, faint))
    desk.see({**everyone(0, alarm=""), first: verdict(0, alarm="f1")}, local("d1"))
    for w in range(1, FOLLOW_WINDOWS + 1):
        desk.see({**everyone(w, alarm=""), first: both}, local("d1"))
    assert desk.state.quarantined == {first: ("f1",)}
    later = {**everyone(9), first: verdict(2, alarm="f1", confirmed=True)}
    desk.see(later, fleet_of("d1", "d2", "d3"))
    assert desk.state.quarantined == {}


def test_a_device_that_drifts_with_its_segment_is_set_aside_as_one_of_it() -> None:
    desk = Desk()
    north = msgspec.structs.replace(local("d1", "d2"), within={"d1": "site=north", "d2": "site=north"})
    for w in range(FOLLOW_WINDOWS + 1):
        two = {StreamKey(d, OLD): verdict(w, alarm="f1", confirmed=w > 0) for d in ("d1", "d2")}
        desk.see({**everyone(w, alarm=""), **two}, north)
    reasons = [a.reason for a in desk.actions if isinstance(a, Quarantine)]
    assert reasons == [f"{d} drifts with others of site=north in f1." for d in ("d1", "d2")]


def test_members_are_not_quarantined_one_by_one_as_the_fleet_recovers() -> None:
    desk = Desk()
    desk.see(everyone(0), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(1, confirmed=True), fleet_of("d1", "d2", "d3"))
    laggards = {**everyone(2, alarm=""), D1: verdict(2, alarm="f1", confirmed=True)}
    desk.see(laggards, local("d1"))
    assert desk.count(Quarantine) == 0


def test_proposals_can_be_switched_off_and_the_alarm_stays() -> None:
    desk = Desk(PolicySettings(propose=False))
    desk.see(everyone(0), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(1, confirmed=True), fleet_of("d1", "d2", "d3"))
    assert (desk.count(FleetAlarm), desk.count(ProposeRetrain)) == (1, 0)


def test_the_state_survives_storage() -> None:
    desk = Desk()
    desk.see(everyone(0), fleet_of("d1", "d2", "d3"))
    desk.see(everyone(1, confirmed=True), local("d1"))
    stored = msgspec.msgpack.encode(desk.state)
    assert msgspec.msgpack.decode(stored, type=PolicyState) == desk.state


def test_a_recovery_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError):
        PolicySettings(recovery=0)


# -- the whole chain ----------------------------------------------------------------------------------------------


def test_rows_in_actions_out_a_stuck_sensor_and_then_a_changed_world() -> None:
    streams = {StreamKey(f"d{i}", OLD): Stream(40 + i) for i in range(5)}
    history: dict[StreamKey, list[WindowCounts]] = {key: [] for key in streams}
    desk, drift = Desk(), DriftSettings()
    for w in range(40):
        verdicts = {}
        for key, stream in streams.items():
            rows = stream.draw()
            if w >= 10 and key.device == "d4":
                rows[:, 3] = 0.25  # the sensor sticks
            if w >= 25:
                rows[:, 2] += 1.0  # the world changes
            history[key].append(stream.count(rows))
            verdicts[key] = judge_stream(stream.profile, history[key], 0, drift)
        fleet = judge_fleet({k.device: v for k, v in verdicts.items()}, drift)
        seen = desk.see(verdicts, fleet)
        if w < 10:
            assert seen == []
        assert (fleet.kind == "fleet") == (w >= 25)
    quarantined = [a for a in desk.actions if isinstance(a, Quarantine)]
    proposals = [a for a in desk.actions if isinstance(a, ProposeRetrain)]
    assert [(a.key.device, a.names) for a in quarantined] == [("d4", ("f3",))]
    assert desk.count(ReleaseQuarantine) == 0
    assert desk.count(FleetAlarm) == 1
    assert [(a.devices, a.excluded) for a in proposals] == [(("d0", "d1", "d2", "d3"), ("d4",))]


def test_devices_that_report_at_their_own_pace_are_not_called_sick_when_the_world_changes() -> None:
    paces = np.random.default_rng(11).uniform(0.2, 1.0, 5)
    reports = np.random.default_rng(12).random((60, 5)) < paces
    streams = [Stream(1_100 + i) for i in range(5)]
    history: list[list[WindowCounts]] = [[] for _ in streams]
    desk, drift = Desk(), DriftSettings()
    verdicts: dict[StreamKey, Verdict] = {}
    for now, reporting in enumerate(reports):
        for i, stream in enumerate(streams):
            rows = stream.draw()
            if now >= 25:
                rows += np.array([1.2, 0.8, 0.5, 0.3, 0.2, 0.1], np.float32)  # to every sensor, to each in its measure
            if reporting[i]:
                history[i].append(stream.count(rows))
                verdicts[StreamKey(f"d{i}", OLD)] = judge_stream(stream.profile, history[i], 0, drift)
        desk.see(dict(verdicts), judge_fleet({k.device: v for k, v in verdicts.items()}, drift))
    assert [a.excluded for a in desk.actions if isinstance(a, ProposeRetrain)] == [()]
    assert desk.count(Quarantine) == desk.count(ReleaseQuarantine)


# -- taking a version back ----------------------------------------------------------------------------------------


def erring(window: int, kind: AlarmKind = "performance") -> Verdict:
    alarm = Alarm(name="errors", kind=kind, level_windows=1, first_window=window, confirmed=True)
    return msgspec.structs.replace(verdict(window), level="critical", alarms=(alarm,))


def test_a_version_with_which_most_devices_err_is_taken_back_once() -> None:
    desk = Desk()
    fleet = {StreamKey(f"d{i}", NEW): erring(5) if i < 2 else verdict(5) for i in range(4)}
    assert RollBack in desk.see(fleet)
    again = {key: msgspec.structs.replace(v, window=6) for key, v in fleet.items()}
    assert RollBack not in desk.see(again)


@pytest.mark.parametrize("kind", ["shift", "performance", "stuck"])
def test_one_device_alone_and_shifts_of_inputs_take_nothing_back(kind: AlarmKind) -> None:
    alone = {StreamKey(f"d{i}", NEW): erring(5, kind) if not i else verdict(5) for i in range(4)}
    assert RollBack not in Desk().see(alone)
    assert RollBack not in Desk().see({StreamKey(f"d{i}", NEW): erring(5, "shift") for i in range(4)})
