"""The MQTT session where the broker says no, says nothing, or gives the session to another."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.agent.link import gate as gates
from tests.agent.link.field import Field, open_field, until
from tests.agent.link.gate import Gate, plain_mosquitto

from lightship.fleet.broker import BrokerInfo, free_port
from lightship.fleet.broker_seat import Credential, Seat, pump
from lightship.integrations import mosquitto
from lightship_agent.contract import topics
from lightship_agent.contract.messages import Command, Envelope, Heartbeat
from lightship_agent.contract.wire import encode, pack
from lightship_agent.link import mqtt
from lightship_agent.link.mqtt import MqttLink

pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
ENVELOPE = Envelope(e="0" * 16, b=1, us=1, lo=1, r=(Heartbeat(s=1, t=1),))
DEVICES_SAY_NO_EVENTS = """user device
topic write lightship/v1/+/+/tele
topic write lightship/v1/+/+/state
topic read lightship/v1/+/+/cmd/#

user ingest
topic readwrite lightship/v1/#
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect within a tenth of a second, so that tests need not wait."""
    monkeypatch.setattr(mqtt, "RETRY_CAP", 0.2)


class Scene:
    """A device whose broker is behind a gate."""

    def __init__(self, field: Field, gate: Gate, behind: int) -> None:
        self.field, self.gate, self.behind = field, gate, behind
        self.pokes: list[str] = []
        self.links: list[MqttLink] = []
        self.pauses: list[float] = []

    def link(self, name: str = "press-1") -> MqttLink:
        return self.link_of(self.field.enrolled(name))

    def link_of(self, identity: Any) -> MqttLink:
        link = MqttLink(identity, boot=1, agent="0.1.0", on_command=lambda verb, _: self.pokes.append(verb))
        wait = link._stop.wait

        def noted(seconds: float | None = None) -> bool:
            self.pauses.append(seconds or 0.0)
            return wait(seconds)

        link._stop.wait = noted  # type: ignore[method-assign]
        self.links.append(link)
        link.start()
        return link

    @contextlib.contextmanager
    def listener(self, *filters: str) -> Iterator[Seat]:
        seat = Seat("127.0.0.1", self.behind, Credential(username="ingest"), "listener", v5=True).open()
        seat.subscribe(*filters)
        try:
            yield seat
        finally:
            seat.close()

    def close(self) -> None:
        for link in self.links:
            link.stop()


@pytest.fixture
def acl(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "")


@pytest.fixture
def scene(tmp_path: Path, empty_home: Path, acl: str) -> Iterator[Scene]:
    port = free_port("127.0.0.1")
    with plain_mosquitto(tmp_path, acl) as behind, _field(tmp_path, empty_home, port) as (field, tell):
        gate = Gate(field.home.ca, tmp_path, behind)
        tell(gate.port)
        scene = Scene(field, gate, behind)
        try:
            yield scene
        finally:
            scene.close()
            gate.close()


@contextlib.contextmanager
def _field(tmp_path: Path, empty_home: Path, port: int) -> Iterator[tuple[Field, Any]]:
    from lightship.api.device_api import DeviceApi

    with open_field(tmp_path, empty_home) as field:

        def tell(at: int) -> None:
            info = BrokerInfo("embedded", "127.0.0.1", at, "password", "device", "secret")
            field.server.app = DeviceApi(field.home, "default", info).app()

        tell(port)
        yield field, tell


def until_refused(link: MqttLink, handle: int) -> None:
    """Beside it, the birth may be named: nobody need listen for that either."""
    said: list[int] = []
    until(lambda: said.extend(link.refusals()) or handle in said)
    assert handle
    assert len(said) <= 2


@pytest.mark.parametrize("says", [gates.NO_SUCH_VERSION_311, gates.NO_SUCH_VERSION_5, gates.HANG_UP])
def test_a_broker_that_knows_nothing_newer_is_spoken_to_in_3_1_1(scene: Scene, says: bytes) -> None:
    scene.gate.rule = lambda level: says if level == 5 else None
    link = scene.link()
    assert link.connected.wait(60)

    with scene.listener(topics.telemetry("default", "press-1")) as ingest:
        assert link.publish("tele", pack(ENVELOPE))
        assert pump([ingest], lambda: bool(ingest.heard))
        ingest.say(topics.command("default", "press-1", "check"), encode(Command(id="c", expires=0)))
        until(lambda: scene.pokes == ["check"])

    assert ingest.heard[0].payload == pack(ENVELOPE)
    assert set(scene.gate.levels[:-1]) == {5}
    assert scene.gate.levels[-1] == 4


def test_a_broker_that_learns_mqtt_5_and_forgets_the_old_one_is_found_again(scene: Scene) -> None:
    scene.gate.rule = lambda level: gates.NO_SUCH_VERSION_5 if level == 5 else None
    link = scene.link()
    assert link.connected.wait(60)
    scene.gate.rule = lambda level: gates.NO_SUCH_VERSION_311 if level == 4 else None
    scene.gate.say(b"")
    until(lambda: not link.connected.is_set())

    assert link.connected.wait(60)
    assert scene.gate.levels[-1] == 5


def test_whoever_loses_its_session_to_another_stops_loudly(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    link = scene.link()
    assert link.connected.wait(60)
    with caplog.at_level(logging.ERROR):
        scene.gate.say(gates.TAKEN_OVER)
        until(lambda: "second device under the name press-1" in caplog.text)

    assert link.taken_over
    until(lambda: scene.pauses)
    assert scene.pauses[-1] == mqtt.TAKEN_OVER_SECONDS
    time.sleep(0.5)
    assert len(scene.gate.levels) == 1  # it does not take it back
    assert link.publish("tele", pack(ENVELOPE)) == 0
    began = time.monotonic()
    link.stop()
    assert time.monotonic() - began < 30  # and an hour's pause keeps nobody from stopping it


def test_two_of_one_name_at_a_real_broker_either_learn_it_or_take_turns_and_neither_is_silenced_for_good(
    scene: Scene,
) -> None:
    identity = scene.field.enrolled("press-1")
    one = scene.link_of(identity)
    assert one.connected.wait(60)
    two = scene.link_of(identity)
    # mosquitto 2.0.11 hangs up without a word; later ones say 0x8E.
    until(lambda: one.taken_over or two.taken_over or len(scene.gate.levels) >= 6)

    assert one._thread.is_alive()
    assert two._thread.is_alive()
    (loser, winner) = (one, two) if one.taken_over else (two, one)
    if not loser.taken_over:
        loser.stop()
    assert winner.connected.wait(60)
    until(lambda: winner.publish("tele", pack(ENVELOPE)) != 0)


@pytest.mark.parametrize("when", ["at the door", "in the session"])
def test_a_broker_that_says_it_is_busy_is_left_alone_for_longer(scene: Scene, when: str) -> None:
    if when == "at the door":
        scene.gate.rule = lambda _: gates.SERVER_BUSY
        link = scene.link()
    else:
        link = scene.link()
        assert link.connected.wait(60)
        scene.gate.rule = lambda _: gates.SERVER_BUSY
        scene.gate.say(gates.QUOTA_EXCEEDED)
    until(lambda: len(scene.pauses) >= 6)

    # Half to twice the ceiling, and not from nothing up to it.
    assert all(0.1 <= pause <= 0.4 for pause in scene.pauses), scene.pauses
    assert set(scene.gate.levels) == {5}  # busy is no reason to speak an older language
    scene.gate.rule = lambda _: None
    assert link.connected.wait(60)


@pytest.mark.parametrize("acl", [DEVICES_SAY_NO_EVENTS], indirect=True)
def test_a_report_that_the_acl_refuses_is_told_from_one_that_was_taken(scene: Scene) -> None:
    link = scene.link()
    assert link.connected.wait(60)
    with scene.listener(topics.telemetry("default", "press-1"), topics.event("default", "press-1")) as ingest:
        refused = link.publish("event", pack(ENVELOPE))
        assert link.publish("tele", pack(ENVELOPE))
        assert pump([ingest], lambda: bool(ingest.heard))
        until_refused(link, refused)

    assert link.refusals() == []
    assert [h.topic for h in ingest.heard] == [topics.telemetry("default", "press-1")]
    assert link.connected.is_set()


def test_a_report_that_nobody_listens_for_is_told_from_one_that_was_taken(scene: Scene) -> None:
    link = scene.link()
    assert link.connected.wait(60)
    until_refused(link, link.publish("tele", pack(ENVELOPE)))
    assert link.connected.is_set()


def test_a_report_beyond_a_quota_is_told_from_one_that_was_taken(scene: Scene) -> None:
    link = scene.link()
    assert link.connected.wait(60)
    time.sleep(0.3)  # the birth is acknowledged
    # PUBACK: quota exceeded.
    scene.gate.change = lambda said: b"\x40\x04" + said[2:4] + b"\x97\x00" if said[0] == 0x40 else said
    with scene.listener(topics.telemetry("default", "press-1")):
        until_refused(link, link.publish("tele", pack(ENVELOPE)))
    assert link.connected.is_set()


# The library leaves a socket whose handshake failed to the garbage collector, which closes it at once.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_takes_the_connection_and_never_answers_blocks_nobody_and_is_left(
    tmp_path: Path, empty_home: Path
) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        kept: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(mute.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with _field(tmp_path, empty_home, int(mute.getsockname()[1])) as (field, _):
            link = MqttLink(field.enrolled(), boot=1, agent="0.1.0", on_command=lambda *_: None)
            link._client.connect_timeout = 3
            link.start()
            began = time.monotonic()
            assert link.publish("tele", pack(ENVELOPE)) == 0
            assert time.monotonic() - began < 2
            until(lambda: len(kept) >= 2)  # it gave up, and tried again
            assert not link.connected.is_set()
            assert not link.taken_over
            assert link._thread.is_alive()
            link.stop()
        mute.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        for connection in kept:
            connection.close()
