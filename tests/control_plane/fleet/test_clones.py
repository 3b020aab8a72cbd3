"""The same identity twice: two devices that take turns are noticed, and nothing that one device does looks like it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.control_plane.things import ACTOR, Served, add_device, enrolled

from lightship.api import metrics, views
from lightship.fleet import clones
from lightship.fleet.clones import LATE_MS, Heard, Instance
from lightship.home import Home
from lightship.storage.models import AuditEvent, Device, DeviceInstance
from lightship.web import facts
from lightship_agent.link import identity as store
from lightship_agent.link import renewal
from lightship_agent.link.client import ControlPlane

MINUTE = 60_000
A, B, C = "a" * 16, "b" * 16, "c" * 16


def hear(home: Home, *turns: tuple[str, int], boot: int = 7) -> bool:
    """These instances ask at these minutes; whether the device is marked now."""
    for name, minute in turns:
        with home.database.write() as session:
            device = session.get_one(Device, "pump-1")
            clones.heard(session, device, Instance(name, boot), "192.0.2.1", 1_000_000 + minute * MINUTE)
    return marked(home)


def marked(home: Home) -> bool:
    with home.database.read() as session:
        said = [e.verb for e in session.query(AuditEvent) if e.verb == "device.clone"]
        at = session.get_one(Device, "pump-1").cloned_at
    assert len(said) == bool(at)  # said once, however often it is seen
    return bool(at)


@pytest.fixture(autouse=True)
def _device(home: Home) -> None:
    add_device(home, "pump-1")


def test_two_agents_under_one_identity_are_noticed_when_they_take_turns(home: Home) -> None:
    assert not hear(home, (A, 0), (A, 15), (B, 20), (A, 30), (B, 35))
    assert hear(home, (A, 45))
    assert hear(home, (B, 50), (A, 60))
    with home.database.read() as session:
        row = session.get_one(Device, "pump-1")
        shown = views.device_detail(session, row)
        overview = facts._of_devices([views.device(row)], 0)
    assert shown["clone"]["why"] == "instances take turns"
    assert {i["instance"] for i in shown["instances"]} == {A, B}
    assert any("in use twice" in str(a) for a in overview)
    assert b"lightship_devices_cloned 1.0" in metrics.render(home)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([(A, 0), (B, 1), (C, 2), (f"{1:016x}", 3), (f"{2:016x}", 4)], id="it restarts again and again"),
        pytest.param([(A, 0), (B, 5), (A, 5), (B, 6), (B, 60)], id="its last request came late, within the minute"),
        pytest.param([(A, 0), (B, 5), (A, 5), (B, 9), (C, 20), (B, 20), (C, 30)], id="twice so, at two restarts"),
    ],
)
def test_what_one_device_does_is_no_clone(home: Home, turns: list[tuple[str, int]]) -> None:
    assert not hear(home, *turns)


def test_an_older_copy_of_the_disk_put_back_is_no_clone(home: Home) -> None:
    assert not hear(home, (A, 0), (A, 30), boot=9)
    assert not hear(home, (B, 60), (B, 90), boot=4)  # its boot counter went back
    with home.database.read() as session:
        boots = [i["boot"] for i in views.instances(session, "pump-1")]
    assert boots == [4, 9]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200)), max_size=60))
def test_of_instances_that_follow_one_another_none_ever_returns(steps: list[tuple[int, int]]) -> None:
    """One device: an instance is heard for a while, then the next one, never an earlier one."""
    at, known, current = 0, dict[str, Heard](), ""
    for number, (_, pause) in enumerate(sorted(steps)):
        name = f"{steps and sorted(steps)[number][0]:016x}"
        at += pause * 1_000
        if name != current:
            assert not clones.has_returned(list(known.values()), current, name, at)
            known.setdefault(name, Heard(name, at, 0))
            current = name
    assert not clones.is_clone(list(known.values()))


@given(st.integers(LATE_MS + 1, 10**9), st.integers(1, 10**9))
def test_who_is_heard_more_than_a_minute_after_its_successor_has_returned(later: int, start: int) -> None:
    known = [Heard(A, 0, 0), Heard(B, start, 0)]
    assert clones.has_returned(known, B, A, start + later)
    assert not clones.has_returned(known, B, A, start + LATE_MS)
    assert not clones.has_returned(known, B, B, start + later)
    assert not clones.has_returned(known, B, C, start + later)


@pytest.mark.parametrize(
    "text", ["", "a:1", f"{A}", f"{A}:", f"{A}:-1", f"{A.upper()}:1", f"{A}:1:2", f" {A}:1", "é:1"]
)
def test_a_header_that_is_none_names_nobody(text: str) -> None:
    assert clones.parse_header(text) is None


def test_what_is_kept_of_a_device_that_restarts_for_years_is_bounded(home: Home) -> None:
    hear(home, *((f"{n:016x}", n) for n in range(60)))
    with home.database.read() as session:
        kept = [i.instance for i in session.query(DeviceInstance)]
    assert len(kept) == 20
    assert f"{59:016x}" in kept


def test_the_mark_is_taken_away_by_the_operator_and_comes_back_if_it_goes_on(home: Home) -> None:
    turns: Iterable[tuple[str, int]] = [(A, 0), (B, 5), (A, 10), (B, 15), (A, 20)]
    hear(home, *turns)
    with home.database.write() as session:
        clones.clear(session, session.get_one(Device, "pump-1"), actor=ACTOR, reason="the spare was switched off")
    with home.database.read() as session:
        assert session.get_one(Device, "pump-1").cloned_at == 0
    hear_again(home, (A, 25), (A, 60))
    hear_again(home, (B, 65), (A, 70), (B, 75))
    with home.database.read() as session:
        assert session.get_one(Device, "pump-1").cloned_at > 0


def hear_again(home: Home, *turns: tuple[str, int]) -> None:
    for name, minute in turns:
        with home.database.write() as session:
            device = session.get_one(Device, "pump-1")
            clones.heard(session, device, Instance(name, 1), "192.0.2.2", 1_000_000 + minute * MINUTE)


# Over HTTPS -----------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_state_directory_is_noticed_over_https(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clones, "LATE_MS", -1)  # the minute is over at once
    found = enrolled(served.home, served.url, tmp_path, "pump-2")
    shutil.copytree(found.folder, tmp_path / "copy" / "identity")
    one = ControlPlane(found, f"{A}:3")
    two = ControlPlane(store.load_identity(tmp_path / "copy"), f"{B}:3")
    doctor = ControlPlane(found)  # a command beside the agent is no second agent
    for control in (one, doctor, two, one, doctor, two):
        assert control.reachable()
        with served.home.database.read() as session:
            assert session.get_one(Device, "pump-2").cloned_at == 0

    assert one.reachable()

    with served.home.database.read() as session:
        row = session.get_one(Device, "pump-2")
        assert row.cloned_at > 0
        assert (row.state, row.clone["addresses"]) == ("active", ["127.0.0.1"])  # noticed, and nobody locked out
    for control in (one, two, doctor):
        control.close()


def test_the_key_from_before_a_renewal_beside_the_present_one_is_a_clone_and_alone_it_is_a_restore(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clones, "GRACE_MS", -1)
    monkeypatch.setattr(clones, "LATE_MS", -1)
    found = enrolled(served.home, served.url, tmp_path, "pump-2")
    shutil.copytree(found.folder, tmp_path / "copy" / "identity")
    device, copy = ControlPlane(found), ControlPlane(store.load_identity(tmp_path / "copy"))
    renewal.renew(found, device)
    device.reopen()
    assert device.reachable()

    def state() -> tuple[bool, list[str]]:
        with served.home.database.read() as session:
            said = [e.verb for e in session.query(AuditEvent).order_by(AuditEvent.seq) if e.subject == "pump-2"]
            return bool(session.get_one(Device, "pump-2").cloned_at), said[2:]

    for _ in range(3):
        assert not copy.reachable()  # refused, whichever of the two it is
    assert state() == (False, ["device.old-key"])
    assert device.reachable()
    assert state() == (False, ["device.old-key"])

    assert not copy.reachable()

    assert state() == (True, ["device.old-key", "device.clone"])
    device.close()
    copy.close()
