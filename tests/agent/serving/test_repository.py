"""The model repository extension, over real HTTP: what is listed, what may be loaded, and what may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.agent.conftest import build, training_rows

from lightship_agent.contract.bundle import Bundle, read_bundle
from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.repository import Repository, Shelved
from lightship_agent.serving.residents import Residents
from lightship_agent.serving.server import HttpServer


class Device:
    """A shelf of bundles, and a server in front of it."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.plane = DataPlane(lambda *_: None)
        self.available: int | None = None
        self.residents = Residents(self.plane, available=lambda: self.available)
        self.shelf: list[Shelved] = []
        self.bundles: dict[str, bytes] = {}
        repository = Repository(self.plane, self.residents, shelf=lambda: self.shelf, read=self.read, is_open=is_open)
        self.server = HttpServer(create_app(self.plane, status=dict, metrics=str, repository=repository), port=0)
        self.server.start()
        self.client = httpx.Client(base_url="http://{}:{}".format(*(self.server.address or ())), timeout=30)

    def put(self, version: int, *, barred: str = "", name: str = "pump", serve: bool = False) -> str:
        data = build(version, name=name)
        digest = sha256_hex(data)
        self.bundles[digest] = data
        self.shelf.append(Shelved(name, version, digest, barred))
        if serve:
            self.residents.serve(read_bundle(data))
        return digest

    def read(self, digest: str) -> Bundle:
        if sha256_hex(self.bundles[digest]) != digest:
            raise StorageError("storage.corrupt", "altered")
        return read_bundle(self.bundles[digest])

    def post(self, act: str, name: str = "pump", **body: Any) -> tuple[int, str]:
        said = self.client.post(f"/v2/repository/models/{name}/{act}", json=body)
        return said.status_code, said.json()["code"] if said.content else ""

    def index(self, **body: Any) -> list[tuple[str, str, str]]:
        rows = self.client.post("/v2/repository/index", json=body).json()
        assert all(row["name"] == "pump" for row in rows)
        return [(row["version"], row["state"], row["reason"]) for row in rows]

    def infer(self, version: int) -> int:
        tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": training_rows(1)[0].tolist()}
        path = f"/v2/models/pump/versions/{version}/infer"
        return self.client.post(path, json={"inputs": [tensor]}).status_code


@pytest.fixture
def make_device() -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(**settings: Any) -> Device:
        made.append(Device(**settings))
        return made[-1]

    yield make
    for device in made:
        device.client.close()
        device.server.stop()


@pytest.fixture
def device(make_device: Callable[..., Device]) -> Device:
    """Version 3 serves; 2 waits on disk; 1 failed here."""
    device = make_device()
    device.put(3, serve=True)
    device.put(2)
    device.put(1, barred="it failed on this device")
    return device


BEFORE = [
    ("3", "READY", ""),
    ("2", "UNAVAILABLE", "on disk, not in memory"),
    ("1", "UNAVAILABLE", "it failed on this device"),
]


def test_the_index_says_what_is_here_and_why_it_does_not_answer(device: Device) -> None:
    assert device.index() == BEFORE
    assert device.index(ready=True) == BEFORE[:1]


def test_a_version_that_is_loaded_answers_by_its_number_until_it_is_unloaded(device: Device) -> None:
    assert device.infer(2) == 404
    assert device.post("load", parameters={"version": "2"}) == (200, "")
    assert device.infer(2) == 200
    assert device.plane.get("pump").version == 3
    assert device.index()[1] == ("2", "READY", "answers by version")
    assert device.post("load", parameters={"version": 2}) == (200, "")  # it is there already

    assert device.post("unload", parameters={"version": "2", "unload_dependents": False}) == (200, "")

    assert device.infer(2) == 404
    assert device.index() == BEFORE


def test_without_a_version_the_current_one_is_loaded_already_and_the_others_are_unloaded(device: Device) -> None:
    assert device.post("load") == (200, "")
    assert device.index() == BEFORE
    device.post("load", parameters={"version": "2"})
    assert device.post("unload") == (200, "")
    assert device.index() == BEFORE


def test_what_serves_is_not_unloaded(device: Device) -> None:
    assert device.post("unload") == (409, "serving.in-use")
    assert device.post("unload", parameters={"version": "3"}) == (409, "serving.in-use")
    assert device.infer(3) == 200


def test_what_is_barred_is_not_loaded_whoever_asks(device: Device) -> None:
    assert device.post("load", parameters={"version": "1"}) == (403, "serving.not-allowed")
    assert device.infer(1) == 404
    assert device.index() == BEFORE


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"version": "2", "config": '{"platform": "onnxruntime_onnx"}'}, 400),
        ({"version": "2", "file:1/model.onnx": "AAAA"}, 400),
        ({"version": "2", "path": "/etc/passwd"}, 400),
        ({"version": ["2"]}, 400),
        ({"version": "../2"}, 404),
        ({"version": "02"}, 404),
        ({"version": ""}, 404),
    ],
)
def test_a_client_names_a_version_and_nothing_else(device: Device, parameters: dict[str, Any], status: int) -> None:
    said, code = device.post("load", parameters=parameters)
    assert (said, code) == (status, {400: "serving.malformed", 404: "serving.unknown-model"}[status])
    assert device.index() == BEFORE
    assert device.plane.errors() == {code: 1}


def test_unknown_models_and_noise_are_refused(device: Device) -> None:
    assert device.post("load", "fan") == (404, "serving.unknown-model")
    assert device.post("unload", "fan") == (404, "serving.unknown-model")
    assert device.post("unload", parameters={"version": "2"}) == (404, "serving.unknown-model")
    noise = device.client.post("/v2/repository/models/pump/load", content=b"\xff[")
    assert (noise.status_code, noise.json()["code"]) == (400, "serving.malformed")
    assert device.client.get("/v2/repository/models/pump/load").status_code == 405


def test_a_load_without_room_is_refused_and_what_serves_goes_on(device: Device) -> None:
    device.available = 1_000
    assert device.post("load", parameters={"version": "2"}) == (507, "serving.memory")
    assert device.infer(3) == 200
    assert device.index() == BEFORE


def test_what_was_altered_on_disk_is_not_loaded(device: Device) -> None:
    digest = device.shelf[1].digest
    device.bundles[digest] = device.bundles[digest][:-1] + b"x"
    assert device.post("load", parameters={"version": "2"}) == (500, "serving.runtime")
    assert device.index() == BEFORE


def test_nothing_is_loaded_or_unloaded_unless_the_device_allows_it(make_device: Callable[..., Device]) -> None:
    closed = make_device(is_open=False)
    closed.put(3, serve=True)
    closed.put(2)
    for act in ("load", "unload"):
        assert closed.post(act, parameters={"version": "2"}) == (403, "serving.not-allowed")
    assert closed.index() == BEFORE[:2]


def test_health_answers_while_a_model_is_being_loaded(device: Device, tmp_path: Path) -> None:
    import threading

    loading, go_on = threading.Event(), threading.Event()
    load = device.residents._load_model

    def slowly(bundle: Bundle) -> Any:
        loading.set()
        go_on.wait(60)
        return load(bundle)

    device.residents._load_model = slowly
    thread = threading.Thread(target=device.post, args=("load",), kwargs={"parameters": {"version": "2"}})
    thread.start()
    assert loading.wait(60)

    assert device.client.get("/v2/health/live").status_code == 200
    assert device.infer(3) == 200
    assert device.index()[0] == ("3", "READY", "")

    go_on.set()
    thread.join()
    assert device.infer(2) == 200
