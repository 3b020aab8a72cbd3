"""Asking a device: an act, brought there by MQTT or with a poll, answered once and only by who was asked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.agent.app.agents import RunningAgent
from tests.control_plane.fleet.test_up import lightship, needs_mosquitto, up
from tests.control_plane.things import add_device, enrolled, serve_devices, until

from lightship.fleet import asks
from lightship.home import Home
from lightship.monitoring import ingest
from lightship.storage.audit import now_ms
from lightship.storage.models import AuditEvent, DeadLetter, DeviceAsk
from lightship_agent.contract.codes import FleetError
from lightship_agent.contract.messages import Command, Reply
from lightship_agent.contract.wire import pack
from lightship_agent.link.client import ControlPlane

ACTOR = "user:test"


def ask(home: Home, device: str = "pump-1", verb: str = "snapshot", **more: int) -> str:
    with home.database.write() as session:
        return asks.ask(session, device, verb, actor=ACTOR, **more).id


def answer(
    home: Home, ident: str, device: str = "pump-1", *, verb: str = "snapshot", now: int = 0, **more: object
) -> str:
    reply = Reply(id=ident, verb=verb, at=1, **more)  # type: ignore[arg-type]
    with home.database.write() as session:
        return ingest.receive(session, device, "rsp", pack(reply), now or now_ms()).code


def row(home: Home, ident: str) -> DeviceAsk:
    with home.database.read() as session:
        return asks.get(session, ident)


def audited(home: Home) -> list[tuple[str, str, str]]:
    with home.database.read() as session:
        events = session.scalars(select(AuditEvent).order_by(AuditEvent.seq))
        return [(e.verb, e.actor, e.subject) for e in events if e.verb.startswith("device.a")]


def test_a_question_and_its_answer_are_kept_and_audited(home: Home) -> None:
    add_device(home, "pump-1")
    sent: list[tuple[str, str, str, Command]] = []
    ident = ask(home)
    with home.database.write() as session:
        assert asks.send(session, lambda *what: sent.append(what)) == 1
    with home.database.write() as session:
        assert asks.send(session, lambda *what: sent.append(what)) == 0  # once

    answer(home, ident, body=b'{"well": true}')
    answer(home, ident, body=b'{"well": false}')

    facts = asks.facts(row(home, ident), now_ms())
    assert (facts["state"], facts["answer"]) == ("answered", {"well": True})
    (command,) = sent
    assert (command[:3], command[3].id) == (("default", "pump-1", "snapshot"), ident)
    assert audited(home) == [("device.ask", ACTOR, "pump-1"), ("device.answer", "device:pump-1", "pump-1")]


def test_an_answer_counts_only_from_who_was_asked_to_what_was_asked_in_time(home: Home) -> None:
    add_device(home, "pump-1")
    add_device(home, "pump-2")
    ident = ask(home)

    answer(home, ident, "pump-2", body=b"{}")
    answer(home, ident, verb="rebirth", body=b"{}")
    answer(home, "never-asked", body=b"{}")
    answer(home, ident, body=b"{}", now=now_ms() + 4_000_000)

    assert (row(home, ident).answered_at, row(home, ident).answer) == (0, b"")
    assert [verb for verb, _, _ in audited(home)] == ["device.ask"]


def test_a_refusal_of_the_device_is_an_answer_with_its_code(home: Home) -> None:
    add_device(home, "pump-1")
    ident = ask(home)
    answer(home, ident, code="link.unknown-command", detail="Expected rebirth.")
    facts = asks.facts(row(home, ident), now_ms())
    assert (facts["state"], facts["code"], facts["answer"]) == ("refused", "link.unknown-command", None)


def test_what_is_no_reply_is_a_dead_letter(home: Home) -> None:
    add_device(home, "pump-1")
    with home.database.write() as session:
        assert ingest.receive(session, "pump-1", "rsp", b"\x93\x01", now_ms()).code == "wire.malformed"
    with home.database.read() as session:
        assert [d.topic for d in session.scalars(select(DeadLetter))] == ["pump-1/rsp"]


def test_a_question_that_has_expired_is_sent_no_more(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    add_device(home, "pump-1")
    ident = ask(home, valid=1)
    monkeypatch.setattr(asks, "now_ms", lambda: now_ms() + 2_000)
    with home.database.write() as session:
        assert asks.send(session, lambda *_: pytest.fail("it has expired")) == 0
        assert asks.waiting_for(session, "pump-1") == ()
    assert asks.facts(row(home, ident), now_ms() + 2_000)["state"] == "expired"


def test_what_can_not_be_asked_is_refused_and_leaves_nothing(home: Home) -> None:
    add_device(home, "pump-1", state="revoked")
    add_device(home, "pump-2")
    for device, verb, valid, code in (
        ("pump-9", "snapshot", 60, "fleet.unknown-device"),
        ("pump-1", "snapshot", 60, "fleet.device-state"),
        ("pump-2", "reboot", 60, "fleet.unknown-ask"),
        ("pump-2", "snapshot", 86_401, "fleet.unknown-ask"),
    ):
        with pytest.raises(FleetError) as refused, home.database.write() as session:
            asks.ask(session, device, verb, actor=ACTOR, valid=valid)
        assert refused.value.code == code
    with home.database.read() as session:
        assert not session.scalars(select(DeviceAsk)).all()
    assert audited(home) == []


def test_where_mqtt_is_blocked_it_goes_with_the_answer_to_a_poll(home: Home, tmp_path: Path) -> None:
    with serve_devices(home) as served:
        identity = enrolled(home, served.url, tmp_path, "pump-1")
        control = ControlPlane(identity)
        heard: list[tuple[str, Command]] = []
        control.on_asked = lambda verb, command: heard.append((verb, command))
        control.desired()
        ident = ask(home, verb="loglevel", seconds=60)
        control.desired()
        control.desired()
        control.post_reply(pack(Reply(id=ident, verb="loglevel", at=1, body=b'{"level": "info"}')))
        control.desired()
        control.close()

    assert [(verb, c.id, c.seconds) for verb, c in heard] == [("loglevel", ident, 60)] * 2  # until it is answered
    assert row(home, ident).answered_at > 0


@pytest.mark.slow
@needs_mosquitto
def test_a_running_agent_answers_over_a_real_broker(fresh_home: Path, tmp_path: Path) -> None:
    shutil.copytree(fresh_home, tmp_path / "home")
    with up(tmp_path / "home", "mosquitto"):
        url = re.findall(r"https://[0-9.:]+", (tmp_path / "up.log").read_text())[0]
        home = Home.open(tmp_path / "home")
        enrolled(home, url, tmp_path, "pump-1")
        with RunningAgent(tmp_path / "pump-1", HTTP_TOKEN_FILE="") as agent:
            until(lambda: agent.status().get("link", {}).get("mqtt") == "up", 180)

            said = [
                json.loads(lightship(tmp_path / "home", "device", "ask", "pump-1", *words, "--json", "--wait", "30"))
                for words in (("rebirth",), ("loglevel", "--level", "debug", "--for", "60"), ("snapshot",))
            ]

        home.close()
    assert [s["state"] for s in said] == ["answered"] * 3
    assert said[0]["answer"]["device"] == "pump-1"
    assert said[1]["answer"] == {"level": "debug", "seconds": 60, "then": "info"}
    snapshot = said[2]["answer"]
    assert set(snapshot) == {"status", "settings", "log"}
    assert any("the log's level is debug" in line for line in snapshot["log"])
    log = agent.log.read_text()
    assert all(f"asked: {verb} " in log for verb in ("rebirth", "loglevel", "snapshot"))
