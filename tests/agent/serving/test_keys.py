"""The same key by every face: the arm it falls to answers, whichever way it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.agent.conftest import FEATURES, training_rows

from lightship_agent.client import Client
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.experiment import point_of
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.frames import FrameFace
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer
from lightship_agent.serving.split import Arm, Split

KEYS = [f"machine-{i}" for i in range(40)]
RECORD = dict(zip(FEATURES, training_rows()[0].tolist(), strict=True))
#: What falls to version 2.
EXPECTED = {key: 2 if point_of("e1", key) < 0.5 else 1 for key in KEYS}


class Faces:
    """HTTP and frames over one data plane."""

    def __init__(self, http: str, frames: Path) -> None:
        self.http, self.frames = http, frames


@pytest.fixture
def faces(make_model: Callable[..., LoadedModel], tmp_path: Path) -> Iterator[Faces]:
    plane = DataPlane(lambda *_: None, observe_row=lambda *_: None)
    plane.install(make_model(1))
    plane.keep(make_model(2), watched=True)
    plane.divide("pump", Split((Arm("e1", 2, 0.5),)))
    app = create_app(plane, status=dict, metrics=str)
    server = HttpServer(app, port=0, frames=FrameFace(plane), frames_socket=tmp_path / "frames.sock")
    server.start()
    try:
        yield Faces("http://{}:{}".format(*(server.address or ())), tmp_path / "frames.sock")
    finally:
        server.stop()


def test_both_arms_are_meant() -> None:
    assert set(EXPECTED.values()) == {1, 2}


@pytest.mark.parametrize("rows", [training_rows()[0], training_rows()[:200], RECORD], ids=["json", "binary", "records"])
@pytest.mark.parametrize("kind", ["http", "frames"])
def test_a_key_from_the_client_library_has_its_arm(faces: Faces, kind: str, rows: object) -> None:
    with Client(faces.http if kind == "http" else f"frames:{faces.frames}", model="pump") as client:
        found = {key: client.predict(rows, key=key).version for key in KEYS}
        unkeyed = client.predict(rows).version

    assert {key: int(version) for key, version in found.items()} == EXPECTED
    assert int(unkeyed) == 1


def test_a_number_is_a_key_and_anything_else_is_refused(faces: Faces) -> None:
    row = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": training_rows()[0].tolist()}
    with httpx.Client(base_url=faces.http) as client:

        def ask(key: object) -> httpx.Response:
            return client.post("/v2/models/pump/infer", json={"inputs": [row], "parameters": {"key": key}})

        assert ask(12).json()["model_version"] == ask("12").json()["model_version"]
        for key in (True, 1.5, ["a"], {"a": 1}):
            refused = ask(key)
            assert (refused.status_code, refused.json()["code"]) == (400, "serving.malformed")
        assert ask("k" * 257).status_code == 400
        assert ask("ok").status_code == 200


def test_a_key_without_end_is_refused_over_frames_too(faces: Faces) -> None:
    with Client(f"frames:{faces.frames}", model="pump") as client, pytest.raises(ServingError) as refused:
        client.predict(training_rows()[0], key="k" * 257)

    assert refused.value.code == "serving.malformed"
