"""The whole agent and Home Assistant: what is read at a real broker, and that it is gone when it is turned off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.agent.app.agents import RunningAgent
from tests.agent.link.field import open_field, until

from lightship.api.device_api import DeviceApi
from lightship.fleet.broker import control_plane_context, free_port, start_broker
from lightship.fleet.broker_seat import Credential, Seat, pump
from lightship.integrations import mosquitto
from lightship.integrations.mosquitto import HOME_ASSISTANT_USER
from lightship.settings import load_settings
from lightship_agent.contract import topics

pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
CONFIG = topics.discovery("homeassistant", "press-1")
VALUES = topics.home("default", "press-1")


def test_an_agent_shows_itself_to_home_assistant_while_it_is_asked_to(tmp_path: Path, empty_home: Path) -> None:
    with open_field(tmp_path, empty_home) as field:
        flags = {"home": str(tmp_path), "broker": "mosquitto", "mqtt_port": str(free_port("127.0.0.1"))}
        settings = load_settings({}, {**flags, "home_assistant": "homeassistant"})
        running = start_broker(settings, tmp_path / "broker", field.home.ca)
        assert running is not None
        field.server.app = DeviceApi(field.home, "default", running.info).app()
        folder = field.enrolled("press-1").folder.parent
        tls = control_plane_context(tmp_path / "broker", field.home.ca, HOME_ASSISTANT_USER)
        seat = Seat(running.info.host, running.info.port, Credential(tls), "ha", v5=True).open()
        try:
            seat.subscribe("homeassistant/#", VALUES)
            with RunningAgent(folder, HOME_ASSISTANT="homeassistant") as agent:
                assert pump([seat], lambda: {h.topic for h in seat.heard} == {CONFIG, VALUES}, 30)
                values = json.loads(next(h.payload for h in seat.heard if h.topic == VALUES))
                assert (values["model"], values["requests"]) == ("none", None)
                assert "serving.no-model" in values["health"]
                assert agent.terminate() == 0
            seat.heard.clear()
            with RunningAgent(folder) as agent:
                assert pump([seat], lambda: (CONFIG, b"") in {(h.topic, h.payload) for h in seat.heard}, 30)
                until(lambda: not (folder / "home-assistant").exists())
                assert agent.terminate() == 0
            assert VALUES not in {h.topic for h in seat.heard}
        finally:
            seat.close()
            running.stop()
