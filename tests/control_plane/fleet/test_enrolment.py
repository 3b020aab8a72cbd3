"""Enrolment: one token, one device, one key; and what happens when answers get lost."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select
from tests.control_plane.things import ACTOR, token_for

from lightship.fleet import enrolment
from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import AuditEvent, Device, JoinToken
from lightship_agent.contract.codes import EnrolError, FleetError, InvalidNameError
from lightship_agent.link.identity import certificate_request, new_key


def csr(device: str) -> str:
    return certificate_request(new_key(), device).decode()


def enrol(home: Home, token: str, device: str, request: str | None = None) -> str:
    """The key that was certified."""
    with home.database.write() as session:
        return enrolment.enrol(
            session, home.ca, token=token, device=device, csr=request or csr(device), tenant="default"
        )[1].spki


def devices(home: Home) -> dict[str, str]:
    with home.database.read() as session:
        return {d.id: d.state for d in session.scalars(select(Device))}


def uses_left(home: Home) -> int:
    with home.database.read() as session:
        return session.scalars(select(JoinToken)).one().uses_left


def revoke(home: Home, device: str) -> None:
    with home.database.write() as session:
        enrolment.revoke(session, device, actor=ACTOR, reason="stolen")


def test_a_token_makes_a_device_of_its_group_with_its_labels(home: Home) -> None:
    enrol(home, token_for(home), "pump-1")
    with home.database.read() as session:
        device = session.get_one(Device, "pump-1")
        assert (device.group, device.labels, device.state, device.tenant) == (
            "pumps",
            {"hall": "2"},
            "active",
            "default",
        )
        events = session.scalars(select(AuditEvent.verb).where(AuditEvent.verb.in_(["token.create", "device.enrol"])))
        assert list(events) == ["token.create", "device.enrol"]
        assert audit.verify(session)


def test_the_secret_of_a_token_is_not_in_the_database(home: Home) -> None:
    token = token_for(home)
    home.close()
    secret = token.split(".")[1].encode()
    assert all(secret not in p.read_bytes() for p in home.path.glob("lightship.db*"))


def test_a_token_is_used_up_by_its_uses(home: Home) -> None:
    token = token_for(home, uses=2)
    enrol(home, token, "pump-1")
    enrol(home, token, "pump-2")
    with pytest.raises(EnrolError, match="used up") as e:
        enrol(home, token, "pump-3")
    assert e.value.code == "enrol.token"
    assert set(devices(home)) == {"pump-1", "pump-2"}


def test_all_that_is_wrong_with_a_token_sounds_the_same_to_a_stranger(home: Home) -> None:
    good, expired, bound = token_for(home), token_for(home, ttl=-1), token_for(home, "pump-7")
    token_id, secret, pin = good.split(".")
    tries = {f"{token_id}.wrong.{pin}", f"{'0' * 12}.{secret}.{pin}", expired, bound}
    said = set()
    for token in tries:
        with pytest.raises(EnrolError) as e:
            enrol(home, token, "pump-1")
        said.add((e.value.code, str(e.value)))
    assert len(said) == 1
    assert devices(home) == {}


@pytest.mark.parametrize("token", ["a.b", "a.b.c", "..", "x" * 5_000])
def test_what_is_no_token_is_refused(home: Home, token: str) -> None:
    with pytest.raises(EnrolError, match="three parts"):
        enrol(home, token, "pump-1")


@pytest.mark.parametrize("request_for", ["pump-2", ""])
def test_a_bad_request_does_not_use_the_token_up(home: Home, request_for: str) -> None:
    token = token_for(home)
    with pytest.raises(EnrolError) as e:
        enrol(home, token, "pump-1", csr(request_for) if request_for else "junk")
    assert e.value.code == "enrol.request"
    assert (uses_left(home), devices(home)) == (1, {})


def test_no_device_can_call_itself_the_control_plane(home: Home) -> None:
    with pytest.raises(EnrolError) as e:
        enrol(home, token_for(home), "_control-plane")
    assert e.value.code == "enrol.request"


def test_the_same_request_again_is_answered_again_because_answers_get_lost(home: Home) -> None:
    token, request = token_for(home), csr("pump-1")
    assert enrol(home, token, "pump-1", request) == enrol(home, token, "pump-1", request)
    assert uses_left(home) == 0


def test_after_ten_minutes_the_same_request_is_somebody_elses(home: Home) -> None:
    token, request = token_for(home), csr("pump-1")
    enrol(home, token, "pump-1", request)
    with home.database.write() as session:
        session.get_one(Device, "pump-1").enrolled_at -= enrolment.RETRY_MS + 1
    with pytest.raises(EnrolError) as e:
        enrol(home, token, "pump-1", request)
    assert e.value.code == "enrol.taken"


def test_an_id_that_is_taken_stays_with_its_key(home: Home) -> None:
    key = enrol(home, token_for(home), "pump-1")
    for token in (token_for(home), token_for(home, "pump-1")):
        with pytest.raises(EnrolError, match="already enrolled") as e:
            enrol(home, token, "pump-1")
        assert e.value.code == "enrol.taken"
    with home.database.read() as session:
        assert session.get_one(Device, "pump-1").spki == key


def test_a_revoked_id_comes_back_only_with_a_token_bound_to_it(home: Home) -> None:
    first = enrol(home, token_for(home), "pump-1")
    revoke(home, "pump-1")
    with pytest.raises(EnrolError, match="--device pump-1") as e:
        enrol(home, token_for(home), "pump-1")
    assert e.value.code == "enrol.taken"
    assert devices(home) == {"pump-1": "revoked"}
    assert enrol(home, token_for(home, "pump-1"), "pump-1") != first
    assert devices(home) == {"pump-1": "active"}


def test_the_key_of_a_revoked_device_is_not_certified_again_by_a_retry(home: Home) -> None:
    token, request = token_for(home), csr("pump-1")
    enrol(home, token, "pump-1", request)
    revoke(home, "pump-1")
    with pytest.raises(EnrolError):
        enrol(home, token, "pump-1", request)
    assert devices(home) == {"pump-1": "revoked"}


def test_eight_devices_at_once_on_a_token_for_three_make_three(home: Home) -> None:
    token, refused = token_for(home, uses=3), []

    def one(device: str) -> None:
        try:
            enrol(home, token, device)
        except EnrolError as e:
            refused.append(e.code)

    threads = [threading.Thread(target=one, args=(f"pump-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(devices(home)), refused, uses_left(home)) == (3, ["enrol.token"] * 5, 0)


def test_a_renewed_key_replaces_the_old_one_when_it_is_first_used_and_not_before(home: Home) -> None:
    old = enrol(home, token_for(home), "pump-1")
    with home.database.write() as session:
        new = enrolment.renew(session, home.ca, device="pump-1", csr=csr("pump-1")).spki
    check(home, old)  # the answer may have got lost
    check(home, new)
    with pytest.raises(EnrolError) as e:
        check(home, old)
    assert e.value.code == "enrol.certificate"


def check(home: Home, spki: str) -> None:
    with home.database.write() as session:
        enrolment.check_key(session, enrolment.active_device(session, "pump-1"), spki)


def test_of_two_renewals_whose_answers_got_lost_the_second_counts(home: Home) -> None:
    old = enrol(home, token_for(home), "pump-1")
    with home.database.write() as session:
        lost = enrolment.renew(session, home.ca, device="pump-1", csr=csr("pump-1")).spki
        kept = enrolment.renew(session, home.ca, device="pump-1", csr=csr("pump-1")).spki
    with pytest.raises(EnrolError):
        check(home, lost)
    check(home, old)
    check(home, kept)


def test_a_revoked_device_gets_no_new_certificate(home: Home) -> None:
    enrol(home, token_for(home), "pump-1")
    revoke(home, "pump-1")
    with home.database.write() as session, pytest.raises(EnrolError) as e:
        enrolment.renew(session, home.ca, device="pump-1", csr=csr("pump-1"))
    assert e.value.code == "enrol.revoked"


def test_an_unknown_device_can_not_be_revoked(home: Home) -> None:
    with pytest.raises(FleetError) as e:
        revoke(home, "nobody")
    assert e.value.code == "fleet.unknown-device"


@pytest.mark.parametrize(("group", "device"), [("Pumps", None), ("", None), ("pumps", "Pump"), ("pumps", "../x")])
def test_a_token_for_a_name_outside_its_alphabet_is_not_made(home: Home, group: str, device: str | None) -> None:
    with pytest.raises(InvalidNameError):
        token_for(home, device, group=group)
    with home.database.read() as session:
        assert session.scalars(select(JoinToken)).all() == []
