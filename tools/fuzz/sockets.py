"""Fuzz: the raw face of HTTP/1.1, over a real socket to a real server.

Rules:
* whatever is sent, what comes back is whole HTTP/1.1 answers, refusals in the protocol's error shape, and an end;
* nothing that a client sends is an error of the server's: no status but the declared ones;
* the server serves on: now and then somebody asks properly, and the memory in use stays bounded.
"""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import ServingError
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.connections import Limits
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import STATUS, create_app
from lightship_agent.serving.server import HttpServer

from . import worlds

_LIMITS: Final = Limits(
    body_bytes=200_000, head_seconds=2, body_seconds=2, idle_seconds=2, write_seconds=2, linger_seconds=0.5
)
_PATIENCE: Final = 10.0  # s
_GROWTH_MB: Final = 150
_EVERY: Final = 50  # inputs, and somebody asks properly
_FAULTS: Final = {500}


def _seeds(body: bytes) -> list[bytes]:
    """Requests that are answered, and shapes of those that must not be."""
    line, host, size = b"POST /v2/models/pump/infer HTTP/1.1\r\n", b"host: localhost\r\n", b"%d" % len(body)
    plain = line + host + b"content-length: " + size + b"\r\n\r\n" + body
    chunks = b"%x\r\n%b\r\n%x;why=not\r\n%b\r\n0\r\ntrailer: yes\r\n\r\n" % (7, body[:7], len(body) - 7, body[7:])
    chunked = line + host + b"transfer-encoding: chunked\r\n\r\n" + chunks
    get = b"GET /v2 HTTP/1.1\r\n" + host
    return [
        plain,
        plain * 3,
        chunked,
        chunked + get + b"\r\n",
        plain[: len(plain) // 2],
        chunked[: len(chunked) - 9],
        line + host + b"content-length: " + size + b"\r\ntransfer-encoding: chunked\r\n\r\n" + chunks,  # CL and TE
        line + host + b"content-length: 3\r\ncontent-length: 300\r\n\r\n" + body,
        line + host + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n" + chunks,
        line + host + b"transfer-encoding : chunked\r\n\r\n" + chunks,
        line + host + b"content-length: +3\r\n\r\n" + body,
        line + host + b"transfer-encoding: chunked\r\n\r\n-1\r\n" + body,
        line + host + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
        plain.replace(b"\r\n", b"\n"),
        plain.replace(b"\r\n", b"\r"),
        get + b"x: folded\r\n  further\r\n\r\n",
        get + b"x: \x00\r\n\r\n",
        b"GET http://localhost/v2 HTTP/1.1\r\n" + host + b"\r\n",
        b"GET http://evil.example:99999/v2?%00#x HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        b"CONNECT localhost:443 HTTP/1.1\r\n" + host + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + host + b"\r\n",
        get + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x05hello",
        get + b"connection: keep-alive, close, keep-alive\r\n\r\n" + get + b"\r\n",
        line + host + b"expect: 100-continue\r\ncontent-length: " + size + b"\r\n\r\n" + body,
        line + host + b"expect: 200-maybe\r\ncontent-length: " + size + b"\r\n\r\n" + body,
        line + host + b"content-encoding: gzip\r\ncontent-length: " + size + b"\r\n\r\n" + body,
        get + b"".join(b"x-%d: y\r\n" % i for i in range(98)) + b"\r\n",
        get + b"x: " + b"a" * 31_000 + b"\r\n\r\n",
        get + b"host: other\r\n\r\n",
        b"GET /v2 HTTP/1.0\r\n\r\n" + get + b"\r\n",
        b"GET /v2 HTTP/9.9\r\n" + host + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n\r\n" + get + b"\r\n",
        b"HEAD /v2/health/live HTTP/1.1\r\n" + host + b"\r\n" + get + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + body,
    ]


@contextmanager
def connections() -> Iterator[tuple[list[bytes], Callable[[bytes], object]]]:
    """A server on loopback, and what sends it bytes."""
    plane = DataPlane(lambda *_: None)
    plane.install(load_model(read_bundle(worlds.bundle(1))))
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=0, limits=_LIMITS)
    server.start()
    assert server.address is not None
    where = server.address
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4}
    body = json.dumps({"inputs": [tensor]}).encode()
    seeds = _seeds(body)
    sent, at_first = 0, _resident_mb()

    def run(data: bytes) -> None:
        nonlocal sent
        sent += 1
        if sent % _EVERY == 0:
            assert _answers(_exchange(where, seeds[0]))[0][0] == 200, "it serves no more"
            assert _resident_mb() - at_first < _GROWTH_MB, "it takes more and more memory"
        refused = [code for status, code in _answers(_exchange(where, data)) if code and status >= 400]
        if refused:
            raise ServingError(refused[0], "refused")

    def valid(data: bytes) -> None:
        with suppress(ServingError):
            run(data)

    # Shapes that must be refused are seeds too: a seed need not be accepted here.
    yield seeds, lambda data: valid(data) if data in seeds else run(data)
    server.stop()


def _exchange(where: tuple[str, int], data: bytes) -> bytes:
    """What comes back, to its end; sent in two pieces, wherever that may cut."""
    cut = zlib.crc32(data) % (len(data) + 1)
    got = bytearray()
    with socket.create_connection(where, timeout=_PATIENCE) as client, suppress(ConnectionError):
        with suppress(OSError):  # it may have ended before all was said
            client.sendall(data[:cut])
            client.sendall(data[cut:])
            client.shutdown(socket.SHUT_WR)
        while part := client.recv(65_536):
            got += part
    return bytes(got)


def _answers(got: bytes) -> list[tuple[int, str]]:
    """Status and code of each answer."""
    found = []
    while got:
        head, end, rest = got.partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert end, "a head that does not end"
        assert version == "HTTP/1.1", version
        if status == "100":
            got = rest
            continue
        fields = dict(line.split(": ", 1) for line in lines[1:])
        length = int(fields["content-length"])
        body, got = rest[:length], rest[length:]
        assert len(body) == length, "a body that is cut"
        code = ""
        if int(status) >= 400 and body:
            said = json.loads(body)
            assert set(said) == {"error", "code"}, "another error shape"
            code = said["code"]
            assert STATUS[code] == int(status), f"{code} with {status}"
        assert int(status) not in _FAULTS, body.decode("utf-8", "replace")
        found.append((int(status), code))
    return found


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
