"""The client library over a real mosquitto, asking an agent's MQTT face; and where no agent or no broker answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.agent.client.test_client import Awaited, code
from tests.agent.conftest import FEATURES, training_rows
from tests.agent.serving.test_mqtt_face import Broker

from lightship.fleet.broker import free_port
from lightship.integrations import mosquitto
from lightship_agent.client import Answer, AsyncClient, Client
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.bindings import parse_bindings
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.mqtt import MqttFace

pytestmark = pytest.mark.skipif(mosquitto.find() is None, reason="mosquitto is not installed")
Models = Callable[..., LoadedModel]
BINDINGS = '[broker]\nport = {port}\n\n[[requests]]\nmodel = "pump"\n'


class Site:
    """A broker, and an agent's face on it."""

    def __init__(self, folder: Path, *models: LoadedModel) -> None:
        self.port, self.folder = free_port("127.0.0.1"), folder
        self.address = f"mqtt://127.0.0.1:{self.port}"
        self.broker = Broker(folder, self.port)
        monitor = Monitor(64)
        self.plane = DataPlane(monitor.observe, observe_row=monitor.observe_row, feedback=monitor.feedback)
        for model in models:
            self.plane.install(model)
        bindings = parse_bindings(BINDINGS.format(port=self.port), "bindings.toml")
        self.face = MqttFace(self.plane, bindings, client_id="lightship-press-1")
        self.face.start()
        assert self.face.listening.wait(60)
        with Client(self.address, model="pump", timeout=15) as client:
            assert client.ready()

    def close(self) -> None:
        self.face.stop()
        self.broker.stop()


@pytest.fixture
def site(tmp_path: Path, make_model: Models) -> Iterator[Site]:
    opened = Site(tmp_path, make_model(kind="three-classes", nullable=("vibration",)), make_model(name="fan"))
    yield opened
    opened.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_what_is_asked_over_a_broker_is_answered_to_the_bit_as_elsewhere(site: Site, connect: Any) -> None:
    rows, model = training_rows(2_000), site.plane.get("pump")
    expected = model.predict(rows)
    assert expected.labels is not None
    with connect(site.address, model="pump") as client:
        answer = client.predict(rows, id="seven")
        records = client.predict([dict(zip(FEATURES, map(float, row), strict=True)) for row in rows[:3]])

    assert (answer.id, answer.version, answer.digest) == ("seven", 1, model.digest)
    assert answer.labels == tuple(model.outputs.labels[i] for i in expected.labels)
    assert np.array_equal(answer.scores, expected.scores)  # type: ignore[arg-type]
    assert np.array_equal(records.scores, model.predict(rows[:3]).scores)


def test_a_label_finds_its_prediction_over_a_broker_too(site: Site, connect: Any) -> None:
    with connect(site.address, model="pump") as client:
        answer = client.predict({"temperature": 0, "current": 0, "speed": 0})
        assert client.feedback(answer.id, "worn")
        assert not client.feedback(answer.id, "worn")
        assert code(lambda: client.feedback("nobody", "worn")) == "serving.unknown-prediction"


def test_what_the_agent_refuses_keeps_its_code_and_is_counted(site: Site, connect: Any) -> None:
    with connect(site.address, model="pump") as client:
        assert code(lambda: client.predict([[1, 2, 3]])) == "serving.input"
        assert code(lambda: client.predict({"rpm": 900})) == "serving.input"
        assert code(lambda: client.predict(training_rows(20_000))) == "serving.too-large"
        assert client.predict([0, 0, 0, 0]).labels
    assert site.plane.errors() == {"serving.input": 2, "serving.too-large": 1}


def test_a_topic_asks_its_own_model_and_no_other(site: Site, connect: Any) -> None:
    with connect(site.address, model="pump") as client:
        inner = getattr(client, "_client", client)
        inner._model = "fan"  # what a program that builds its frames itself could say
        assert code(lambda: client.predict([0, 0, 0, 0])) == "serving.unknown-model"
        assert not client.ready()


def test_many_threads_and_tasks_get_their_own_answers(site: Site) -> None:
    rows = training_rows(60)
    expected = [site.plane.get("pump").predict(row.reshape(1, -1)).scores for row in rows]
    with Client(site.address, model="pump") as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.predict, rows))

    async def together() -> list[Answer]:
        async with AsyncClient(site.address, model="pump") as other:
            return list(await asyncio.gather(*(other.predict(row) for row in rows)))

    for found in (answers, asyncio.run(together())):
        assert all(np.array_equal(a.scores, e) for a, e in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_where_no_agent_listens_the_time_runs_out_and_what_comes_late_is_nobodys(site: Site, connect: Any) -> None:
    begun = time.monotonic()
    with connect(site.address, model="fan", timeout=0.5, retries=5) as client:  # no binding asks that model
        assert code(lambda: client.predict([0, 0, 0, 0])) == "link.slow"
        inner = getattr(client, "_client", client)
        assert not inner._transport._broker._waiting
    assert time.monotonic() - begun < 8  # not the ten seconds of the default


def test_a_broker_that_is_not_there_is_told(connect: Any) -> None:
    with connect(f"mqtt://127.0.0.1:{free_port('127.0.0.1')}", model="pump", timeout=0.5, retries=0) as client:
        assert code(lambda: client.predict([0, 0, 0, 0])) == "link.unreachable"
        assert not client.ready()


def test_a_broker_that_comes_back_is_found_again(site: Site, connect: Any) -> None:
    with connect(site.address, model="pump", timeout=10) as client:
        assert client.predict([0, 0, 0, 0]).version == 1
        site.broker.stop()
        site.broker = Broker(site.folder, site.port)
        ends = time.monotonic() + 120
        while not client.ready():  # the face, too, has to come back
            assert time.monotonic() < ends
        assert client.predict([0, 0, 0, 0]).version == 1


@pytest.mark.parametrize("address", ["mqtt://", "mqtt://:1883", "mqtt://host:port", "mqtt://host/path", "mqtt:host"])
def test_an_address_that_can_be_none_is_refused(address: str) -> None:
    assert code(partial(Client, address, model="pump")) == "link.unreachable"
    assert code(partial(AsyncClient, address, model="pump")) == "link.unreachable"


def test_over_a_broker_the_model_must_be_named() -> None:
    assert code(partial(Client, "mqtt://127.0.0.1:1883")) == "serving.unknown-model"
