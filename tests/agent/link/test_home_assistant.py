"""What Home Assistant reads of a device, on a real mosquitto, with its rules for what it may be told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tests.agent.link.field import Field, open_field, until

from lightship.api.device_api import DeviceApi
from lightship.fleet.broker import RunningBroker, control_plane_context, free_port, start_broker, worker_name
from lightship.fleet.broker_doors import context
from lightship.fleet.broker_seat import Credential, Heard, Seat, pump
from lightship.integrations import mosquitto
from lightship.integrations.mosquitto import HOME_ASSISTANT_USER
from lightship.settings import load_settings
from lightship_agent.contract import topics
from lightship_agent.contract.codes import SettingsError
from lightship_agent.contract.messages import Heartbeat, Running, State
from lightship_agent.contract.wire import encode
from lightship_agent.link import mqtt
from lightship_agent.link.home_assistant import AVAILABLE, FILE, HomeAssistant
from lightship_agent.link.mqtt import MqttLink

needs_mosquitto = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
PREFIX = "homeassistant"
BEAT = Heartbeat(
    s=1,
    t=1,
    running=(Running(model="pump", version=2, digest="a" * 64, since=1, requests=100, latency_ms=1.25),),
    health={"temperature_c": 51.23},
)
#: What Home Assistant's MQTT integration documents for discovery of a device, and for a sensor.
DEVICE_FIELDS = {
    "device", "origin", "components", "state_topic", "command_topic", "availability", "availability_mode",
    "availability_topic", "availability_template", "payload_available", "payload_not_available", "qos", "encoding",
}  # fmt: skip
DEVICE_INFO = {
    "identifiers", "connections", "manufacturer", "model", "model_id", "name", "hw_version", "serial_number",
    "sw_version", "via_device", "suggested_area", "configuration_url",
}  # fmt: skip
SENSOR_FIELDS = {
    "platform", "unique_id", "name", "icon", "device_class", "unit_of_measurement", "state_class", "expire_after",
    "value_template", "encoding", "entity_category", "suggested_display_precision", "state_topic", "qos",
    "enabled_by_default", "force_update", "options", "json_attributes_topic", "object_id", "default_entity_id",
}  # fmt: skip
UNITS = {"duration": {"d", "h", "min", "s", "ms", "µs"}, "temperature": {"°C", "°F", "K"}}


def rendered(template: str, payload: bytes) -> str:
    """As Home Assistant renders a template: `value` as it came, and `value_json` where it is JSON."""
    variables: dict[str, Any] = {"value": payload}
    with contextlib.suppress(ValueError):
        variables["value_json"] = json.loads(payload)
    made = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(template)
    return made.render(variables).strip()


def home(folder: Path, prefix: str = PREFIX) -> HomeAssistant:
    return HomeAssistant(prefix, folder, tenant="default", device="press-1", agent="0.1.0", report_seconds=60)


# What is said, without a broker -----------------------------------------------------------------------------------


def test_what_describes_the_device_has_only_fields_that_home_assistant_documents(tmp_path: Path) -> None:
    ((topic, payload),) = home(tmp_path).announcements()
    said = json.loads(payload)
    assert topic == "homeassistant/device/press-1/config"
    assert set(said) <= DEVICE_FIELDS
    assert {"device", "origin", "components"} <= set(said)
    assert set(said["device"]) <= DEVICE_INFO
    assert said["device"]["identifiers"] == ["lightship_press-1"]
    assert said["origin"]["name"]
    sensors = said["components"]
    assert len({s["unique_id"] for s in sensors.values()}) == len(sensors) == 6
    for sensor in sensors.values():
        assert set(sensor) <= SENSOR_FIELDS
        assert sensor["platform"] == "sensor"
        assert sensor["expire_after"] == 180
        assert sensor.get("entity_category", "diagnostic") == "diagnostic"
        assert sensor.get("state_class", "measurement") == "measurement"
        if "device_class" in sensor:
            assert sensor["unit_of_measurement"] in UNITS[sensor["device_class"]]


def test_the_sensors_show_what_a_heartbeat_says(tmp_path: Path) -> None:
    told = home(tmp_path)
    first = told.values(BEAT, [], 10.0)
    busier = Heartbeat(s=2, t=1, running=(Running(model="pump", version=2, digest="a" * 64, since=1, requests=160),))
    second = told.values(busier, ["flow is stuck"], 20.0)
    sensors = json.loads(told.announcements()[0].payload)["components"]
    shown = [{n: rendered(s["value_template"], v) for n, s in sensors.items()} for v in (first, second)]
    assert shown[0] == {
        "model": "pump@2", "health": "ok", "data": "ok", "requests": "None", "latency": "1.25", "temperature": "51.2",
    }  # fmt: skip
    assert shown[1]["requests"] == "6.0"
    assert shown[1]["data"] == "flow is stuck"
    assert shown[1]["temperature"] == "None"  # which Home Assistant shows as unknown


def test_a_device_that_serves_nothing_or_restarted_is_told_so_and_no_text_is_too_long(tmp_path: Path) -> None:
    told = home(tmp_path)
    told.values(BEAT, [], 1.0)
    said = json.loads(told.values(Heartbeat(s=1, t=1, degraded=("x" * 60,) * 9), [], 2.0))
    assert (said["model"], said["requests"], said["latency"]) == ("none", None, None)
    assert len(said["health"]) <= 255


def test_the_byte_that_says_whether_it_is_there_is_where_the_template_looks() -> None:
    for agent in ("", "0.1.0", "x" * 60):
        assert rendered(AVAILABLE, encode(State(on=True, n=7, agent=agent))) == "online"
        assert rendered(AVAILABLE, encode(State(on=False, n=70_000, agent=agent))) == "offline"


def test_what_was_announced_is_remembered_until_the_broker_has_taken_it_back(tmp_path: Path) -> None:
    home(tmp_path).announcements()
    other = home(tmp_path, "ha/test")
    removed, announced = other.announcements()
    assert (removed.topic, removed.payload) == ("homeassistant/device/press-1/config", b"")
    assert announced.topic == "ha/test/device/press-1/config"
    other.taken(removed)
    off = home(tmp_path, "")
    assert off.topic == ""
    (last,) = off.announcements()
    assert (last.topic, last.payload) == (announced.topic, b"")
    off.refused(last, "Not authorized")
    assert home(tmp_path, "").announcements() == [last]
    off.taken(last)
    assert home(tmp_path, "").announcements() == []
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("prefix", ["home assistant", "a/+/b", "#", "lightship/v1"])
def test_a_prefix_that_is_none_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(SettingsError) as e:
        home(tmp_path, prefix)
    assert e.value.code == "settings.invalid"
    assert not (tmp_path / FILE).exists()


# On a real broker ---------------------------------------------------------------------------------------------------


class House:
    """A mosquitto, a field whose devices are told of it, and what Home Assistant would read."""

    def __init__(self, field: Field, folder: Path, running: RunningBroker) -> None:
        self.field, self.folder, self.running = field, folder, running
        self.identity = field.enrolled("press-1")
        self.links: list[MqttLink] = []

    def link(self, told: HomeAssistant | None) -> MqttLink:
        link = MqttLink(self.identity, boot=1, agent="0.1.0", on_command=lambda *_: None, home=told)
        self.links.append(link)
        link.start()
        assert link.connected.wait(60)
        return link

    @contextlib.contextmanager
    def reader(self, *filters: str, name: str = HOME_ASSISTANT_USER) -> Iterator[Seat]:
        tls = control_plane_context(self.folder, self.field.home.ca, name)
        seat = Seat(self.running.info.host, self.running.info.port, Credential(tls), name, v5=True).open()
        seat.subscribe(*filters)
        try:
            yield seat
        finally:
            seat.close()

    def retained(self) -> list[Heard]:
        with self.reader(f"{PREFIX}/#") as seat:
            pump([seat], lambda: bool(seat.heard), 1.0)
            return seat.heard


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", PREFIX)


@pytest.fixture
def house(tmp_path: Path, empty_home: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    if mosquitto.find() is None:
        pytest.skip("mosquitto is not installed")
    monkeypatch.setattr(mqtt, "RETRY_CAP", 0.2)
    with open_field(tmp_path, empty_home) as field:
        flags = {"home": str(tmp_path), "broker": "mosquitto", "mqtt_port": str(free_port("127.0.0.1"))}
        settings = load_settings({}, {**flags, "home_assistant": prefix})
        running = start_broker(settings, tmp_path / "broker", field.home.ca)
        assert running is not None
        field.server.app = DeviceApi(field.home, "default", running.info).app()
        opened = House(field, tmp_path / "broker", running)
        try:
            yield opened
        finally:
            for link in opened.links:
                link.stop()
            running.stop()


def test_home_assistant_finds_the_device_reads_its_values_and_sees_it_die(house: House, tmp_path: Path) -> None:
    told = home(tmp_path)
    link = house.link(told)
    (config,) = house.retained()
    said = json.loads(config.payload)
    assert config.retain
    state = said["availability"][0]["topic"]
    with house.reader(said["state_topic"], state) as ha:
        assert pump([ha], lambda: bool(ha.heard))
        assert [rendered(said["availability"][0]["value_template"], h.payload) for h in ha.heard] == ["online"]
        assert link.tell_home(told.values(BEAT, [], 1.0))
        assert pump([ha], lambda: len(ha.heard) == 2)
        shown = {n: rendered(s["value_template"], ha.heard[1].payload) for n, s in said["components"].items()}
        assert (shown["model"], shown["latency"]) == ("pump@2", "1.25")
        link.stop()
        assert pump([ha], lambda: len(ha.heard) == 3)
        assert rendered(said["availability"][0]["value_template"], ha.heard[2].payload) == "offline"


def test_turned_off_it_is_removed(house: House, tmp_path: Path) -> None:
    link = house.link(home(tmp_path))
    until(lambda: len(house.retained()) == 1)
    link.stop()
    house.link(home(tmp_path, ""))
    until(lambda: not (tmp_path / FILE).exists())
    until(lambda: house.retained() == [])


@pytest.mark.parametrize("prefix", [""], indirect=True)
def test_where_the_broker_was_not_told_it_permits_nothing_and_reports_go_on(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = house.link(home(tmp_path))
    until(lambda: "Set home_assistant in the control plane's settings too" in caplog.text)
    with house.reader("lightship/v1/#", f"{PREFIX}/#", name=worker_name(9)) as worker:
        assert link.tell_home(b"{}")
        assert link.publish("tele", b"x")
        assert pump([worker], lambda: any(h.topic.endswith("/tele") for h in worker.heard))
    assert not [h for h in worker.heard if h.topic.endswith("/home") or h.topic.startswith(PREFIX)]
    assert (tmp_path / FILE).exists()  # it may have been taken, as far as it knows


def test_home_assistant_reads_what_is_meant_for_it_and_says_nothing_in_a_devices_name(house: House) -> None:
    with (
        house.reader("#", "lightship/v1/#") as ha,
        house.reader("lightship/v1/#", name=worker_name(9)) as worker,
    ):
        worker.say(topics.telemetry("default", "press-1"), b"report")
        worker.say(topics.command("default", "press-1", "check"), b"command")
        worker.say(topics.home("default", "press-1"), b"{}")
        assert pump([ha, worker], lambda: bool(ha.heard))
        for topic in (topics.telemetry("default", "press-1"), topics.command("default", "press-1", "check")):
            ha.say(topic, b"forged")
        pump([ha, worker], lambda: False, 0.5)
    assert {h.payload for h in ha.heard} == {b"{}"}
    assert b"forged" not in {h.payload for h in worker.heard}


def test_one_device_describes_no_other(house: House) -> None:
    device = Seat(
        house.running.info.host, house.running.info.port, Credential(house.identity.tls_context()), "press-1", v5=True
    ).open()
    device.say(topics.discovery(PREFIX, "press-2"), b"forged", retain=True)
    device.say(topics.home("default", "press-2"), b"forged", retain=True)
    device.close()
    assert house.retained() == []


def test_an_unknown_program_is_not_home_assistant(house: House) -> None:
    ca = str(house.field.home.ca.certificate_path)
    with pytest.raises(Exception, match=r"TLS|hung up"):
        Seat(house.running.info.host, house.running.info.port, Credential(context(ca)), "x", v5=True).open()
