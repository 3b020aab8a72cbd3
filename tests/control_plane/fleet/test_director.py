"""What the director signs when an operator asks a device to try again."""

from __future__ import annotations

import json

import pytest
from securesystemslib.dsse import Envelope
from tests.control_plane.things import ACTOR, add_device, register

from lightship.fleet import director
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import AssignmentRow, AuditEvent
from lightship_agent.contract.assignment import Assignment, parse_assignment
from lightship_agent.contract.codes import FleetError


def signed(home: Home, device: str) -> Assignment:
    with home.database.read() as session:
        row = session.get(AssignmentRow, device)
        assert row is not None
        return parse_assignment(Envelope.from_dict(json.loads(row.envelope)).payload)


def test_a_retry_is_the_same_bundle_under_the_next_seq_and_says_so(home: Home) -> None:
    add_device(home, "pump-1")
    version = register(home)
    with home.database.write() as session:
        director.assign(session, home.keys, device="pump-1", version=version, rollout="ro-1", actor=ACTOR)
    before = signed(home, "pump-1")

    with home.database.write() as session:
        director.retry(session, home.keys, device="pump-1", actor=ACTOR)

    after = signed(home, "pump-1")
    assert (before.retry, after.retry) == (False, True)
    assert (after.seq, after.sha256, after.rollout) == (before.seq + 1, before.sha256, "ro-1")
    with home.database.read() as session:
        events = [e for e in session.query(AuditEvent) if e.verb == "device.assign"]
        assert events[-1].detail["retry"] is True
        assert audit.verify(session)


def test_a_device_that_nothing_is_assigned_to_has_nothing_to_retry(home: Home) -> None:
    add_device(home, "pump-1")

    for device in ("pump-1", "nobody"):
        with pytest.raises(FleetError) as refused, home.database.write() as session:
            director.retry(session, home.keys, device=device, actor=ACTOR)
        assert refused.value.code == "fleet.unknown-device"

    with home.database.read() as session:
        assert session.query(AssignmentRow).count() == 0
