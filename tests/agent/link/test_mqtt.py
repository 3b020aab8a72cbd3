"""The MQTT session against real brokers: mosquitto with mutual TLS, and the embedded one with a password."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from tests.agent.link.field import Field, open_field, until

from lightship.fleet.broker import BrokerInfo, RunningBroker, control_plane_context, free_port, start_broker
from lightship.integrations import mosquitto, rumqttd
from lightship.settings import load_settings
from lightship_agent.contract import topics
from lightship_agent.contract.messages import Command, Envelope, Heartbeat, State
from lightship_agent.contract.wire import decode, encode, pack, unpack
from lightship_agent.link import mqtt
from lightship_agent.link.mqtt import MqttLink, retry_ceiling

ENVELOPE = Envelope(e="0" * 16, b=1, us=1, lo=1, r=(Heartbeat(s=1, t=1),))
KINDS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")),
    pytest.param("embedded", marks=pytest.mark.skipif(not rumqttd.available(), reason="the broker extra is missing")),
]
mosquitto_only = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")


class Listener:
    """The control plane's own session: hears everything the devices say."""

    def __init__(self, info: BrokerInfo, context: ssl.SSLContext) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._subscribed = threading.Event()
        name = "control-plane"
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.tls_set_context(context)
        if info.auth == "password":
            self.client.username_pw_set(info.control_username, info.control_password)
        self.client.on_connect = lambda c, *_: c.subscribe(f"{topics.ROOT}/#", qos=1)
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = lambda _c, _d, message: self.heard.append((message.topic, bytes(message.payload)))
        self.client.connect(info.host, info.port)
        self.client.loop_start()
        assert self._subscribed.wait(60)

    def states(self, device: str = "press-1") -> list[State]:
        return [decode(p, State) for t, p in list(self.heard) if t == topics.state("default", device)]

    def tell(self, topic: str, payload: bytes) -> None:
        self.client.publish(topic, payload, qos=1).wait_for_publish(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Session:
    """A broker, a field that tells devices of it, and what its control plane hears."""

    def __init__(self, field: Field, folder: Path, running: RunningBroker) -> None:
        self.field = field
        self.folder = folder
        self.running = running
        self.pokes: list[str] = []
        self._links: list[MqttLink] = []
        self.listener = self.listen()

    def listen(self) -> Listener:
        return Listener(self.running.info, control_plane_context(self.folder, self.field.home.ca))

    def link(self, name: str = "press-1", *, boot: int = 1, **more: Any) -> MqttLink:
        identity = self.field.enrolled(name)
        return self.link_of(identity, boot=boot, **more)

    def link_of(self, identity: Any, *, boot: int = 1) -> MqttLink:
        link = MqttLink(identity, boot=boot, agent="0.1.0", on_command=lambda verb, _: self.pokes.append(verb))
        self._links.append(link)
        link.start()
        assert link.connected.wait(60)
        return link

    def close(self) -> None:
        for link in self._links:
            link.stop()
        self.listener.close()


def cut(link: MqttLink) -> None:
    """Break the connection, as a network does."""
    connection: Any = link._client.socket()
    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect within a tenth of a second, so that tests need not wait."""
    monkeypatch.setattr(mqtt, "RETRY_CAP", 0.2)


def start(folder: Path, kind: str, field: Field, port: int) -> RunningBroker:
    settings = load_settings({}, {"home": str(folder), "broker": kind, "mqtt_port": str(port)})
    running = start_broker(settings, folder / "broker", field.home.ca)
    assert running is not None
    return running


@pytest.fixture
def broker_kind(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "mosquitto")


@pytest.fixture
def session(tmp_path: Path, empty_home: Path, broker_kind: str) -> Iterator[Session]:
    """A broker of that kind, and a field whose devices are told of it at enrolment."""
    with open_field(tmp_path, empty_home) as field:
        running = start(tmp_path, broker_kind, field, free_port("127.0.0.1"))
        field.server.app = _telling(field, running.info)
        opened = Session(field, tmp_path / "broker", running)
        try:
            yield opened
        finally:
            opened.close()
            opened.running.stop()


def _telling(field: Field, info: BrokerInfo) -> Any:
    from lightship.api.device_api import DeviceApi

    return DeviceApi(field.home, "default", info).app()


@pytest.mark.parametrize("broker_kind", KINDS, indirect=True)
def test_a_device_says_hello_reports_and_hears_a_poke(session: Session) -> None:
    link = session.link()

    assert link.publish("tele", pack(ENVELOPE))
    assert link.publish("event", pack(ENVELOPE))
    session.listener.tell(topics.command("default", "press-1", "check"), encode(Command(id="c", expires=0)))
    session.listener.tell(topics.notify("default"), encode(Command(id="n", expires=int(time.time()) + 60)))

    until(lambda: len(session.pokes) == 2)
    assert session.pokes == ["check", "check"]
    until(lambda: len(session.listener.heard) >= 5)
    heard = dict(session.listener.heard)
    assert unpack(heard[topics.telemetry("default", "press-1")], Envelope) == ENVELOPE
    assert unpack(heard[topics.event("default", "press-1")], Envelope) == ENVELOPE
    assert session.listener.states() == [State(on=True, n=1, agent="0.1.0")]


def test_only_the_loops_thread_touches_the_socket_whoever_publishes(session: Session) -> None:
    link = session.link()
    client: Any = link._client
    writers: set[str] = set()
    packet_write = client._packet_write

    def noted() -> Any:
        writers.add(threading.current_thread().name)
        return packet_write()

    client._packet_write = noted
    begun = time.monotonic()
    threads = [threading.Thread(target=link.publish, args=("tele", pack(ENVELOPE)), name=f"p{i}") for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: sum(1 for topic, _ in session.listener.heard if topic.endswith("/tele")) == 8)

    assert writers == {"mqtt"}
    assert time.monotonic() - begun < mqtt.LOOP_SECONDS  # nobody waited for the loop's next look


@pytest.mark.parametrize("broker_kind", KINDS, indirect=True)
def test_a_stop_says_goodbye(session: Session) -> None:
    link = session.link(boot=3)

    link.stop()

    until(lambda: len(session.listener.states()) >= 2)
    assert session.listener.states()[:2] == [State(on=True, n=3, agent="0.1.0"), State(on=False, n=3, agent="0.1.0")]
    assert not link.publish("tele", b"x")


@mosquitto_only
def test_a_device_that_falls_silent_is_declared_gone_by_its_will_and_whoever_comes_later_hears_it(
    session: Session,
) -> None:
    link = session.link(boot=2)
    # The network fails without a word: nothing but the broker can say that the device is gone.
    link._stop.set()
    cut(link)

    until(lambda: session.listener.states()[-1:] == [State(on=False, n=2, agent="0.1.0")])
    session.listener.close()
    session.listener = session.listen()
    until(session.listener.states)
    assert session.listener.states() == [State(on=False, n=2, agent="0.1.0")]


@mosquitto_only
def test_a_broker_that_restarts_is_found_again_and_pokes_are_heard_again(session: Session) -> None:
    link = session.link()
    port = session.running.info.port
    session.listener.close()
    session.running.stop()
    until(lambda: not link.connected.is_set())
    assert not link.publish("tele", pack(ENVELOPE))

    session.running = start(session.folder.parent, "mosquitto", session.field, port)

    assert link.connected.wait(60)
    session.listener = session.listen()
    session.listener.tell(topics.command("default", "press-1", "check"), encode(Command(id="c", expires=0)))
    until(lambda: session.pokes == ["check"])
    assert link.publish("tele", pack(ENVELOPE))
    until(lambda: topics.telemetry("default", "press-1") in dict(session.listener.heard))


@mosquitto_only
def test_stale_and_senseless_commands_are_dropped_and_the_session_goes_on(session: Session) -> None:
    session.link()
    topic = topics.command("default", "press-1", "check")
    for payload in (b"", b"\xff" * 30, b"x" * 5_000, encode({"id": 5}), encode(Command(id="old", expires=1_000))):
        session.listener.tell(topic, payload)
    session.listener.tell(topic, encode(Command(id="good", expires=0)))

    until(lambda: session.pokes == ["check"])
    time.sleep(0.2)
    assert session.pokes == ["check"]


@mosquitto_only
def test_a_device_hears_no_command_of_another_and_speaks_in_no_other_name(session: Session) -> None:
    link = session.link("press-1")
    session.link("press-2")
    link._client.publish(topics.telemetry("default", "press-2"), b"forged", qos=1)
    link._client.publish(topics.state("default", "press-2"), b"forged", qos=1, retain=True)
    assert link.publish("tele", pack(ENVELOPE))
    session.listener.tell(topics.command("default", "press-1", "check"), encode(Command(id="c", expires=0)))

    until(lambda: topics.telemetry("default", "press-1") in dict(session.listener.heard))
    until(lambda: session.pokes == ["check"])
    assert not [p for _, p in session.listener.heard if p == b"forged"]


@mosquitto_only
def test_a_session_outlives_a_connection_so_a_poke_in_between_is_not_lost(session: Session) -> None:
    link = session.link()
    identity = link._identity
    link.stop()
    session.listener.tell(topics.command("default", "press-1", "check"), encode(Command(id="c", expires=0)))

    session.link_of(identity, boot=2)

    until(lambda: session.pokes == ["check"])


@mosquitto_only
def test_a_renewed_certificate_is_shown_at_the_next_connection(session: Session) -> None:
    from lightship_agent.link import renewal
    from lightship_agent.link.client import ControlPlane

    link = session.link()
    control = ControlPlane(link._identity)
    renewal.renew(link._identity, control)
    control.close()
    cut(link)

    until(lambda: not link.connected.is_set())
    assert link.connected.wait(60)
    assert link.publish("tele", pack(ENVELOPE))


def test_a_broker_that_is_not_there_blocks_nobody(tmp_path: Path, empty_home: Path) -> None:
    nobody = BrokerInfo("mosquitto", "127.0.0.1", free_port("127.0.0.1"), "mtls")
    with open_field(tmp_path, empty_home, nobody) as field:
        link = MqttLink(field.enrolled(), boot=1, agent="0.1.0", on_command=lambda *_: None)
        began = time.monotonic()
        link.start()

        assert not link.publish("tele", b"x")
        time.sleep(0.5)
        assert link._thread.is_alive()
        link.stop()
        assert time.monotonic() - began < 15
        assert not link._thread.is_alive()


def test_an_identity_without_a_broker_has_no_link(field: Field) -> None:
    with pytest.raises(ValueError, match="without a broker"):
        MqttLink(field.enrolled(), boot=1, agent="0.1.0", on_command=lambda *_: None)


@given(attempt=st.integers(1, 10**9))
def test_the_pause_before_a_reconnect_is_bounded_however_long_the_broker_is_away(attempt: int) -> None:
    assert 0 < retry_ceiling(attempt) <= mqtt.RETRY_CAP
