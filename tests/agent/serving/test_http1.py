"""Connections: real sockets, clients of every kind, and what each of them may take."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.agent.runtime.graphs import regressor_bundle, wading

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.manifest import Requires
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.serving.connections import Limits
from lightship_agent.serving.dataplane import HOT_ROW_MS, DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.oip import MAX_BODY
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
INFER = "/v2/models/pump/infer"
QUICK = Limits(head_seconds=0.5, body_seconds=0.5, idle_seconds=0.5, write_seconds=0.5, linger_seconds=0.5)


def tensor(*data: float) -> dict[str, Any]:
    return {"name": "features", "datatype": "FP32", "shape": [1, len(data)], "data": list(data)}


def asking(content: bytes, path: str = INFER, *fields: str, method: str = "POST") -> bytes:
    head = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(content)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def infer(request_id: str = "a", *fields: str) -> bytes:
    return asking(json.dumps({"inputs": [tensor(0.5, 0.5, 0.5, 0.5)], "id": request_id}).encode(), INFER, *fields)


class Client:
    """A socket, and the answers that come out of it."""

    def __init__(self, server: HttpServer) -> None:
        assert server.address is not None
        self.socket = socket.create_connection(server.address, timeout=10)
        self.read = self.socket.makefile("rb")

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer; (0, {}, b"") where the connection was closed instead."""
        line = self.read.readline()
        if not line:
            return 0, {}, b""
        status, headers = int(line.split()[1]), {}
        while (field := self.read.readline().strip()) != b"":
            name, _, value = field.decode().partition(": ")
            headers[name] = value
        return status, headers, self.read.read(int(headers.get("content-length", "0")))

    def code(self) -> tuple[int, str]:
        """Status and code of an answer in the protocol's error shape."""
        status, headers, said = self.answer()
        assert headers["content-type"] == "application/json"
        error = json.loads(said)
        assert set(error) == {"error", "code"}
        return status, error["code"]

    def closed(self) -> bool:
        """Whether the server closed, within the client's patience."""
        try:
            return self.read.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.read.close()
        self.socket.close()


class Site:
    def __init__(self, server: HttpServer, plane: DataPlane) -> None:
        self.server, self.plane = server, plane
        self.clients: list[Client] = []

    def client(self) -> Client:
        self.clients.append(Client(self.server))
        return self.clients[-1]

    def well(self) -> bool:
        """Whether it still serves."""
        return self.client().send(infer("well")).answer()[0] == 200


@contextmanager
def site_of(model: LoadedModel, limits: Limits | None = None) -> Iterator[Site]:
    plane = DataPlane(lambda *_: None)
    plane.install(model)
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=0, limits=limits)
    server.start()
    site = Site(server, plane)
    try:
        yield site
    finally:
        for client in site.clients:
            client.close()
        server.stop()


@pytest.fixture(scope="module")
def site(make_model: Models) -> Iterator[Site]:
    with site_of(make_model()) as opened:
        yield opened


@pytest.fixture
def quick(make_model: Models) -> Iterator[Site]:
    with site_of(make_model(), QUICK) as opened:
        yield opened


# What clients may do --------------------------------------------------------------------------------------------------


def test_requests_on_one_connection_are_answered_one_after_the_other(site: Site) -> None:
    client = site.client()

    for n in range(5):
        assert json.loads(client.send(infer(f"r{n}")).answer()[2])["id"] == f"r{n}"


def test_what_is_pipelined_is_answered_in_order_whatever_way_each_goes(site: Site) -> None:
    client = site.client()
    slow = asking(b"", "/v2/health", method="GET")  # answered by a thread
    long_way = asking(json.dumps({"inputs": [tensor(1, 2, 3, 4)], "id": "c", "outputs": [{"name": "class"}]}).encode())

    client.send(infer("a") + slow + infer("b") + long_way + asking(b"", "/nowhere", method="GET") + infer("d"))

    ids = []
    for _ in range(6):
        status, _, said = client.answer()
        ids.append(json.loads(said).get("id", status))
    assert ids == ["a", 200, "b", "c", 404, "d"]


def test_a_hundred_pipelined_requests_are_answered(site: Site) -> None:
    client = site.client().send(b"".join(infer(f"r{n}") for n in range(100)))

    assert [json.loads(client.answer()[2])["id"] for _ in range(100)] == [f"r{n}" for n in range(100)]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 400), max_size=12))
def test_a_request_that_comes_in_pieces_is_the_same_request(site: Site, cuts: list[int]) -> None:
    client, data = site.client(), infer("pieces")
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    at = 0
    for cut in [*sorted(set(cuts)), len(data)]:
        client.send(data[at:cut])
        at = max(at, min(cut, len(data)))
    assert json.loads(client.answer()[2])["id"] == "pieces"
    client.close()
    site.clients.remove(client)


def test_a_chunked_body_is_a_body(site: Site) -> None:
    content = json.dumps({"inputs": [tensor(0.5, 0.5, 0.5, 0.5)], "id": "chunks"}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:7], content[7:40], content[40:]))

    client = site.client().send(head + chunks + b"0\r\nx-trailer: ignored\r\n\r\n" + infer("next"))

    assert [json.loads(client.answer()[2])["id"] for _ in range(2)] == ["chunks", "next"]


def test_who_asks_whether_to_go_on_is_told(site: Site) -> None:
    request = infer("a", "expect: 100-continue")
    head, _, content = request.partition(b"\r\n\r\n")
    client = site.client().send(head + b"\r\n\r\n")

    assert client.read.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert client.read.readline() == b"\r\n"
    assert client.send(content).answer()[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_what_it_was(site: Site, encoding: str) -> None:
    plain = json.dumps({"inputs": [tensor(0.5, 0.5, 0.5, 0.5)], "id": "a"}).encode()
    packed = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    client = site.client()

    told = client.send(asking(packed, INFER, f"content-encoding: {encoding}")).answer()

    assert told[0] == 200
    assert told[2] == client.send(asking(plain)).answer()[2]


def test_a_client_that_says_close_is_answered_and_closed(site: Site) -> None:
    client = site.client().send(infer("a", "connection: close"))

    status, headers, _ = client.answer()

    assert (status, headers["connection"]) == (200, "close")
    assert client.closed()


@pytest.mark.parametrize("field", ["", "connection: keep-alive\r\n"])
def test_http_1_0_is_answered_and_closed(site: Site, field: str) -> None:
    client = site.client().send(f"GET /v2/health/live HTTP/1.0\r\n{field}\r\n".encode())

    assert client.answer()[0] == 200
    assert client.closed()


def test_a_client_that_has_said_all_is_still_answered(site: Site) -> None:
    client = site.client().send(infer("a") + asking(b"", "/v2/health", method="GET"))
    client.socket.shutdown(socket.SHUT_WR)

    assert [client.answer()[0] for _ in range(2)] == [200, 200]
    assert client.closed()


def test_an_upgrade_is_not_taken_up_and_the_request_is_answered(site: Site) -> None:
    client = site.client().send(
        asking(b"", "/v2/health/live", "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", method="GET")
    )

    assert client.answer()[0] == 200
    assert client.closed()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v2/models/p%75mp/ready", 200),
        ("/v2/models/pump/ready?now=1", 200),
        ("http://agent/v2/models/pump/ready", 200),
        ("/v2/models/%ff/ready", 404),
        ("/v2/models/..%2fpump/ready", 404),
        ("*", 404),
    ],
)
def test_a_target_is_read_as_the_standard_says(site: Site, target: str, status: int) -> None:
    assert site.client().send(asking(b"", target, method="GET")).answer()[0] == status


def test_health_does_not_wait_behind_heavy_inference(make_model: Models) -> None:
    model = msgspec.structs.replace(make_model(), row_ms=50.0)  # whoever is slow is answered in a thread

    with site_of(model) as site:
        entered = threading.Barrier(3)
        left = threading.Event()

        def hold(*_: object) -> None:
            entered.wait(60)
            left.wait(60)

        site.plane._observe = hold
        busy = [site.client().send(infer("a")) for _ in range(2)]
        entered.wait(60)
        try:
            assert site.client().send(asking(b"", "/v2/health", method="GET")).answer()[0] == 200
        finally:
            left.set()
        assert [client.answer()[0] for client in busy] == [200, 200]


def test_health_and_a_small_model_answer_promptly_while_many_ask_a_slow_one(make_model: Models) -> None:
    bundle = read_bundle(regressor_bundle(wading(), Requires()))
    slow = msgspec.structs.replace(load_model(bundle), name="grinder")
    assert slow.row_ms > HOT_ROW_MS

    with site_of(make_model()) as site:
        site.plane.install(slow)
        # How long its own work takes depends on the machine; the data plane calls this within the request.
        site.plane._observe = lambda model, *_: time.sleep(0.25 if model.name == "grinder" else 0)
        assert b"grinder" not in site.plane.hot
        # Eight wait for the two threads that such models are asked in.
        busy = [site.client().send(infer("s").replace(b"/pump/", b"/grinder/") * 4) for _ in range(8)]
        quick, waits = site.client(), []
        for _ in range(20):
            for asked in (asking(b"", "/v2/health/live", method="GET"), infer("q")):
                begun = time.perf_counter()
                assert quick.send(asked).answer()[0] == 200
                waits.append(time.perf_counter() - begun)
        statuses = [client.answer()[0] for client in busy]

    assert statuses == [200] * 8
    # Behind the slow ones each would have waited for four answers.
    assert sorted(waits)[len(waits) * 3 // 4] < 0.25


# What they may not ----------------------------------------------------------------------------------------------------

GARBAGE = {
    "noise": b"\x00\xff\xfe\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a bad field": b"GET / HTTP/1.1\r\nhost agent\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "both": b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -3\r\n\r\n",
    "a bad chunk": b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nhost : agent\r\n\r\n",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_http_gets_the_protocols_error_and_is_closed(site: Site, data: bytes) -> None:
    before = site.plane.errors().get("serving.malformed", 0)
    client = site.client().send(data)

    assert client.code() == (400, "serving.malformed")

    assert client.closed()
    assert site.plane.errors()["serving.malformed"] == before + 1
    assert site.well()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300), cut=st.integers(0, 200))
def test_no_noise_stops_the_server(site: Site, noise: bytes, cut: int) -> None:
    client = site.client()
    client.send(infer("a")[:cut] + noise)
    client.close()
    site.clients.remove(client)

    assert site.well()


def test_what_was_asked_before_the_garbage_is_answered_first(site: Site) -> None:
    client = site.client().send(infer("a") + asking(b"", "/v2/health", method="GET") + b"\x00\x00\r\n\r\n")

    assert [client.answer()[0] for _ in range(2)] == [200, 200]
    assert client.code() == (400, "serving.malformed")
    assert client.closed()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\n" + b"x-many: 1\r\n" * 102,
        b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 40_000,
        b"GET /" + b"a" * 40_000,
        b"GET /v2 HTTP/1.1\r\n" + b"a" * 40_000,
    ],
    ids=["fields", "a-value", "a-path", "a-name"],
)
def test_a_head_that_is_too_large_is_refused_before_it_ends(site: Site, head: bytes) -> None:
    client = site.client().send(head)

    assert client.code() == (413, "serving.too-large")
    assert client.closed()
    assert site.well()


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(site: Site) -> None:
    client = site.client().send(
        f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {MAX_BODY + 1}\r\n\r\n".encode()
    )

    assert client.code() == (413, "serving.too-large")
    assert client.closed()


def test_a_chunked_body_without_an_end_is_refused_at_its_bound(make_model: Models) -> None:
    with site_of(make_model(), Limits(body_bytes=100_000)) as site:
        client = site.client().send(
            f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - it may take a while to be noticed
            for _ in range(200):
                client.send(b"fff0\r\n" + bytes(0xFFF0) + b"\r\n")
                time.sleep(0.02)
        assert site.plane.errors() == {"serving.too-large": 1}
        assert site.well()


def test_all_bodies_together_are_bounded(make_model: Models) -> None:
    with site_of(make_model(), Limits(buffered_bytes=100_000)) as site:
        waiting = [site.client() for _ in range(3)]
        for client in waiting[:2]:
            client.send(
                f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50000\r\n\r\n".encode() + bytes(45_000)
            )
        time.sleep(0.2)

        waiting[2].send(
            f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50000\r\n\r\n".encode() + bytes(45_000)
        )

        assert waiting[2].code() == (503, "serving.overloaded")
        # The two that were there before are not hurt, and what the third brought is forgotten.
        assert waiting[0].send(bytes(5_000)).code() == (400, "serving.malformed")
        assert site.well()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_inflated_to_its_bound_and_no_further(site: Site, encoding: str) -> None:
    bomb = bytes(200_000_000)
    packed = gzip.compress(bomb, 9) if encoding == "gzip" else zlib.compress(bomb, 9)

    told = site.client().send(asking(packed, INFER, f"content-encoding: {encoding}")).code()

    assert told == (413, "serving.too-large")
    assert site.well()


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("br", b"{}"),
        ("gzip", b"{}"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-3]),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more"),
        ("deflate", b""),
    ],
)
def test_a_body_that_is_not_compressed_as_it_says_is_refused(site: Site, encoding: str, content: bytes) -> None:
    client = site.client().send(asking(content, INFER, f"content-encoding: {encoding}"))

    assert client.code() == (400, "serving.malformed")
    assert client.send(infer("b")).answer()[0] == 200, "the connection goes on"


# Time, and how many ---------------------------------------------------------------------------------------------------


def test_a_head_that_drips_is_given_up(quick: Site) -> None:
    client = quick.client().send(b"GET /v2 HTTP/1.1\r\n")
    began = time.monotonic()
    while time.monotonic() - began < 8 and not client_has_answer(client):
        try:
            client.send(b"x: y\r\n")
        except OSError:
            break
        time.sleep(0.2)

    assert client.code() == (408, "serving.slow")
    assert client.closed()
    assert time.monotonic() - began < 6


def test_a_body_that_does_not_come_is_given_up(quick: Site) -> None:
    client = quick.client().send(f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{".encode())

    assert client.code() == (408, "serving.slow")
    assert client.closed()


def test_who_says_nothing_is_let_go_without_a_word(quick: Site) -> None:
    silent, served = quick.client(), quick.client().send(infer("a"))
    assert served.answer()[0] == 200

    assert silent.answer() == (0, {}, b"")
    assert served.answer() == (0, {}, b"")


def test_who_does_not_take_his_answers_is_cut_off_and_nobody_else_suffers(quick: Site) -> None:
    greedy = quick.client()
    greedy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    greedy.socket.settimeout(0.5)
    rows = json.dumps({"inputs": [{**tensor(*[0.5] * 4_000), "shape": [1_000, 4]}]}).encode()
    ended = False
    for _ in range(4_000):
        try:
            greedy.send(asking(rows))
        except OSError:  # a full pipe, or a reset
            ended = True
            break
    time.sleep(2.5)

    assert ended
    assert quick.well()


def test_one_client_too_many_hears_so_and_the_others_go_on(make_model: Models) -> None:
    with site_of(make_model(), Limits(connections=3, linger_seconds=0.2)) as site:
        there = [site.client().send(infer("a")) for _ in range(3)]
        assert [c.answer()[0] for c in there] == [200] * 3

        status, headers, said = site.client().answer()

        assert (status, json.loads(said)["code"]) == (503, "serving.overloaded")
        assert headers["retry-after"] == "1"
        assert [c.send(infer("b")).answer()[0] for c in there] == [200] * 3
        there[0].close()
        site.clients.remove(there[0])
        deadline = time.monotonic() + 10
        while site.client().send(infer("c")).answer()[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_stop_closes_who_is_silent_and_answers_who_asked(make_model: Models) -> None:
    with site_of(make_model()) as site:
        silent = site.client().send(infer("a"))
        assert silent.answer()[0] == 200
        began = time.monotonic()

        site.server.stop()

        assert silent.closed()
        assert time.monotonic() - began < 5


def client_has_answer(client: Client) -> bool:
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        client.socket.settimeout(10)
