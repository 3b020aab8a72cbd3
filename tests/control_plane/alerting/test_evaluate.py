"""From the database to notices and messages: what is looked at, and what is stored of it."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from sqlalchemy import select
from tests.control_plane.things import MODEL, add_device, register, settings_for

from lightship.alerting import store, views
from lightship.alerting.decide import Alert
from lightship.alerting.evaluate import Evaluator
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import (
    Alarm,
    AlertMessage,
    AuditEvent,
    DeadLetter,
    Device,
    DeviceEpoch,
    IngestBeat,
    RolloutRow,
)
from lightship_agent.contract.codes import AlertError

HOUR = 3_600_000
CHANNELS = ["webhook", "mail"]


def looking(home: Home, *, since: int = 0, **flags: Any) -> Evaluator:
    """One that opens at once and ends at once."""
    quick = {"alert_group_seconds": 0, "alert_clear_seconds": 0, **flags}
    return Evaluator(home, settings_for(home.path, **quick), CHANNELS, since)


def alerts(home: Home, status: str = "open") -> dict[str, Alert]:
    with home.database.read() as session:
        return {f"{a.kind}:{m.subject}": a for a in store.newest(session, everything=True) if a.status == status
                for m in a.members.values()}  # fmt: skip


def messages(home: Home) -> list[AlertMessage]:
    with home.database.read() as session:
        return list(session.scalars(select(AlertMessage).order_by(AlertMessage.id, AlertMessage.channel)))


def add(home: Home, *rows: Any) -> None:
    with home.database.write() as session:
        session.add_all(rows)


def alarm(device: str, *, kind: str = "local", level: str = "warning", **changes: Any) -> Alarm:
    found = {
        "id": secrets.token_hex(6), "kind": kind, "model": MODEL, "digest": "0" * 64, "device": device, "level": level,
        "sentence": f"{device or 'The fleet'} drifts in speed.", "evidence": {}, "opened_at": 1, **changes,
    }  # fmt: skip
    return Alarm(**found)


def rollout(ident: str, status: str, created_at: int, model: str = MODEL) -> RolloutRow:
    return RolloutRow(
        id=ident, model=model, version=2, status=status, reason="Too many failed.", selector={}, plan={}, state={},
        gate={}, created_by="user:ann", created_at=created_at, updated_at=now_ms(),
    )  # fmt: skip


def test_a_well_fleet_is_no_alert_and_nothing_is_written(home: Home) -> None:
    add_device(home, "press-1", cert_not_after=now_ms() + 96 * HOUR)
    evaluator = looking(home)
    assert evaluator.look(now_ms()) == 0
    assert evaluator.look(now_ms()) == 0
    assert (alerts(home), messages(home)) == ({}, [])


def test_a_device_that_misses_three_reports_is_told_of_once_and_so_is_its_return(home: Home) -> None:
    well = {"cert_not_after": now_ms() + 96 * HOUR}
    add_device(home, "press-1", seen_ago=1_000, **well, enrolled_at=1)
    add_device(home, "press-2", seen_ago=850, **well, enrolled_at=1)
    add_device(home, "press-3", seen_ago=9_999, state="revoked", enrolled_at=1)
    add_device(home, "press-4", **{**well, "last_seen": 0})  # enrolled just now
    evaluator = looking(home)
    told = [evaluator.look(now_ms()) for _ in range(3)]
    (alert,) = alerts(home).values()
    with home.database.write() as session:
        session.get_one(Device, "press-1").last_seen = now_ms()
    told += [evaluator.look(now_ms() + i) for i in range(3)]

    assert told == [1, 0, 0, 0, 1, 0] or told == [1, 0, 0, 1, 0, 0]
    assert [(m.id, m.channel, m.event) for m in messages(home)] == [
        (f"{alert.id}.1", "mail", "open"), (f"{alert.id}.1", "webhook", "open"),
        (f"{alert.id}.2", "mail", "resolve"), (f"{alert.id}.2", "webhook", "resolve"),
    ]  # fmt: skip


def test_a_server_that_was_down_calls_nobody_silent_before_it_has_listened_for_long_enough(home: Home) -> None:
    add_device(home, "press-1", seen_ago=7_200, enrolled_at=1, cert_not_after=now_ms() + 96 * HOUR)
    evaluator = looking(home, since=now_ms())
    assert evaluator.look(now_ms()) == 0
    assert evaluator.look(now_ms() + 1_000_000) == 1


def test_a_restart_repeats_nothing_and_goes_on(home: Home) -> None:
    add_device(home, "press-1", seen_ago=7_200, enrolled_at=1, cert_not_after=now_ms() + 96 * HOUR)
    looking(home).look(now_ms())
    again = looking(home, since=now_ms())
    assert [again.look(now_ms() + i * 1_000) for i in range(3)] == [0, 0, 0]
    assert list(alerts(home)) == ["silent:press-1"]


def test_everything_that_is_wrong_is_found(home: Home) -> None:
    version = register(home, 1)
    later = now_ms() + 96 * HOUR
    add_device(home, "drifts", cert_not_after=later)
    add_device(home, "dirty", cert_not_after=later)
    add_device(home, "ends", cert_not_after=now_ms() + HOUR)
    add_device(home, "sick", cert_not_after=later, degraded=["device.memory"])
    add_device(home, "twice", cert_not_after=later, cloned_at=5)
    evaluator = looking(home)
    evaluator.look(now_ms())  # from here on dropped reports count
    add(
        home,
        alarm("drifts"), alarm("drifts", level="critical"), alarm("", kind="fleet", level="critical"),
        alarm("dirty", kind="data", level="critical", evidence={"kind": "stuck", "feature": "speed"}),
        alarm("drifts", closed_at=5),
        rollout("r1", "paused", 1, "other"), rollout("r2", "rolled-back", 2), rollout("r0", "rolled-back", 1),
        IngestBeat(worker="lightship-ingest-1", at=now_ms() - 200_000),
        IngestBeat(worker="lightship-ingest-0", at=now_ms()),
        DeviceEpoch(device="sick", epoch="e", next_seq=9, lost=4, updated_at=1),
        *(DeadLetter(id=str(i), at=now_ms(), topic="t", code="c", detail="", payload=b"") for i in range(21)),
    )  # fmt: skip
    evaluator.look(now_ms())

    found = {name: a.severity for name, a in alerts(home).items()}
    assert found == {
        "drift:drifts": "critical", f"drift:{version.model}": "critical", "data:dirty": "critical",
        "certificate:ends": "warning", "degraded:sick": "warning", "clone:twice": "critical",
        "rollout:r1": "warning", "rollout:r2": "critical", "lost:sick": "warning", "dead-letters:ingest": "warning",
        "ingest:lightship-ingest-1": "critical",
    }  # fmt: skip


def test_a_timestamp_signer_that_stands_still_is_critical(home: Home) -> None:
    looking(home).look(now_ms() + 6 * 24 * HOUR)
    found = alerts(home)
    assert found["metadata:timestamp"].severity == "critical"
    assert "timestamp" in found["metadata:timestamp"].sentence


def test_a_channel_that_takes_nothing_is_told_of_on_the_others(home: Home) -> None:
    now = now_ms()
    add(
        home,
        AlertMessage(
            channel="webhook", id="x.1", alert="x", number=1, event="open", body=b"{}", state="queued",
            created_at=now - HOUR, due_at=now, code="alert.slow",
        ),
    )  # fmt: skip
    looking(home).look(now)
    assert alerts(home)["channel:webhook"].sentence == (
        "The alert channel webhook has taken nothing for 15 minutes: alert.slow."
    )
    assert "mail" in {m.channel for m in messages(home)}


def test_routes_choose_and_the_end_goes_to_whoever_was_told(home: Home) -> None:
    add_device(home, "press-1", cloned_at=5, cert_not_after=now_ms() + 96 * HOUR)
    looking(home, alert_routes="critical=mail").look(now_ms())
    with home.database.write() as session:
        session.get_one(Device, "press-1").cloned_at = 0
    changed = looking(home, alert_routes="warning=webhook")
    for i in range(2):
        changed.look(now_ms() + i)

    assert [(m.channel, m.event) for m in messages(home)] == [("mail", "open"), ("mail", "resolve")]


def test_an_acknowledgement_and_a_mute_are_audited_and_kept(home: Home) -> None:
    add_device(home, "press-1", cloned_at=5, cert_not_after=now_ms() + 96 * HOUR)
    looking(home).look(now_ms())
    (alert,) = alerts(home).values()
    now = now_ms()
    with home.database.write() as session:
        store.acknowledge(session, alert.id[:6], actor="user:ann", reason="On my way.", now=now)
        store.mute(session, "clone, device:press-*", until=now + HOUR, actor="user:ann", reason="Known.", now=now)
    with home.database.read() as session:
        seen = views.listing(session, now)
        verbs = [e.verb for e in session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc()).limit(2))]

    assert verbs == ["alert.mute", "alert.acknowledge"]
    assert [(a["acknowledged_by"], a["muted"]) for a in seen["alerts"]] == [("user:ann", True)]
    assert [m["what"] for m in seen["mutes"]] == ["clone,device:press-*"]


@pytest.mark.parametrize(
    ("what", "hours", "reason"),
    [("silent", 0, "r"), ("silent", -1, "r"), ("silent", 24 * 32, "r"), ("silent", 1, " "), ("", 1, "r"),
     ("silent,", 1, "r"), ("site:a", 1, "r")],
)  # fmt: skip
def test_a_mute_without_end_reason_or_sense_is_refused_and_nothing_is_kept(
    home: Home, what: str, hours: int, reason: str
) -> None:
    now = now_ms()
    with pytest.raises(AlertError) as e, home.database.write() as session:
        store.mute(session, what, until=now + hours * HOUR, actor="user:ann", reason=reason, now=now)
    assert e.value.code == "alert.mute"
    with home.database.read() as session:
        assert store.mute_rows(session, 0) == []


def test_what_is_long_over_is_forgotten_and_what_waits_is_not(home: Home) -> None:
    add_device(home, "press-1", cloned_at=5, cert_not_after=now_ms() + 9_999 * HOUR, last_seen=now_ms() + 9_999 * HOUR)
    evaluator = looking(home)
    evaluator.look(now_ms())
    with home.database.write() as session:
        session.get_one(Device, "press-1").cloned_at = 0
    for i in range(2):
        evaluator.look(now_ms() + i)
    with home.database.write() as session:
        for message in session.scalars(select(AlertMessage).where(AlertMessage.channel == "mail")):
            message.state = "sent"
        store.prune(session, now_ms() + 31 * 24 * HOUR)

    assert alerts(home, "resolved") == {}
    assert {m.channel for m in messages(home)} == {"webhook"}


def test_an_alert_that_is_over_can_not_be_acknowledged_and_an_unknown_one_is_none(home: Home) -> None:
    for ident in ("nothing", ""):
        with pytest.raises(AlertError) as e, home.database.write() as session:
            store.acknowledge(session, ident, actor="user:ann", reason="", now=now_ms())
        assert e.value.code == "alert.unknown"


def test_ten_thousand_devices_at_once_are_one_alert_in_little_time(home: Home) -> None:
    rows = [
        Device(
            id=f"d{i:05}", tenant="default", group=f"g{i % 7}", labels={}, state="active", spki="", cert_serial="1",
            cert_not_after=now_ms() + 96 * HOUR, enrolled_at=1, last_seen=1, running=[], health={}, degraded=[],
        )
        for i in range(10_000)
    ]  # fmt: skip
    add(home, *rows)
    evaluator = looking(home, alert_group_seconds=10)
    now = now_ms()
    told = [evaluator.look(now + i * 6_000) for i in range(4)]

    assert told == [0, 0, 1, 0]
    with home.database.read() as session:
        (alert,) = store.newest(session, everything=True)
        assert len(session.scalars(select(AlertMessage)).all()) == 2
    assert alert.sentence.startswith(
        "10000 devices are silent (g0 1429, g1 1429, g2 1429, g3 1429, g4 1428, …): d00000, "
    )
    assert alert.sentence.endswith("d00004 and 9995 more.")
