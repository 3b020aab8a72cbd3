"""Rollouts around the decider: a real home, devices that report by rows, and the reconciler's own steps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from securesystemslib.dsse import Envelope as Dsse
from sqlalchemy import select
from tests.control_plane.things import ACTOR, MODEL, add_device, make_champion, register, reports_running, settings_for

from lightship.fleet import director, rollouts
from lightship.fleet.reconciler import Reconciler
from lightship.fleet.rollout import Rules, WaveSpec
from lightship.fleet.rollouts import Selector
from lightship.home import Home
from lightship.registry import release, versions
from lightship.registry.bundles import BundleCache
from lightship.storage import audit
from lightship.storage.audit import now_ms
from lightship.storage.models import (
    AssignmentRow,
    AuditEvent,
    Device,
    DeviceEpoch,
    Exposure,
    Lease,
    ModelVersion,
    RolloutRow,
    UpdateStep,
    WindowRow,
)
from lightship_agent.contract.assignment import check_assignment, parse_assignment
from lightship_agent.contract.codes import FleetError, RegistryError
from lightship_agent.contract.wire import encode

DEVICES = tuple(f"pump-{i}" for i in range(1, 5))
CANARY_AND_REST = (WaveSpec(name="canary", count=1), WaveSpec(name="rest", gate=False))


def start(
    home: Home, version: int, *, waves: tuple[WaveSpec, ...] = CANARY_AND_REST, rules: Rules | None = None,
    selector: Selector | None = None,
) -> str:  # fmt: skip
    rollout, chosen = rollouts.new_id(), selector or Selector(group="pumps")
    with home.database.write() as session:
        plan = rollouts.make_plan(
            session, model=MODEL, version=version, selector=chosen, waves=waves, rules=rules or Rules()
        )
        rollouts.create(session, plan, selector=chosen, rollout=rollout, actor=ACTOR)
    return rollout


def advance(home: Home, rollout: str) -> str:
    """One step, as the reconciler does it; the status after it."""
    with home.database.write() as session:
        row = rollouts.get(session, rollout)
        rollouts.advance(session, row, home.keys, BundleCache(home.artifacts))
        return row.status


def view(home: Home, rollout: str) -> dict[str, Any]:
    with home.database.read() as session:
        seen = rollouts.view(session, rollouts.get(session, rollout))
    json.dumps(seen, allow_nan=False)
    return seen


def told(home: Home, device: str) -> AssignmentRow:
    with home.database.read() as session:
        row = session.get(AssignmentRow, device)
        assert row is not None
        return row


def waves_of(home: Home, rollout: str) -> list[tuple[str, ...]]:
    with home.database.read() as session:
        return list(rollouts.plan_of(rollouts.get(session, rollout)).waves)


def served(home: Home, version: ModelVersion, devices: Iterable[str], *, rows: int, errors: int) -> None:
    """What ingest would have stored of devices that served `version` from now on: one window, fully labelled."""
    with home.database.write() as session:
        for device in devices:
            began = now_ms()
            session.add(
                Exposure(
                    device=device, digest=version.digest, began_at=began, ended_at=None, model=MODEL,
                    version=version.version, requests=rows, failures=0,
                )
            )  # fmt: skip
            session.add(
                WindowRow(
                    device=device, digest=version.digest, w=0, model=MODEL, version=version.version, opened_at=began,
                    closed_at=began + 1_000, rows=rows, counts=encode(()), predictions=[rows // 2, rows - rows // 2],
                    scores=encode(()), labelled=rows, errors=errors,
                )
            )  # fmt: skip


@pytest.fixture
def fleet(home: Home) -> Home:
    """Four devices that run pump@1, the champion; pump@2 is released."""
    one = register(home, 1)
    register(home, 2)
    make_champion(home, 1)
    with home.database.write() as session:
        for device in DEVICES:
            session.add(_device(device))
            director.assign(session, home.keys, device=device, version=one, rollout="first", actor=ACTOR)
    for device in DEVICES:
        reports_running(home, device, one)
    return home


def _device(device: str) -> Device:
    return Device(
        id=device, tenant="default", group="pumps", labels={"hall": device[-1]}, state="active", spki="",
        cert_serial="", cert_not_after=0, enrolled_at=0, running=[], health={}, degraded=[],
    )  # fmt: skip


def version_of(home: Home, number: int) -> ModelVersion:
    with home.database.read() as session:
        return versions.get(session, MODEL, number)


# The story ------------------------------------------------------------------------------------------------------------


def test_a_good_version_goes_through_its_canary_to_everyone_and_becomes_champion(fleet: Home) -> None:
    two = version_of(fleet, 2)
    rollout = start(fleet, 2)
    ((canary,), rest) = waves_of(fleet, rollout)
    assert advance(fleet, rollout) == "running"
    assert (told(fleet, canary).version, told(fleet, rest[0]).version) == (2, 1)
    reports_running(fleet, canary, two)
    advance(fleet, rollout)  # sees that it is done; from the next look on, it is judged
    served(fleet, two, [canary], rows=1_000, errors=50)
    served(fleet, version_of(fleet, 1), rest, rows=1_000, errors=60)
    advance(fleet, rollout)
    assert {told(fleet, d).version for d in rest} == {2}
    assert view(fleet, rollout)["gate"]["outcome"] == "pass"
    for device in rest:
        reports_running(fleet, device, two)
    assert advance(fleet, rollout) == "completed"
    with fleet.database.read() as session:
        assert versions.aliased(session, MODEL, "champion") == 2
        assert audit.verify(session).events > 0


def test_a_worse_canary_is_taken_back_by_a_newer_assignment_of_the_old_version(fleet: Home) -> None:
    one, two = version_of(fleet, 1), version_of(fleet, 2)
    rollout = start(fleet, 2)
    ((canary,), rest) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    forward = told(fleet, canary)
    reports_running(fleet, canary, two)
    advance(fleet, rollout)  # sees that it is done; from the next look on, it is judged
    served(fleet, two, [canary], rows=1_000, errors=400)
    served(fleet, one, rest, rows=1_000, errors=50)
    assert advance(fleet, rollout) == "rolling-back"
    back = told(fleet, canary)
    assert (back.version, back.digest, back.seq) == (1, one.digest, forward.seq + 1)
    assert advance(fleet, rollout) == "rolling-back"  # it still runs it
    assert told(fleet, canary).seq == back.seq  # and is told once
    reports_running(fleet, canary, one)
    assert advance(fleet, rollout) == "rolled-back"
    assert {told(fleet, d).rollout for d in rest} == {"first"}
    with fleet.database.read() as session:
        assert versions.aliased(session, MODEL, "champion") == 1


def test_a_canary_is_compared_with_what_each_of_its_devices_predicted_before(fleet: Home) -> None:
    one, two = version_of(fleet, 1), version_of(fleet, 2)
    with fleet.database.write() as session:
        for device in DEVICES:
            for w in range(2):
                session.add(
                    WindowRow(
                        device=device, digest=one.digest, w=w, model=MODEL, version=1, opened_at=1_000 * w,
                        closed_at=1_000 * w + 999, rows=100, counts=encode(()), predictions=[30, 70], scores=encode(()),
                    )
                )  # fmt: skip
    rollout = start(fleet, 2)
    ((canary,), _) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    reports_running(fleet, canary, two)
    served(fleet, two, [canary], rows=1_000, errors=50)
    with fleet.database.write() as session:
        device = session.get_one(Device, canary)
        device.verdict = {"digest": two.digest, "verdict": {"p_value": 0.001}}
    advance(fleet, rollout)
    with fleet.database.read() as session:
        row = rollouts.get(session, rollout)
        ours, theirs = rollouts.evidence(session, rollouts.plan_of(row), rollouts.state_of(row))
    assert [(c.now, c.before) for c in ours.changes] == [((500, 500), (60, 140))]
    assert theirs.changes == ()  # they have told nothing since
    assert (ours.judged, ours.drifting, theirs.judged) == (1, 1, 0)


def test_without_labels_the_canary_holds(fleet: Home) -> None:
    rollout = start(fleet, 2)
    ((canary,), rest) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    reports_running(fleet, canary, version_of(fleet, 2))
    for _ in range(3):
        assert advance(fleet, rollout) == "running"
    assert str(view(fleet, rollout)["reason"]).startswith("Holding:")
    assert {told(fleet, d).version for d in rest} == {1}


def test_a_device_that_refuses_is_counted_by_its_own_step(fleet: Home) -> None:
    rollout = start(fleet, 2, waves=(WaveSpec(name="all", gate=False),))
    advance(fleet, rollout)
    with fleet.database.write() as session:
        session.add(_step("pump-1", rollout, s=5, state="refused", at=1_000))
    assert advance(fleet, rollout) == "paused"  # one of four is above a fifth
    assert view(fleet, rollout)["devices"]["pump-1"] == "failed"


def _step(device: str, rollout: str, *, s: int, state: str, at: int, epoch: str = "e" * 16) -> UpdateStep:
    return UpdateStep(
        device=device, epoch=epoch, s=s, at=at, rollout=rollout, seq=1, digest="", state=state, code="", detail=""
    )


def test_the_order_of_steps_is_that_of_their_numbers_whatever_the_devices_clock_says(fleet: Home) -> None:
    rollout = start(fleet, 2)
    with fleet.database.write() as session:
        session.add(_step("pump-1", rollout, s=1, state="fetching", at=9_000_000_000))
        session.add(_step("pump-1", rollout, s=2, state="failed", at=1_000))  # the clock was set right in between
        session.add(_step("pump-2", rollout, s=7, state="failed", at=2_000, epoch="a" * 16))
        session.add(_step("pump-2", rollout, s=1, state="committed", at=1_000, epoch="b" * 16))  # a new outbox
        for epoch, updated in (("a" * 16, 1), ("b" * 16, 2)):
            session.add(DeviceEpoch(device="pump-2", epoch=epoch, next_seq=8, lost=0, updated_at=updated))
    with fleet.database.read() as session:
        plan = rollouts.plan_of(rollouts.get(session, rollout))
        known = rollouts.facts(session, rollout, plan)
    assert (known["pump-1"].failed, known["pump-2"].failed) == (True, False)


# Planning and starting ------------------------------------------------------------------------------------------------


def test_what_is_planned_is_what_is_started(fleet: Home) -> None:
    with fleet.database.read() as session:
        planned = rollouts.make_plan(
            session, model=MODEL, version=2, selector=Selector(), waves=CANARY_AND_REST, rules=Rules()
        )
    assert waves_of(fleet, start(fleet, 2)) == list(planned.waves)


def test_canaries_are_well_and_were_seen_lately(home: Home) -> None:
    register(home, 1)
    add_device(home, "lost", seen_ago=3_600)
    add_device(home, "sick", quarantined=True)
    add_device(home, "gone", state="revoked")
    add_device(home, "elsewhere", group="valves")
    for i in range(3):
        add_device(home, f"well-{i}")
    first, last = waves_of(home, start(home, 1))
    assert len(first) == 1
    assert first[0].startswith("well")
    assert {"lost", "sick"} < set(last)
    assert {"gone", "elsewhere"}.isdisjoint({*first, *last})


def test_where_all_well_devices_are_canaries_the_others_are_the_rest(home: Home) -> None:
    register(home, 1)
    add_device(home, "well")
    add_device(home, "lost", seen_ago=3_600)
    assert waves_of(home, start(home, 1)) == [("well",), ("lost",)]


def test_where_no_device_is_well_they_are_dealt_all_the_same(home: Home) -> None:
    register(home, 1)
    add_device(home, "lost-1", seen_ago=3_600)
    add_device(home, "lost-2", seen_ago=3_600)
    assert [len(w) for w in waves_of(home, start(home, 1))] == [1, 1]


def test_labels_select_too(fleet: Home) -> None:
    assert waves_of(fleet, start(fleet, 2, selector=Selector(labels={"hall": "3"}))) == [("pump-3",)]


@pytest.mark.parametrize("selector", [Selector(group="valves"), Selector(labels={"hall": "9"})])
def test_a_selector_that_matches_nobody_starts_nothing(fleet: Home, selector: Selector) -> None:
    with pytest.raises(FleetError, match="no device") as e:
        start(fleet, 2, selector=selector)
    assert e.value.code == "fleet.rollout-spec"
    with fleet.database.read() as session:
        assert session.scalars(select(RolloutRow)).all() == []


def test_what_is_not_released_is_not_rolled_out(fleet: Home) -> None:
    register(fleet, 3, released=False)
    with pytest.raises(RegistryError, match="lightship release pump@3"):
        start(fleet, 3)


def test_a_second_rollout_on_the_same_devices_has_to_wait(fleet: Home) -> None:
    first = start(fleet, 2)
    with pytest.raises(FleetError, match=first) as e:
        start(fleet, 1, selector=Selector(labels={"hall": "1"}))
    assert e.value.code == "fleet.group-busy"
    with fleet.database.write() as session:
        rollouts.intervene(session, first, "abort", actor=ACTOR, reason="", revert=False)
    start(fleet, 1, selector=Selector(labels={"hall": "1"}))


# Operators ------------------------------------------------------------------------------------------------------------


def test_an_abort_by_hand_is_carried_out_by_the_reconciler(fleet: Home) -> None:
    rollout = start(fleet, 2)
    ((canary,), _) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    before = told(fleet, canary).seq
    with fleet.database.write() as session:
        rollouts.intervene(session, rollout, "abort", actor="user:ann", reason="I saw smoke.")
    assert told(fleet, canary).seq == before  # operators write intentions only
    assert advance(fleet, rollout) == "rolled-back"  # the canary never came to run it
    assert (told(fleet, canary).version, told(fleet, canary).seq) == (1, before + 1)
    with fleet.database.read() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.verb == "rollout.abort")).one()
    assert (event.actor, event.subject, event.detail) == ("user:ann", rollout, {"reason": "I saw smoke."})


def test_an_intervention_that_is_not_possible_changes_nothing(fleet: Home) -> None:
    rollout = start(fleet, 2)
    with pytest.raises(FleetError), fleet.database.write() as session:
        rollouts.intervene(session, rollout, "resume", actor=ACTOR, reason="")
    with pytest.raises(FleetError, match="lightship rollout status"), fleet.database.write() as session:
        rollouts.intervene(session, "nosuch", "pause", actor=ACTOR, reason="")
    assert view(fleet, rollout)["status"] == "running"
    with fleet.database.read() as session:
        verbs = session.scalars(select(AuditEvent.verb).where(AuditEvent.subject == rollout)).all()
    assert list(verbs) == ["rollout.start"]


# What is no longer there ----------------------------------------------------------------------------------------------


def test_with_the_old_version_revoked_a_worse_canary_ends_instead_of_erring_for_ever(fleet: Home) -> None:
    one, two = version_of(fleet, 1), version_of(fleet, 2)
    rollout = start(fleet, 2)
    ((canary,), rest) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    reports_running(fleet, canary, two)
    advance(fleet, rollout)  # sees that it is done; from the next look on, it is judged
    served(fleet, two, [canary], rows=1_000, errors=400)
    served(fleet, one, rest, rows=1_000, errors=50)
    release.revoke(fleet, "pump@1", actor=ACTOR, reason="found to be worse still")
    assert advance(fleet, rollout) == "aborted"
    assert told(fleet, canary).version == 2


def test_a_device_that_joins_late_gets_the_champion_of_its_group_and_only_once(fleet: Home) -> None:
    finish(fleet, 2)
    add_device(fleet, "pump-9")
    add_device(fleet, "valve-1", group="valves")
    with fleet.database.write() as session:
        assert rollouts.default_assignments(session, fleet.keys) == ("pump-9",)
    with fleet.database.write() as session:
        assert rollouts.default_assignments(session, fleet.keys) == ()
        assert session.get(AssignmentRow, "valve-1") is None
    assert told(fleet, "pump-9").version == 2


def finish(home: Home, version: int) -> None:
    rollout = start(home, version, waves=(WaveSpec(name="all", gate=False),))
    advance(home, rollout)
    for device in DEVICES:
        reports_running(home, device, version_of(home, version))
    assert advance(home, rollout) == "completed"


def test_after_a_champion_was_revoked_newcomers_get_the_one_before_it(fleet: Home) -> None:
    finish(fleet, 2)
    release.revoke(fleet, "pump@2", actor=ACTOR, reason="it lies")
    add_device(fleet, "pump-9")
    with fleet.database.write() as session:
        assert rollouts.default_assignments(session, fleet.keys) == ("pump-9",)
    assert told(fleet, "pump-9").version == 1


def test_with_every_champion_revoked_newcomers_get_nothing_and_stop_nobody(fleet: Home) -> None:
    finish(fleet, 2)
    release.revoke(fleet, "pump@1", actor=ACTOR, reason="it lied, too")
    release.revoke(fleet, "pump@2", actor=ACTOR, reason="it lies")
    add_device(fleet, "pump-9")
    with fleet.database.write() as session:
        assert rollouts.default_assignments(session, fleet.keys) == ()
        assert versions.aliases(session, "pump") == {}


def test_a_rollout_of_a_version_that_is_revoked_is_taken_back_by_itself(fleet: Home) -> None:
    rollout = start(fleet, 2)
    ((canary,), rest) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    reports_running(fleet, canary, version_of(fleet, 2))
    release.revoke(fleet, "pump@2", actor=ACTOR, reason="it lies")

    assert advance(fleet, rollout) == "rolling-back"

    assert told(fleet, canary).version == 1
    assert all(told(fleet, device).version == 1 for device in rest)
    reports_running(fleet, canary, version_of(fleet, 1))
    assert advance(fleet, rollout) == "rolled-back"


def test_a_paused_rollout_of_a_version_that_is_revoked_ends_where_there_is_no_way_back(fleet: Home) -> None:
    rollout = start(fleet, 2)
    ((canary,), _) = waves_of(fleet, rollout)
    advance(fleet, rollout)
    with fleet.database.write() as session:
        assert rollouts.pause_version(session, "pump", 2, actor=ACTOR, reason="it may lie") == (rollout,)
        assert rollouts.pause_version(session, "pump", 2, actor=ACTOR, reason="it may lie") == ()
    release.revoke(fleet, "pump@1", actor=ACTOR, reason="it lied, too")
    release.revoke(fleet, "pump@2", actor=ACTOR, reason="it lies")
    assert advance(fleet, rollout) == "aborted"
    assert told(fleet, canary).version == 2


# Assignments ----------------------------------------------------------------------------------------------------------


def test_an_assignment_is_signed_for_one_device_with_a_seq_that_only_rises(fleet: Home) -> None:
    for expected in (2, 3):
        with fleet.database.write() as session:
            seq = director.assign(
                session, fleet.keys, device="pump-1", version=version_of(fleet, 1), rollout="r", actor=ACTOR
            )
        assert seq == expected
    envelope = Dsse.from_dict(json.loads(told(fleet, "pump-1").envelope))
    assignment = parse_assignment(envelope.payload)
    check_assignment(assignment, device="pump-1", floor=3, now=time.time())
    assert (assignment.path, assignment.sha256) == ("bundles/pump/1.tar", version_of(fleet, 1).digest)
    with pytest.raises(Exception, match="reached"):
        check_assignment(assignment, device="pump-2", floor=0, now=time.time())


def test_an_assignment_past_half_of_its_life_is_signed_anew(fleet: Home) -> None:
    two_months = 60 * 86_400_000
    with fleet.database.write() as session:
        old = session.get(AssignmentRow, "pump-1")
        assert old is not None
        seq, old.expires_at = old.seq, old.expires_at - two_months
    with fleet.database.write() as session:
        assert director.renew(session, fleet.keys, actor=ACTOR) == ("pump-1",)
        assert director.renew(session, fleet.keys, actor=ACTOR) == ()
    fresh = told(fleet, "pump-1")
    assert (fresh.seq, fresh.version, fresh.rollout) == (seq + 1, 1, "first")
    assert fresh.expires_at > now_ms() + two_months


def test_nothing_is_signed_anew_for_a_revoked_device_or_of_a_revoked_version(fleet: Home) -> None:
    with fleet.database.write() as session:
        for row in session.scalars(select(AssignmentRow)):
            row.expires_at = 1
        for device in session.scalars(select(Device).where(Device.id != "pump-1")):
            device.state = "revoked"
    release.revoke(fleet, "pump@1", actor=ACTOR, reason="it lies")
    with fleet.database.write() as session:
        assert director.renew(session, fleet.keys, actor=ACTOR) == ()


# The reconciler -------------------------------------------------------------------------------------------------------


def reconciler(home: Home, poked: list[tuple[str, ...]]) -> Reconciler:
    return Reconciler(home, settings_for(home.path), poked.append)


def test_a_tick_pokes_whom_it_assigned(fleet: Home) -> None:
    poked: list[tuple[str, ...]] = []
    rollout = start(fleet, 2)
    ((canary,), _) = waves_of(fleet, rollout)
    assert reconciler(fleet, poked).tick()
    assert (canary,) in poked


def test_of_two_replicas_one_works_and_the_other_takes_over(fleet: Home) -> None:
    one, two = reconciler(fleet, []), reconciler(fleet, [])
    assert (one.tick(), two.tick(), one.tick()) == (True, False, True)
    one.start()
    one.stop()
    assert (two.tick(), one.tick()) == (True, False)


def test_a_replica_that_was_overtaken_stops_in_the_middle_of_its_tick(
    fleet: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = reconciler(fleet, []), reconciler(fleet, [])
    worked: list[str] = []

    def slow() -> None:
        worked.append("watch")
        with fleet.database.write() as session:  # as if this had taken longer than the lease
            session.get_one(Lease, "reconciler").expires_at = 0
        assert two.tick()

    monkeypatch.setattr(one, "_watch_models", slow)
    monkeypatch.setattr(one, "_advance_rollouts", lambda: worked.append("rollouts"))
    assert not one.tick()
    assert worked == ["watch"]


@pytest.mark.parametrize("broken", ["keys/timestamp.pem", "keys/director.pem"])
def test_what_breaks_one_step_does_not_stop_the_others(fleet: Home, broken: str) -> None:
    finish(fleet, 1)
    add_device(fleet, "pump-9")
    (fleet.path / broken).unlink()
    before = fleet.releases.expiries()
    ticking = reconciler(fleet, [])
    assert ticking.tick()
    assert ticking.ticks == 1
    if "director" in broken:
        assert fleet.releases.expiries() == before
    else:
        assert told(fleet, "pump-9").version == 1


def test_one_rollout_that_can_not_go_on_does_not_stop_the_next(fleet: Home) -> None:
    first = start(fleet, 2, selector=Selector(labels={"hall": "1"}))
    second = start(fleet, 2, selector=Selector(labels={"hall": "2"}))
    with fleet.database.write() as session:
        row = rollouts.get(session, first)
        row.plan = {**row.plan, "version": 77}  # as if somebody had edited the database
    assert reconciler(fleet, []).tick()
    assert told(fleet, "pump-2").rollout == second
    assert msgspec.convert(rollouts_state(fleet, first), dict)["wave"] == -1


def rollouts_state(home: Home, rollout: str) -> dict[str, object]:
    with home.database.read() as session:
        return rollouts.get(session, rollout).state


def test_a_rollout_that_waits_for_labels_no_one_can_count_is_refused_and_without_them_it_starts(fleet: Home) -> None:
    with fleet.database.write() as session:
        row = versions.get(session, MODEL, 2)
        row.metrics = {"r2": 0.9, "mae": 1.0}
        with pytest.raises(FleetError, match="--no-labels|numbers") as e:
            rollouts.make_plan(
                session, model=MODEL, version=2, selector=Selector(), waves=CANARY_AND_REST, rules=Rules()
            )
    assert e.value.code == "fleet.rollout-spec"
    start(fleet, 2, rules=Rules(require_labels=False))
