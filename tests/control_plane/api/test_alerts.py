"""Alerts over HTTP: what the command line shows and does, in the name of a token."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from tests.control_plane.access.callers import CLOSED, Caller, application, token
from tests.control_plane.things import add_device, settings_for

from lightship.access.rules import Role
from lightship.alerting import store
from lightship.alerting.evaluate import Evaluator
from lightship.home import Home
from lightship.storage.audit import now_ms
from lightship.storage.models import AlertMute, AuditEvent

HOUR = 3_600_000


@pytest.fixture
def alert(home: Home) -> str:
    """A device is silent, and somebody is told."""
    add_device(home, "press-1", seen_ago=7_200, enrolled_at=1, cert_not_after=now_ms() + 96 * HOUR)
    settings = settings_for(home.path, alert_group_seconds=0)
    Evaluator(home, settings, ["webhook"], 0).look(now_ms())
    with home.database.read() as session:
        return store.newest(session, everything=False)[0].id


def as_role(home: Home, role: Role) -> Caller:
    return Caller(application(home, CLOSED), token(home, role, name=f"a-{role}"))


def events(home: Home) -> list[str]:
    with home.database.read() as session:
        verbs = session.scalars(select(AuditEvent.verb).order_by(AuditEvent.seq))
        return [v for v in verbs if v.startswith("alert.")]


def test_a_viewer_sees_alerts_and_what_was_sent_of_them(home: Home, alert: str) -> None:
    viewer = as_role(home, Role.VIEWER)
    listing = viewer.get("/api/v1/alerts").json()
    assert [(a["id"], a["kind"], a["status"], a["muted"]) for a in listing["alerts"]] == [
        (alert, "silent", "open", False)
    ]
    assert (listing["mutes"], listing["troubles"]) == ([], [])
    seen = viewer.get(f"/api/v1/alerts/{alert[:6]}").json()
    assert [m["subject"] for m in seen["members"]] == ["press-1"]
    assert [(m["channel"], m["event"], m["state"]) for m in seen["messages"]] == [("webhook", "open", "queued")]
    assert viewer.get("/api/v1/alerts/ffffff").status_code == 404


def test_an_operator_acknowledges_mutes_and_ends_the_mute(home: Home, alert: str) -> None:
    operator = as_role(home, Role.OPERATOR)
    acknowledged = operator.post(f"/api/v1/alerts/{alert}/acknowledge", {"reason": "On my way."})
    assert acknowledged.json() == {"id": alert, "acknowledged_by": "token:a-operator"}

    made = operator.post("/api/v1/mutes", {"what": "device:press-1", "seconds": 3_600, "reason": "Cleaning."})
    assert made.status_code == 201
    listing = operator.get("/api/v1/alerts").json()
    assert [a["muted"] for a in listing["alerts"]] == [True]
    assert [(m["id"], m["by"]) for m in listing["mutes"]] == [(made.json()["id"], "token:a-operator")]

    where = f"/api/v1/mutes/{made.json()['id']}/end"
    assert operator.post(where, {"reason": "Done."}).status_code == 200
    assert operator.get("/api/v1/alerts").json()["mutes"] == []
    again = operator.post(where, {"reason": "Done."})
    assert (again.status_code, again.json()["code"]) == (409, "alert.state")
    assert events(home) == ["alert.acknowledge", "alert.mute", "alert.unmute"]


@pytest.mark.parametrize("path", ["/api/v1/alerts/{alert}/acknowledge", "/api/v1/mutes", "/api/v1/mutes/0/end"])
def test_a_viewer_holds_nothing_back(home: Home, alert: str, path: str) -> None:
    body = {"what": "silent", "seconds": 60, "reason": "x"}
    assert as_role(home, Role.VIEWER).post(path.format(alert=alert), body).status_code == 403
    assert Caller(application(home, CLOSED), "").post(path.format(alert=alert), body).status_code == 401
    assert events(home) == []


BAD: list[dict[str, Any]] = [
    {"what": "silent", "seconds": 60},
    {"what": "silent", "seconds": 60, "reason": ""},
    {"what": "silent", "seconds": 60, "reason": "  "},
    {"what": "silent", "seconds": 32 * 86_400, "reason": "x"},
    {"what": "silent", "seconds": 0, "reason": "x"},
    {"what": "", "seconds": 60, "reason": "x"},
    {"what": "colour:blue", "seconds": 60, "reason": "x"},
    {"what": "silent", "seconds": 60, "reason": "x", "for": "ever"},
]


@pytest.mark.parametrize("body", BAD, ids=str)
def test_a_mute_without_end_reason_or_sense_is_refused_and_nothing_is_kept(home: Home, body: dict[str, Any]) -> None:
    assert as_role(home, Role.OPERATOR).post("/api/v1/mutes", body).status_code == 422
    with home.database.read() as session:
        assert session.scalars(select(AlertMute)).all() == []
    assert events(home) == []
