"""Deadlines: what can't be answered in time is told so, is not run for nobody, and keeps its place till it ended."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from lightship_agent.client import Client
from lightship_agent.contract.codes import LightshipError
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving.connections import Limits
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
INFER = "/v2/models/pump/infer"
ROW = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [0.5] * 4}]}
RECORD = {"temperature": 0.5, "vibration": 0.5, "current": 0.5, "speed": 0.5}


class Site:
    """A model that computes until it is let go, and counts how often it began."""

    def __init__(self, address: tuple[str, int], plane: DataPlane) -> None:
        self.plane, self.address = plane, address
        self.url = "http://{}:{}".format(*address)
        self.begun = 0
        self.go = threading.Event()

    def compute(self, *_: Any) -> None:
        self.begun += 1
        assert self.go.wait(240)

    def later(self, **more: Any) -> tuple[threading.Thread, list[httpx.Response]]:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(httpx.post(self.url + INFER, json=ROW, **more)))
        thread.start()
        return thread, answers

    def occupy(self) -> list[tuple[threading.Thread, list[httpx.Response]]]:
        """Have both threads compute."""
        busy = [self.later(timeout=240) for _ in range(2)]
        until(lambda: self.begun == 2)
        return busy


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def code(reply: httpx.Response) -> tuple[int, str]:
    said = reply.json()
    assert set(said) == {"error", "code"}
    return reply.status_code, said["code"]


@contextmanager
def site_of(
    model: LoadedModel, *, seconds: float = 240.0, most: int = 64, limits: Limits | None = None
) -> Iterator[Site]:
    plane = DataPlane(lambda *_: None, max_in_flight=most)
    plane.install(model)
    server = HttpServer(create_app(plane, status=dict, metrics=str, seconds=seconds), port=0, limits=limits)
    server.start()
    assert server.address is not None
    site = Site(server.address, plane)
    try:
        yield site
    finally:
        site.go.set()
        server.stop()


@pytest.fixture
def slow(make_model: Models) -> Iterator[Site]:
    """A model that is asked in threads."""
    with site_of(msgspec.structs.replace(make_model(), row_ms=50.0)) as site:
        site.plane._observe = site.compute  # the data plane calls it within the request
        yield site


@pytest.fixture
def fast(make_model: Models) -> Iterator[Site]:
    with site_of(make_model()) as site:
        yield site


@pytest.mark.parametrize(("path", "body"), [(INFER, ROW), ("/v2/models/pump/predict", RECORD)])
def test_whoever_waits_hears_when_the_time_is_over(slow: Site, path: str, body: Any) -> None:
    begun = time.monotonic()

    reply = httpx.post(slow.url + path, json=body, headers={"Request-Timeout": "0.3"}, timeout=20)

    assert code(reply) == (504, "serving.deadline")
    assert 0.25 < time.monotonic() - begun < 15  # the work would go on for a minute
    assert slow.plane.errors() == {"serving.deadline": 1}


def test_what_waited_for_its_turn_until_its_time_was_over_is_not_run(slow: Site) -> None:
    busy = slow.occupy()

    late = httpx.post(slow.url + INFER, json=ROW, headers={"Request-Timeout": "0.2"}, timeout=20)
    slow.go.set()

    assert code(late) == (504, "serving.deadline")
    for thread, answers in busy:
        thread.join()
        assert answers[0].status_code == 200
    assert httpx.post(slow.url + INFER, json=ROW).status_code == 200
    assert slow.begun == 3
    assert slow.plane.errors() == {"serving.deadline": 1}


def test_what_is_asked_on_a_connection_that_broke_is_not_run(slow: Site) -> None:
    busy = slow.occupy()
    content = json.dumps(ROW).encode()
    with socket.create_connection(slow.address) as client:
        client.sendall(
            b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b"
            % (INFER.encode(), len(content), content)
        )
        until(lambda: slow.plane.admission._inside == 3)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
    until(lambda: slow.plane.admission._inside == 2)

    slow.go.set()
    for thread, _ in busy:
        thread.join()

    assert httpx.post(slow.url + INFER, json=ROW).status_code == 200
    assert slow.begun == 3


def test_a_place_is_kept_until_the_work_has_ended_whoever_stopped_waiting(make_model: Models) -> None:
    with site_of(msgspec.structs.replace(make_model(), row_ms=50.0), most=1) as site:
        site.plane._observe = site.compute
        late = httpx.post(site.url + INFER, json=ROW, headers={"Request-Timeout": "0.2"}, timeout=20)
        refused = httpx.post(site.url + INFER, json=ROW)
        site.go.set()
        until(lambda: site.plane.admission._inside == 0)

        assert code(late) == (504, "serving.deadline")
        assert code(refused) == (503, "serving.overloaded")
        assert refused.headers["retry-after"] == "1"
        assert httpx.post(site.url + INFER, json=ROW).status_code == 200


def test_without_a_word_the_setting_holds(make_model: Models) -> None:
    with site_of(msgspec.structs.replace(make_model(), row_ms=50.0), seconds=0.2) as site:
        site.plane._observe = site.compute
        assert code(httpx.post(site.url + INFER, json=ROW, timeout=20)) == (504, "serving.deadline")
        thread, answers = site.later(headers={"Request-Timeout": "15"}, timeout=20)
        time.sleep(0.5)
        site.go.set()
        thread.join()
        assert answers[0].status_code == 200


def test_tritons_parameter_is_in_microseconds_and_nothing_at_zero(slow: Site) -> None:
    busy = slow.occupy()
    thread, late = threading.Thread(), []

    def ask(timeout: int) -> None:
        late.append(httpx.post(slow.url + INFER, json={**ROW, "parameters": {"timeout": timeout}}, timeout=20))

    asking = [threading.Thread(target=ask, args=(t,)) for t in (1_000, 0)]
    for thread in asking:
        thread.start()
    until(lambda: slow.plane.admission._inside == 4)
    time.sleep(0.1)  # a millisecond is over
    slow.go.set()
    for thread in (*asking, *(t for t, _ in busy)):
        thread.join()

    assert sorted(reply.status_code for reply in late) == [200, 504]
    assert slow.begun == 3


@pytest.mark.parametrize("said", ["", "soon", "-1", "nan", "inf", "1e9"])
@pytest.mark.parametrize("path", [INFER, "/v2/models/pump/predict"])
def test_a_time_that_is_none_is_refused(fast: Site, said: str, path: str) -> None:
    body = ROW if path == INFER else RECORD
    assert code(httpx.post(fast.url + path, json=body, headers={"Request-Timeout": said})) == (400, "serving.malformed")


@pytest.mark.parametrize("said", [-1, 1.5, "1", True, [1]])
def test_a_parameter_that_is_no_time_is_refused(fast: Site, said: Any) -> None:
    reply = httpx.post(fast.url + INFER, json={**ROW, "parameters": {"timeout": said}})
    assert code(reply) == (400, "serving.malformed")


def test_a_request_that_has_no_time_left_when_it_comes_is_not_run(fast: Site) -> None:
    reply = httpx.post(fast.url + INFER, json=ROW, headers={"Request-Timeout": "0"})

    assert code(reply) == (504, "serving.deadline")
    assert fast.plane.stats()[0].requests == 0


def test_with_time_enough_the_answer_is_the_same_to_the_byte(fast: Site) -> None:
    asked = {**ROW, "id": "a"}
    with httpx.Client(base_url=fast.url) as client:
        plain = client.post(INFER, json=asked).content
        assert client.post(INFER, json=asked, headers={"Request-Timeout": "5"}).content == plain
        assert client.post(INFER, json={**asked, "parameters": {"timeout": 10**30}}).content == plain


def test_what_is_pipelined_behind_heavy_work_and_comes_too_late_is_not_run(slow: Site, make_model: Models) -> None:
    slow.plane.install(make_model(name="valve"))  # a fast one
    content = json.dumps(ROW).encode()

    def asking(model: str, *fields: str) -> bytes:
        head = [
            f"POST /v2/models/{model}/infer HTTP/1.1",
            "host: localhost",
            f"content-length: {len(content)}",
            *fields,
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + content

    with socket.create_connection(slow.address, timeout=20) as client:
        client.sendall(asking("pump") + asking("valve", "request-timeout: 0.5") + asking("valve"))
        until(lambda: slow.begun == 1)
        time.sleep(1.2)
        slow.plane._observe = lambda *_: None
        slow.go.set()
        read = client.makefile("rb")
        statuses = []
        for _ in range(3):
            statuses.append(int(read.readline().split()[1]))
            length = 0
            while (line := read.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"content-length") else length
            read.read(length)

    assert statuses == [200, 504, 200]
    assert {s.model.name: s.requests for s in slow.plane.stats()} == {"pump": 1, "valve": 1}


def test_bodies_that_wait_for_a_thread_count_as_memory_in_use(make_model: Models) -> None:
    limits = Limits(buffered_bytes=3_000_000)
    with site_of(msgspec.structs.replace(make_model(), row_ms=50.0), limits=limits) as site:
        site.plane._observe = site.compute
        large = {**ROW, "inputs": [{**ROW["inputs"][0], "data": [0.5] * 4}], "parameters": {"x": "a" * 900_000}}
        threads = []
        replies: list[int] = []
        for _ in range(3):
            thread = threading.Thread(
                target=lambda: replies.append(httpx.post(site.url + INFER, json=large, timeout=240).status_code)
            )
            thread.start()
            threads.append(thread)
        until(lambda: site.begun == 2)
        until(lambda: site.plane.admission._inside == 3)

        assert code(httpx.post(site.url + INFER, json=large)) == (503, "serving.overloaded")
        assert httpx.get(site.url + "/v2/health/live").status_code == 200
        site.go.set()
        for thread in threads:
            thread.join()
        assert replies == [200] * 3
        assert httpx.post(site.url + INFER, json=large).status_code == 200


def test_of_bodies_that_are_large_only_when_inflated_few_are_inflated_at_once(slow: Site) -> None:
    body = gzip.compress(json.dumps({**ROW, "parameters": {"x": "a" * 10_000_000}}).encode())
    busy = slow.occupy()
    before = _resident_mb()
    replies: list[int] = []

    def ask() -> None:
        coded = {"Content-Encoding": "gzip"}
        replies.append(httpx.post(slow.url + INFER, content=body, headers=coded, timeout=240).status_code)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    until(lambda: slow.plane.admission._inside == 42, 200)
    grown = _resident_mb() - before
    slow.go.set()
    for thread in (*threads, *(t for t, _ in busy)):
        thread.join()

    assert replies == [200] * 40
    assert grown < 200, "40 of them would be 400 MB"


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_the_client_library_tells_the_agent_how_long_it_waits(slow: Site) -> None:
    busy = slow.occupy()
    with Client(slow.url, model="pump", timeout=0.5, retries=0) as agent, pytest.raises(LightshipError) as refused:
        agent.predict([[0.5] * 4])
    time.sleep(0.6)  # the agent's half second begins when the request comes, and so may end after the client's
    slow.go.set()
    for thread, _ in busy:
        thread.join()

    assert refused.value.code in {"serving.deadline", "link.slow"}
    assert slow.begun == 2
