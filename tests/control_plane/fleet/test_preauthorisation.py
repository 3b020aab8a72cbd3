"""Devices that are listed before they come: who is on the list comes in once, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.control_plane.things import ACTOR, Served

from lightship.api import views
from lightship.fleet import enrolment, preauthorisation
from lightship.fleet.preauthorisation import Entry
from lightship.home import Home
from lightship.storage.models import Device, JoinToken, Preauthorisation
from lightship_agent.contract.codes import EnrolError, FleetError, InvalidNameError
from lightship_agent.link import enrol as agent
from lightship_agent.link.identity import certificate_request, key_digest, new_key


def expect(home: Home, *entries: Entry) -> None:
    with home.database.write() as session:
        preauthorisation.add(session, list(entries), labels={"line": "b"}, actor=ACTOR)


def group_token(home: Home, uses: int = 100) -> str:
    with home.database.write() as session:
        return enrolment.create_token(
            session, home.ca, group="pumps", labels={"hall": "2"}, device=None, uses=uses, ttl_seconds=600, actor=ACTOR,
            preauthorised=True,
        )  # fmt: skip


def come(home: Home, device: str, *, token: str = "", serial: str = "", key: object = None) -> Device:
    csr = certificate_request(key or new_key(), device).decode()  # type: ignore[arg-type]
    with home.database.write() as session:
        return enrolment.enrol(session, home.ca, token=token, device=device, csr=csr, tenant="default", serial=serial)[
            0
        ]


def refusal(home: Home, device: str, **how: object) -> str:
    """The code with which it is refused; nothing was used up."""
    before = left(home)
    with pytest.raises(EnrolError) as refused:
        come(home, device, **how)  # type: ignore[arg-type]
    assert left(home) == before
    return refused.value.code


def left(home: Home) -> tuple[list[tuple[str, int]], list[int], list[str]]:
    with home.database.read() as session:
        entries = [(e.used_by, e.used_at) for e in session.query(Preauthorisation).order_by(Preauthorisation.id)]
        return entries, [t.uses_left for t in session.query(JoinToken)], [d.id for d in session.query(Device)]


def test_a_group_token_lets_in_who_is_listed_each_once(home: Home) -> None:
    expect(home, Entry(device="pump-1"), Entry(serial="SN-2", group="presses"))
    token = group_token(home)

    one = come(home, "pump-1", token=token)
    two = come(home, "pump-2", token=token, serial="SN-2")

    assert (one.group, one.labels) == ("pumps", {"hall": "2", "line": "b"})
    assert (two.group, two.serial) == ("presses", "SN-2")
    assert refusal(home, "pump-3", token=token, serial="SN-2") == "enrol.not-listed"
    assert refusal(home, "pump-3", token=token) == "enrol.not-listed"
    assert refusal(home, "pump-1", token=token) in {"enrol.taken"}
    with home.database.read() as session:
        assert [r["used_by"] for r in views.preauthorisations(session)] == ["pump-1", "pump-2"]


@pytest.mark.parametrize(
    ("device", "serial"), [("pump-1", ""), ("pump-1", "SN-2"), ("pump-2", "SN-1"), ("pump-1", "sn-1")]
)
def test_all_that_an_entry_names_must_fit(home: Home, device: str, serial: str) -> None:
    expect(home, Entry(device="pump-1", serial="SN-1"))
    assert refusal(home, device, token=group_token(home), serial=serial) == "enrol.not-listed"


def test_a_listed_key_needs_no_token_and_another_key_gets_nothing(home: Home) -> None:
    key = new_key()
    expect(home, Entry(device="pump-1", key=key_digest(key)), Entry(device="pump-2"))

    assert refusal(home, "pump-1") == "enrol.token"  # with a key of its own
    assert refusal(home, "pump-2") == "enrol.token"  # an id alone is a claim
    assert refusal(home, "pump-3", key=key) == "enrol.token"  # under another name

    found = come(home, "pump-1", key=key)
    assert (found.group, found.labels, found.spki) == ("default", {"line": "b"}, key_digest(key))
    assert come(home, "pump-1", key=key).spki == found.spki  # its answer got lost
    assert refusal(home, "pump-1") == "enrol.token"


def test_a_revoked_device_comes_back_only_with_an_entry_made_for_it(home: Home) -> None:
    key = new_key()
    expect(home, Entry(device="pump-1", key=key_digest(key)))
    come(home, "pump-1", key=key)
    with home.database.write() as session:
        enrolment.revoke(session, "pump-1", actor=ACTOR, reason="stolen")

    assert refusal(home, "pump-1", key=key) == "enrol.not-listed"  # used up
    expect(home, Entry(serial="SN-1"))
    assert refusal(home, "pump-1", token=group_token(home), serial="SN-1") == "enrol.taken"
    fresh = new_key()
    expect(home, Entry(device="pump-1", key=key_digest(fresh)))
    assert come(home, "pump-1", key=fresh).state == "active"


def test_a_device_with_a_key_made_before_enrols_over_https_with_the_pin_alone(served: Served, tmp_path: Path) -> None:
    digest = agent.make_early_key(tmp_path / "pump-1")
    assert agent.make_early_key(tmp_path / "pump-1") == digest
    assert oct((tmp_path / "pump-1" / "enrol-key.pem").stat().st_mode)[-3:] == "600"
    with pytest.raises(EnrolError) as early:
        agent.enrol(tmp_path / "pump-1", server=served.url, token="", device="pump-1", pin=served.home.ca.pin())
    assert early.value.code == "enrol.token"
    expect(served.home, Entry(key=digest))

    with pytest.raises(EnrolError) as wrong_pin:
        agent.enrol(tmp_path / "pump-1", server=served.url, token="", device="pump-1", pin="0" * 64)
    assert wrong_pin.value.code == "enrol.pin"
    found = agent.enrol(tmp_path / "pump-1", server=served.url, token="", device="pump-1", pin=served.home.ca.pin())

    assert key_digest(found.key()) == digest
    assert sorted(p.name for p in (tmp_path / "pump-1").iterdir()) == ["identity"]


def test_an_entry_that_was_not_used_can_be_taken_back_and_one_that_was_can_not(home: Home) -> None:
    expect(home, Entry(device="pump-1"), Entry(device="pump-2"))
    come(home, "pump-1", token=group_token(home))
    with home.database.read() as session:
        ids = {e.device: e.id for e in session.query(Preauthorisation)}

    with home.database.write() as session:
        preauthorisation.withdraw(session, ids["pump-2"], actor=ACTOR)
    assert refusal(home, "pump-2", token=group_token(home)) == "enrol.not-listed"
    for entry, word in ((ids["pump-1"], "Revoke the device"), ("nothing", "unknown")):
        with pytest.raises(FleetError, match=word) as e, home.database.write() as session:
            preauthorisation.withdraw(session, entry, actor=ACTOR)
        assert e.value.code == "fleet.preauthorisation"


def test_a_list_is_read_whole(home: Home) -> None:
    text = f"serial,device,key\nSN-1,pump-1,\nSN-2,,{'a' * 64}\n"
    assert preauthorisation.read_entries(text) == [
        Entry(device="pump-1", serial="SN-1"),
        Entry(serial="SN-2", key="a" * 64),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "header"),
        ("name\npump-1\n", "'name'"),
        ("device,key\npump-1,xyz\n", "Line 2"),
        ("device,serial\n,\n", "let in everybody"),
        ("serial\n" + "S" * 129 + "\n", "128"),
        ("device\npump-1,more\n", "more columns"),
        ("device\nPump-1\n", "device id"),
        ("device,group\npump-1,+\n", "group"),
        ('serial\n"SN\n', "Line"),
    ],
)
def test_a_list_that_is_wrong_anywhere_is_not_taken_at_all(text: str, says: str) -> None:
    with pytest.raises((FleetError, InvalidNameError), match=says):
        preauthorisation.read_entries(text)


def test_a_device_is_expected_once(home: Home) -> None:
    expect(home, Entry(device="pump-1"))
    with pytest.raises(FleetError, match="already expected"):
        expect(home, Entry(device="pump-2"), Entry(device="pump-1"))
    with home.database.read() as session:
        assert [e.device for e in session.query(Preauthorisation)] == ["pump-1"]
