"""A certificate that has run out: the device gets itself a new one, whatever its clock says, or says why not."""

from __future__ import annotations

import hashlib
import ssl
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.agent.link.field import Field

from lightship.fleet import enrolment
from lightship.storage.models import AuditEvent, Device
from lightship_agent.contract.codes import EnrolError, LightshipError, LinkError
from lightship_agent.link import identity, renewal
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.identity import Identity

DAY = 86_400.0


def lapsed(field: Field, name: str = "press-1") -> Identity:
    """An identity whose certificate ended a second ago, over the registered key."""
    found = field.enrolled(name)
    issued = field.home.ca._issue(
        found.key().public_key(), name, [ExtendedKeyUsageOID.CLIENT_AUTH], timedelta(seconds=-1), []
    )
    (found.folder / "cert.pem").write_bytes(issued.chain)
    return found


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def verbs(field: Field) -> list[str]:
    with field.home.database.read() as session:
        return [e.verb for e in session.query(AuditEvent).order_by(AuditEvent.seq) if e.subject == "press-1"]


def test_a_device_whose_certificate_ran_out_gets_itself_a_new_one(field: Field) -> None:
    found = lapsed(field)
    control = ControlPlane(found)
    assert not control.reachable()
    key = found.key()

    renewal.CertificateKeeper(found, control).tick()

    assert control.reachable()
    assert found.certificate().not_valid_after_utc.timestamp() > time.time() + 6 * DAY
    assert found.key().public_key() != key.public_key()
    assert sorted(p.name for p in found.folder.parent.iterdir()) == ["identity"]
    assert verbs(field) == ["device.enrol", "device.recover"]
    control.close()


def test_a_clock_that_is_a_week_behind_learns_from_the_servers_refusal(field: Field) -> None:
    found = lapsed(field)
    control = ControlPlane(found)
    begins = found.certificate().not_valid_before_utc.timestamp()
    keeper = renewal.CertificateKeeper(found, control, wall=lambda: begins + 1)  # it looks quite new

    keeper.tick()
    assert verbs(field) == ["device.enrol"]  # nobody has said anything yet
    with pytest.raises(LinkError):
        control.desired()
    keeper.tick()

    assert verbs(field) == ["device.enrol", "device.recover"]
    assert control.reachable()
    control.close()


def test_a_server_that_hangs_up_for_another_reason_brings_no_new_certificate(field: Field) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    before = files_of(found.folder)
    control.hung_up = True

    renewal.CertificateKeeper(found, control).tick()

    assert field.server.asked("/v1/recover") == [("POST", "/v1/recover/nonce", "")]
    assert (verbs(field), files_of(found.folder)) == (["device.enrol"], before)
    assert control.reachable()
    assert not control.hung_up
    control.close()


def test_a_clock_that_is_a_year_ahead_renews_and_recovers_nothing(field: Field) -> None:
    found = field.enrolled()
    control = ControlPlane(found)
    keeper = renewal.CertificateKeeper(found, control, wall=lambda: time.time() + 365 * DAY)

    keeper.tick()

    assert verbs(field) == ["device.enrol", "device.renew"]
    assert control.reachable()
    control.close()


def test_a_board_that_woke_in_1970_still_checks_whom_it_speaks_to_and_no_dates(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = field.enrolled()
    assert not found.server_context().verify_flags & identity._NO_CHECK_TIME

    monkeypatch.setattr("lightship_agent.link.identity.time.time", lambda: 1_000.0)
    context = found.server_context()

    assert context.verify_flags & identity._NO_CHECK_TIME
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    control = ControlPlane(found)
    assert control.reachable()
    control.close()


def test_a_revoked_device_does_not_recover_and_keeps_asking_ever_more_seldom(field: Field) -> None:
    found = lapsed(field)
    with field.home.database.write() as session:
        enrolment.revoke(session, "press-1", actor="test", reason="stolen")
    before, control, clock = files_of(found.folder), ControlPlane(found), [0.0]
    keeper = renewal.CertificateKeeper(found, control, monotonic=lambda: clock[0])
    asked = []

    for minute in range(360):
        clock[0] = 60.0 * minute
        try:
            keeper.tick()
        except LightshipError as e:
            asked.append((minute, e.code))
    control.close()

    assert {code for _, code in asked} == {"enrol.revoked"}
    assert len(asked) < 20
    assert asked[-1][0] - asked[-2][0] >= 30  # minutes
    assert files_of(found.folder) == before


@pytest.mark.parametrize("path", ["/v1/recover/nonce", "/v1/recover$"])
def test_a_recovery_that_is_cut_or_spoilt_changes_nothing_and_works_the_next_time(field: Field, path: str) -> None:
    found = lapsed(field)
    before, control = files_of(found.folder), ControlPlane(found)

    field.fault(path, times=1, cut_after=5)
    with pytest.raises(LinkError):
        renewal.recover(found)
    field.well_again()
    for body in (b"{}", b'{"nonce": 5, "chain": ""}', b"<html>", b'{"chain": "noise", "nonce": "n"}'):
        field.fault(path, times=1, status=200, body=body)
        with pytest.raises(LightshipError):
            renewal.recover(found)
        field.well_again()
    assert files_of(found.folder) == before

    renewal.recover(found)
    control.reopen()
    assert control.reachable()
    control.close()


def test_a_recovery_whose_answer_got_lost_is_no_dead_end(field: Field) -> None:
    found = lapsed(field)
    field.fault("/v1/recover$", times=1, cut_after=5)

    with pytest.raises(LinkError):
        renewal.recover(found)
    renewal.recover(found)

    control = ControlPlane(found)
    assert control.reachable()
    control.close()


def test_a_key_that_a_renewal_replaced_proves_nothing_any_more(field: Field, tmp_path: Path) -> None:
    found = field.enrolled()
    old = {p.name: p.read_bytes() for p in found.folder.iterdir()}
    control = ControlPlane(found)
    renewal.renew(found, control)
    control.reopen()
    assert control.reachable()
    control.close()
    (tmp_path / "copy" / "identity").mkdir(parents=True)
    for name, data in old.items():
        (tmp_path / "copy" / "identity" / name).write_bytes(data)
    copy = identity.load_identity(tmp_path / "copy")

    with pytest.raises(EnrolError) as refused:
        renewal.recover(copy)

    assert refused.value.code == "enrol.certificate"
    assert {p.name: p.read_bytes() for p in copy.folder.iterdir()} == old


def test_a_device_that_waits_for_approval_says_so_and_is_let_in(field: Field) -> None:
    from lightship_agent.link.enrol import enrol

    with field.home.database.write() as session:
        token = enrolment.create_token(
            session, field.home.ca, group="all", labels={}, device=None, uses=1, ttl_seconds=60, actor="test",
            approval=True,
        )  # fmt: skip
    control = ControlPlane(enrol(field.home.path.parent / "press-1", server=field.url, token=token, device="press-1"))
    with pytest.raises(EnrolError) as waits:
        control.desired()
    assert waits.value.code == "enrol.pending"

    with field.home.database.write() as session:
        enrolment.approve(session, "press-1", actor="test")

    assert control.desired().envelope is None
    with field.home.database.read() as session:
        assert session.get_one(Device, "press-1").state == "active"
    control.close()
