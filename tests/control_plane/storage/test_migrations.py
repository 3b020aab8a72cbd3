"""Migrations: a database from before keeps its rows, and can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text

from lightship.storage import audit
from lightship.storage.database import Database
from lightship.storage.models import Certificate, Device
from lightship_agent.contract.wire import canonical_json, sha256_hex

OLD_DEVICE = """
    insert into devices (id, tenant, "group", labels, state, spki, spki_next, cert_serial, cert_not_after, enrolled_at,
      last_seen, online, boot, running_model, running_version, running_digest, running, phase, update_state,
      update_code, update_detail, assignment_seq, agent, onnxruntime, machine, health, degraded, quarantined,
      drift_level, verdict)
    values (:id, 'default', 'pumps', '{}', :state, 'key', '', :serial, 9, 1, 0, 0, 0, '', 0, '', '[]', '', '', '', '',
      0, '', '', '', '{}', '[]', 0, '', '{}')
"""


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Database]:
    """A database of the first version with two devices."""
    made = Database(f"sqlite:///{tmp_path / 'lightship.db'}")
    command.upgrade(made._alembic(), "0001")
    with made.write() as session:
        for name, state in (("pump-1", "active"), ("pump-2", "revoked")):
            session.execute(text(OLD_DEVICE), {"id": name, "state": state, "serial": f"5e{name[-1]}"})
    yield made
    made.close()


def test_devices_of_the_first_version_are_kept_and_their_certificates_can_be_revoked(old: Database) -> None:
    old.upgrade()
    with old.read() as session:
        device = session.get_one(Device, "pump-1")
        found = {c.serial: (c.device, c.spki, c.reason) for c in session.query(Certificate)}
    assert (device.state, device.group, device.cloned_at, device.clone, device.serial) == ("active", "pumps", 0, {}, "")
    assert found == {"5e1": ("pump-1", "key", ""), "5e2": ("pump-2", "key", "revoked")}


def test_an_audit_log_from_before_acts_had_an_origin_is_whole_and_goes_on(old: Database) -> None:
    previous = audit.GENESIS
    with old.write() as session:
        for seq in (1, 2, 3):
            content = [seq, seq, "user:ann", "x", "y", {"n": seq}, previous]
            digest = sha256_hex(canonical_json(content))
            values = {"s": seq, "d": json.dumps({"n": seq}), "p": previous, "h": digest}
            session.execute(text("insert into audit_events values (:s, :s, 'user:ann', 'x', 'y', :d, :p, :h)"), values)
            previous = digest
    old.upgrade()
    with audit.coming_from("192.0.2.1"), old.write() as session:
        audit.append(session, actor="user:ann", verb="x", subject="y")
    with old.read() as session:
        assert audit.verify(session, previous) == audit.Chain(4, audit.head(session), since=1)


def test_the_second_version_can_be_taken_back(old: Database) -> None:
    old.upgrade()
    command.downgrade(old._alembic(), "0001")
    with old.read() as session:
        assert session.execute(text("select id, state from devices order by id")).all() == [
            ("pump-1", "active"),
            ("pump-2", "revoked"),
        ]
    assert "certificates" not in old.tables()
