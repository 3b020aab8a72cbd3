"""The client library on a real server, every way it can speak, with and without asyncio; and where no agent answers."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.agent.conftest import FEATURES, training_rows
from tests.agent.worded import worded_bundle

from lightship_agent.client import Answer, AsyncClient, Client
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import LightshipError
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.frames import FrameFace
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
#: httpx's transport forgets to close the Unix socket that it could not connect.
unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
WAYS = ("http", "unix", "frames")


class Served:
    """An agent's faces on one data plane."""

    def __init__(self, folder: Path, *models: LoadedModel) -> None:
        monitor = Monitor(64)
        self.plane = DataPlane(monitor.observe, observe_row=monitor.observe_row, feedback=monitor.feedback)
        for model in models:
            self.plane.install(model)
        app = create_app(self.plane, status=dict, metrics=str)
        self.server = HttpServer(
            app, port=0, unix_socket=folder / "h.sock", frames=FrameFace(self.plane), frames_socket=folder / "f.sock"
        )
        self.server.start()
        self.addresses = {
            "http": "http://{}:{}".format(*(self.server.address or ())),
            "unix": f"unix:{folder / 'h.sock'}",
            "frames": f"frames:{folder / 'f.sock'}",
        }


class Awaited:
    """An AsyncClient that is asked like a Client."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **more)

    def __getattr__(self, name: str) -> Any:
        return lambda *a, **k: self._runner.run(self._coroutine(name, a, k))

    async def _coroutine(self, name: str, a: Any, k: Any) -> Any:
        return await getattr(self._client, name)(*a, **k)

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(make_model: Models, tmp_path: Path) -> Iterator[Served]:
    opened = Served(tmp_path, make_model(kind="three-classes", nullable=("vibration",)))
    yield opened
    opened.server.stop()


def code(action: Callable[[], object]) -> str:
    with pytest.raises(LightshipError) as found:
        action()
    return found.value.code


def test_numbers_and_records_are_answered_the_same_whichever_way_they_go(
    served: Served, connect: Any, way: str
) -> None:
    rows, model = training_rows(3), served.plane.get()
    expected = model.predict(rows)
    records = [dict(zip(FEATURES, row, strict=True)) for row in rows]
    assert expected.labels is not None
    with connect(served.addresses[way]) as client:
        for asked in (rows, rows.tolist(), records):
            answer = client.predict(asked, id="seven")
            assert isinstance(answer, Answer)
            assert (answer.id, answer.version, answer.digest) == ("seven", 1, model.digest)
            assert answer.labels == tuple(model.outputs.labels[i] for i in expected.labels)
            assert np.array_equal(answer.scores, expected.scores)  # type: ignore[arg-type]
            assert answer.values is None
        one = model.predict(rows[:1])
        for single in (rows[0], records[0]):
            assert np.array_equal(client.predict(single).scores, one.scores)


def test_many_rows_go_as_binary_tensors_and_come_back_as_such(served: Served, connect: Any, way: str) -> None:
    rows = training_rows(2_000)
    expected = served.plane.get().predict(rows)
    with connect(served.addresses[way]) as client:
        answer = client.predict(rows)

    assert len(answer.labels) == 2_000
    assert np.array_equal(answer.scores, expected.scores)  # type: ignore[arg-type]


def test_a_regressor_gives_values(make_model: Models, tmp_path: Path, way: str) -> None:
    served = Served(tmp_path, make_model(kind="regressor"))
    rows = training_rows(3)
    expected = served.plane.get().predict(rows).values
    assert expected is not None
    try:
        with Client(served.addresses[way]) as client:
            for asked in (rows, [dict(zip(FEATURES, map(float, row), strict=True)) for row in rows]):
                answer = client.predict(asked)
                assert answer.values is not None
                assert np.array_equal(answer.values, expected.ravel())
                assert (answer.labels, answer.scores) == ((), None)
    finally:
        served.server.stop()


def test_a_label_is_counted_once_and_a_missing_value_is_one(served: Served, connect: Any, way: str) -> None:
    with connect(served.addresses[way]) as client:
        assert client.ready()
        answer = client.predict([[0, math.nan, 0, 0]])
        assert client.feedback(answer.id, "worn")
        assert not client.feedback(answer.id, "worn")
        assert client.predict({"temperature": 0, "current": 0, "speed": 0}).labels == answer.labels


def test_what_the_agent_refuses_keeps_its_code(served: Served, connect: Any, way: str) -> None:
    with connect(served.addresses[way]) as client:
        assert code(lambda: client.predict([[1, 2, 3]])) == "serving.input"
        assert code(lambda: client.predict([math.inf, 0, 0, 0])) == "serving.input"
        assert code(lambda: client.predict({"rpm": 900})) == "serving.input"
        assert code(lambda: client.predict("text")) == "serving.input"
        assert code(lambda: client.predict([{"speed": object()}])) == "serving.input"
        assert code(lambda: client.feedback("nobody", "worn")) == "serving.unknown-prediction"
        assert client.predict([0, 0, 0, 0]).labels
    with connect(served.addresses[way], model="fan") as client:
        assert code(lambda: client.predict([0, 0, 0, 0])) == "serving.unknown-model"
        assert not client.ready()


def test_the_only_model_is_found_and_found_again_when_it_is_another(
    served: Served, make_model: Models, connect: Any, way: str
) -> None:
    row = training_rows(1)
    with connect(served.addresses[way]) as client:
        assert client.predict(row).version == 1
        served.plane.install(make_model(3, name="fan"))
        served.plane.remove("pump")
        if way != "frames":
            assert code(lambda: client.predict(row)) == "serving.unknown-model"
        assert client.predict(row).version == 3

        served.plane.install(make_model())
        with connect(served.addresses[way]) as other:
            assert code(lambda: other.predict(row)) == "serving.unknown-model"
        with connect(served.addresses[way], model="pump") as other:
            assert other.predict(row).version == 1


def test_a_call_waits_for_a_model_within_its_time(tmp_path: Path, make_model: Models, connect: Any) -> None:
    served = Served(tmp_path)
    try:
        with connect(served.addresses["frames"], retries=20) as client:
            assert not client.ready()
            timer = threading.Timer(0.3, served.plane.install, (make_model(),))
            timer.start()
            assert client.predict([0, 0, 0, 0]).version == 1
            timer.join()
    finally:
        served.server.stop()


@unclosed
def test_a_server_that_comes_back_is_found_again(make_model: Models, tmp_path: Path, connect: Any, way: str) -> None:
    served = Served(tmp_path, make_model())
    with connect(served.addresses[way], retries=0) as client:
        assert client.predict([0, 0, 0, 0]).version == 1
        port = (served.server.address or ("", 0))[1]
        served.server.stop()
        assert code(lambda: client.predict([0, 0, 0, 0])) == "link.unreachable"
        app = create_app(served.plane, status=dict, metrics=str)
        again = HttpServer(
            app,
            port=port,
            unix_socket=tmp_path / "h.sock",
            frames=FrameFace(served.plane),
            frames_socket=tmp_path / "f.sock",
        )
        again.start()
        try:
            assert client.predict([0, 0, 0, 0]).version == 1
        finally:
            again.stop()
    gc.collect()


class Impostor:
    """Something that listens, and says to each connection what it is told to."""

    def __init__(self, path: Path, says: list[bytes | None]) -> None:
        self.says, self.heard = says, 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # whoever gave up on us
                while _request(connection):
                    said = self.says[min(self.heard, len(self.says) - 1)]
                    self.heard += 1
                    if said is None:
                        self._over.wait(60)
                        break
                    connection.sendall(said)

    def close(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)


def _request(connection: socket.socket) -> bytes:
    """A whole request: HTTP comes in pieces."""
    heard = connection.recv(1 << 16)
    head, _, body = heard.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return heard


def http(status: str, body: Any, *headers: str) -> bytes:
    data = msgspec.json.encode(body)
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def framed(body: Any) -> bytes:
    data = msgspec.msgpack.encode(body)
    return struct.pack("<I", len(data)) + data


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[..., Impostor]]:
    opened: list[Impostor] = []

    def open_(*says: bytes | None) -> Impostor:
        opened.append(Impostor(tmp_path / "impostor.sock", list(says)))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


BUSY = {"code": "serving.overloaded", "error": "64 requests are being answered already."}
DONE = {"id": "i", "version": 1, "digest": "d", "labels": ["worn"], "classes": [1]}


def test_an_overloaded_agent_is_asked_again_after_the_time_it_says(
    tmp_path: Path, impostor: Callable[..., Impostor], connect: Any
) -> None:
    busy = http("503 Service Unavailable", BUSY, "retry-after: 1")
    described = http("200 OK", {"inputs": [{"name": "features"}]})
    there = impostor(described, busy, http("200 OK", {"counted": 1}))
    begun = time.monotonic()

    with connect(f"unix:{tmp_path / 'impostor.sock'}", model="pump", retries=1) as client:
        assert client.feedback("i", "worn")

    assert there.heard == 3
    assert time.monotonic() - begun >= 1


def test_frames_of_an_overloaded_agent_are_asked_again_and_only_so_often(
    tmp_path: Path, impostor: Callable[..., Impostor], connect: Any
) -> None:
    there = impostor(framed(BUSY), framed(BUSY), framed(DONE), framed(BUSY))
    with connect(f"frames:{tmp_path / 'impostor.sock'}", retries=2) as client:
        assert client.predict([0]).labels == ("worn",)
        assert there.heard == 3
        assert code(lambda: client.predict([0])) == "serving.overloaded"
        assert there.heard == 6


def test_whoever_does_not_answer_is_not_waited_for_beyond_the_time(
    tmp_path: Path, impostor: Callable[..., Impostor], connect: Any
) -> None:
    impostor(None)
    for address in (f"frames:{tmp_path / 'impostor.sock'}", f"unix:{tmp_path / 'impostor.sock'}"):
        begun = time.monotonic()
        with connect(address, model="pump", timeout=0.3, retries=5) as client:
            assert code(lambda: client.predict([0])) == "link.slow"
        assert time.monotonic() - begun < 15  # and the agent says nothing for a minute


def test_an_answer_that_came_late_is_never_taken_for_the_next_one(
    tmp_path: Path, make_model: Models, connect: Any
) -> None:
    served = Served(tmp_path, make_model())
    big, row = training_rows(60_000), training_rows(1)
    try:
        with connect(served.addresses["frames"], retries=0) as client:
            patient, client_ = client, getattr(client, "_client", client)
            client_._timeout = 0.0001
            assert code(lambda: patient.predict(big, id="late")) == "link.slow"
            client_._timeout = 20
            assert patient.predict(row, id="next").id == "next"
    finally:
        served.server.stop()


@pytest.mark.parametrize(
    "said",
    [
        b"\0" * 40,
        framed([1, 2]),
        framed(None),
        framed({"id": "i"}),
        framed({**DONE, "scores": b"123"}),
        http("200 OK", {"id": 1}),
        http("200 OK", [1]),
        http("200 OK", None),
        http("502 Bad Gateway", "a proxy's page"),
        http("200 OK", {"id": "i"}, "inference-header-content-length: 99999"),
    ],
    ids=lambda said: f"{said!r:.50}",
)
def test_an_answer_that_is_none_is_said_to_be_none(
    tmp_path: Path, impostor: Callable[..., Impostor], said: bytes, connect: Any
) -> None:
    impostor(said)
    kind = "unix" if said.startswith(b"HTTP") else "frames"
    with connect(f"{kind}:{tmp_path / 'impostor.sock'}", model="pump", timeout=3, retries=0) as client:
        assert code(lambda: client.predict([0])) == "link.status"
        assert not client.ready()


@unclosed
def test_nobody_there_and_nowhere_to_go_are_told(tmp_path: Path, connect: Any) -> None:
    for address in ("http://127.0.0.1:1", f"unix:{tmp_path / 'no'}", f"frames:{tmp_path / 'no'}"):
        with connect(address, retries=1) as client:
            assert code(lambda: client.predict([0])) == "link.unreachable"
            assert not client.ready()
    for address in ("", "127.0.0.1:8500", "ftp://x", "unix:", "frames:"):
        assert code(partial(Client, address)) == "link.unreachable"
    gc.collect()


def test_threads_and_tasks_share_one_client(served: Served, way: str) -> None:
    rows = training_rows(40)
    expected = [served.plane.get().predict(row.reshape(1, -1)).scores for row in rows]
    with Client(served.addresses[way]) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.predict, rows))
    assert all(np.array_equal(a.scores, e) for a, e in zip(answers, expected, strict=True))  # type: ignore[arg-type]

    async def together() -> list[Answer]:
        async with AsyncClient(served.addresses[way]) as other:
            return list(await asyncio.gather(*(other.predict(row) for row in rows)))

    answers = asyncio.run(together())
    assert all(np.array_equal(a.scores, e) for a, e in zip(answers, expected, strict=True))  # type: ignore[arg-type]


def test_frames_need_no_httpx_and_nothing_needs_the_runtime() -> None:
    program = (
        "import sys; from lightship_agent.client import Client; Client('frames:/x').close();"
        "print(sorted({'httpx', 'onnxruntime', 'asyncio', 'tuf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("way", ["http", "frames"])
def test_words_go_as_they_are_over_http_and_in_frames(tmp_path: Path, way: str) -> None:
    plane = DataPlane(lambda *_: None)
    plane.install(load_model(read_bundle(worded_bundle())))
    frames = tmp_path / "frames.sock"
    app = create_app(plane, status=dict, metrics=str)
    server = HttpServer(app, port=0, frames=FrameFace(plane), frames_socket=frames)
    server.start()
    try:
        address = f"frames:{frames}" if way == "frames" else "http://{}:{}".format(*(server.address or ()))
        with Client(address) as agent:
            record = {"temperature": 0.5, "material": " iron", "current": 2.0, "gear": "1"}
            assert agent.predict(record).labels[0] in {"healthy", "worn"}
            with pytest.raises(LightshipError) as caught:
                agent.predict({**record, "material": "wood"})
            assert caught.value.code == "serving.input"
    finally:
        server.stop()
