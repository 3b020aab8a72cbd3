"""The MQTT face on a real mosquitto: sensors bound to a model, and programs that ask."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from tests.agent.conftest import FEATURES, training_rows

from lightship.fleet.broker import free_port
from lightship.integrations import mosquitto
from lightship_agent.contract.codes import SettingsError
from lightship_agent.contract.experiment import point_of
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving import mqtt
from lightship_agent.serving.bindings import parse_bindings
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.mqtt import MqttFace, load_bindings
from lightship_agent.serving.split import Arm, Split

pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
Models = Callable[..., LoadedModel]
BINDINGS = """
[broker]
port = {port}

[[sensors]]
topic = "site/+/telemetry"
publish = "predictions/{{topic}}"
fields = {{ temperature = "temp.c" }}

[[sensors]]
topic = "packed"
publish = "packed-out"
format = "msgpack"

[[requests]]
model = "pump"
"""
ASK, ANSWER = "lightship/v1/_local/pump/predict", "lightship/v1/_local/pump/prediction"
ROW = {"temperature": 21.3, "vibration": 0.4, "current": 1.1, "speed": 0.9}


class Broker:
    """A mosquitto, as on a device."""

    def __init__(self, folder: Path, port: int) -> None:
        (folder / "m.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        program = mosquitto.find()
        assert program is not None
        self._process = subprocess.Popen([str(program), "-c", str(folder / "m.conf")], stderr=subprocess.DEVNULL)
        until(lambda: reachable(port))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


class World:
    """Sensors and programs on the broker."""

    def __init__(self, port: int) -> None:
        self.heard: list[paho.MQTTMessage] = []
        self._subscribed = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_connect = lambda c, *_: c.subscribe(
            [("predictions/#", 1), ("packed-out", 1), (f"{ANSWER}/#", 1)]
        )
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = lambda _c, _d, m: self.heard.append(m)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._subscribed.wait(60)

    def say(self, topic: str, body: Any, *, retain: bool = False, **properties: Any) -> None:
        told = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            setattr(told, name, value)
        payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.client.publish(topic, payload, qos=1, retain=retain, properties=told).wait_for_publish(10)

    def next(self, topic: str) -> Any:
        until(lambda: any(m.topic == topic for m in self.heard))
        found = next(m for m in self.heard if m.topic == topic)
        self.heard.remove(found)
        return found

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def reachable(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.02)


class Site:
    """A broker, the face on it, and the world."""

    def __init__(self, folder: Path, model: LoadedModel) -> None:
        self.port = free_port("127.0.0.1")
        self.folder = folder
        self.broker = Broker(folder, self.port)
        self.seen: list[Any] = []
        self.plane = DataPlane(lambda *a: self.seen.append(a))
        self.plane.install(model)
        bindings = parse_bindings(BINDINGS.format(port=self.port), "bindings.toml")
        self.face = MqttFace(self.plane, bindings, client_id="lightship-press-1")
        self.face.start()
        assert self.face.listening.wait(60)
        self.world = World(self.port)
        self.settle()

    def settle(self) -> None:
        """Wait until the face's subscriptions are in force."""
        for _ in range(50):
            self.world.say(ASK, ROW)
            ends = time.monotonic() + 0.3
            while time.monotonic() < ends:
                if self.world.heard:
                    time.sleep(0.3)
                    self.world.heard.clear()
                    return
                time.sleep(0.02)
        pytest.fail("the face hears nothing")

    def close(self) -> None:
        self.face.stop()
        self.world.close()
        self.broker.stop()


@pytest.fixture
def site(tmp_path: Path, make_model: Models) -> Iterator[Site]:
    opened = Site(tmp_path, make_model(nullable=("vibration",)))
    yield opened
    opened.close()


def test_a_sensors_message_becomes_a_published_prediction(site: Site) -> None:
    site.world.say("site/7/telemetry", {"temp": {"c": 21.3}, "vibration": 0.4, "current": 1.1, "speed": 0.9, "at": 5})
    site.world.say("packed", msgspec.msgpack.encode(ROW))

    said = msgspec.json.decode(site.world.next("predictions/site/7/telemetry").payload)
    packed = msgspec.msgpack.decode(site.world.next("packed-out").payload)

    expected = site.plane.get().predict(np.array([[21.3, 0.4, 1.1, 0.9]], np.float32))
    assert expected.scores is not None
    assert list(said["scores"].values()) == pytest.approx(expected.scores[0].tolist(), abs=0)
    assert (said["label"], said["digest"]) == (packed["label"], packed["digest"])
    assert len(site.seen) >= 2  # drift sees what came this way, too


def test_a_program_that_asks_is_answered_where_it_wants_and_told_what_it_was(site: Site) -> None:
    site.world.say(ASK, [ROW, ROW], CorrelationData=b"one")
    answer = site.world.next(ANSWER)
    assert len(msgspec.json.decode(answer.payload)) == 2
    assert answer.properties.CorrelationData == b"one"

    site.world.say(ASK, ROW, ResponseTopic=f"{ANSWER}/mine")
    assert msgspec.json.decode(site.world.next(f"{ANSWER}/mine").payload)["label"] == "worn"


def test_a_sensor_is_known_by_its_topic_and_a_program_by_the_key_it_sends(site: Site, make_model: Models) -> None:
    """The same one is always answered by the same version, where two share the work."""
    site.plane.keep(make_model(2, nullable=("vibration",)), watched=True)
    site.plane.divide("pump", Split((Arm("e1", 2, 0.5),)))
    expected = {}
    for i in range(8):
        topic = f"site/{i}/telemetry"
        expected[topic] = 2 if point_of("e1", topic) < 0.5 else 1
        site.world.say(topic, {**ROW, "temp": {"c": 21.3}})
        assert msgspec.json.decode(site.world.next(f"predictions/{topic}").payload)["version"] == expected[topic]
    assert set(expected.values()) == {1, 2}

    for topic, version in expected.items():
        site.world.say(ASK, ROW, UserProperty=("key", topic))
        assert msgspec.json.decode(site.world.next(ANSWER).payload)["version"] == version
    site.world.say(ASK, ROW)
    assert msgspec.json.decode(site.world.next(ANSWER).payload)["version"] == 1


def test_nobody_has_us_publish_elsewhere(site: Site) -> None:
    for topic in ("predictions/forged", "lightship/v1/default/press-1/tele", f"{ANSWER}x"):
        site.world.say(ASK, ROW, ResponseTopic=topic)
        assert msgspec.json.decode(site.world.next(ANSWER).payload)["code"] == "serving.input"
    assert not site.world.heard


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "serving.malformed"),
        (b"{", "serving.malformed"),
        (b"\xff", "serving.malformed"),
        ([], "serving.input"),
        (5, "serving.input"),
        ({**ROW, "rpm": 5}, "serving.input"),
        ({"speed": 1}, "serving.input"),
        (b" " * 300_000, "serving.too-large"),
    ],
    ids=lambda v: f"{v!r:.30}",
)
def test_a_request_that_can_not_be_answered_is_answered_with_its_code(site: Site, body: Any, code: str) -> None:
    site.world.say(ASK, body, CorrelationData=b"c")

    answer = site.world.next(ANSWER)

    assert msgspec.json.decode(answer.payload)["code"] == code
    assert answer.properties.CorrelationData == b"c"
    assert site.plane.errors() == {code: 1}


def test_a_sensors_nonsense_is_counted_and_the_next_message_predicted(site: Site) -> None:
    for body in (b"{", [1, 2], {"temp": {"c": "warm"}}, {"temp": 5}, {}):
        site.world.say("site/7/telemetry", body)
    site.world.say("site/7/telemetry", {**ROW, "temp": {"c": 1}})

    assert msgspec.json.decode(site.world.next("predictions/site/7/telemetry").payload)["label"]
    assert site.plane.errors() == {"serving.malformed": 1, "serving.input": 4}
    assert not site.world.heard


def test_what_was_retained_before_is_not_predicted_again(site: Site) -> None:
    site.face.stop()
    site.world.say("site/7/telemetry", {**ROW, "temp": {"c": 1}}, retain=True)
    bindings = parse_bindings(BINDINGS.format(port=site.port), "bindings.toml")
    site.face = MqttFace(site.plane, bindings, client_id="lightship-press-1")
    before = len(site.seen)
    site.face.start()
    site.settle()

    assert [m.topic for m in site.world.heard if m.topic.startswith("predictions")] == []
    assert all(len(seen[1]) == 1 for seen in site.seen[before:])


def test_a_broker_that_restarts_is_found_again(site: Site) -> None:
    site.broker.stop()
    site.broker = Broker(site.folder, site.port)
    site.world.close()
    site.world = World(site.port)

    site.settle()


def test_more_than_can_be_answered_is_dropped_and_counted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, take = threading.Event(), site.face._take

    def slowly(message: paho.MQTTMessage) -> None:
        gate.wait(60)
        take(message)

    monkeypatch.setattr(site.face, "_take", slowly)
    for _ in range(3 * mqtt._WAITING):
        site.world.client.publish("site/7/telemetry", msgspec.json.encode({**ROW, "temp": {"c": 1}}), qos=1)
    until(lambda: site.plane.errors().get("serving.overloaded", 0) >= mqtt._WAITING)
    gate.set()
    until(lambda: len(site.world.heard) >= mqtt._WAITING)
    assert site.plane.errors().keys() == {"serving.overloaded"}


def test_a_broker_that_is_not_there_blocks_nobody(make_model: Models) -> None:
    plane = DataPlane(lambda *_: None)
    plane.install(make_model())
    face = MqttFace(plane, parse_bindings(BINDINGS.format(port=free_port("127.0.0.1")), "b"), client_id="x")
    begun = time.monotonic()
    face.start()
    face.stop()
    assert time.monotonic() - begun < 5
    assert not face._thread.is_alive()


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_bindings(tmp_path / "nowhere.toml")
    text = '[broker]\nusername = "u"\npassword_file = "/nowhere/secret"\n[[requests]]\nmodel = "pump"\n'
    with pytest.raises(SettingsError, match="/nowhere/secret"):
        MqttFace(DataPlane(lambda *_: None), parse_bindings(text, "b"), client_id="x")


def test_the_feature_names_of_the_rows_are_those_of_the_schema(site: Site) -> None:
    row = training_rows(1)[0].tolist()
    site.world.say(ASK, dict(zip(FEATURES, row, strict=True)))
    answer = msgspec.json.decode(site.world.next(ANSWER).payload)
    assert np.array_equal(
        np.array(list(answer["scores"].values()), np.float32),
        np.ravel(site.plane.get().predict(np.array([row], np.float32)).scores),  # type: ignore[arg-type]
    )
