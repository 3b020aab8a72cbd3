"""Crash test: a real control plane, its database, its TUF repository and its device API over mutual TLS.

Rules: one home for all rows; each device may be given faults of its own; what is counted is read from the database.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn

from lightship.api.device_api import DeviceApi
from lightship.api.tls_protocol import EXTENSION, PeerProtocol
from lightship.fleet import director, enrolment
from lightship.fleet.ca import server_names
from lightship.home import Home
from lightship.storage.models import DeviceEpoch, ModelVersion, UpdateStep
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.link.enrol import enrol
from lightship_agent.link.identity import Identity

from . import bundles

#: How long an answer stalls where nobody lifts the fault: longer than any row.
STALL_SECONDS = 300.0
Asgi = Callable[..., Awaitable[None]]


@dataclass
class Fault:
    """What happens to a device's requests to a path, and how often.

    status: that answer instead. lost: the request is carried out and its answer never arrives. cut: the answer ends
    after `at` bytes. stall: it stops after `at` bytes until the fault is lifted. wrong: its last byte is another.
    """

    device: str
    pattern: re.Pattern[str]
    kind: Literal["status", "lost", "cut", "stall", "wrong"]
    at: int = 0
    times: int = 1_000_000
    met: int = 0
    lifted: threading.Event = field(default_factory=threading.Event)


class Faults:
    """The device API, with faults before it."""

    def __init__(self, app: Asgi) -> None:
        self._app = app
        self.ordered: list[Fault] = []
        self.seen: list[tuple[str, str, str]] = []  # device, path, Range

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, or fail as ordered."""
        peer = scope.get("extensions", {}).get(EXTENSION)
        device = peer.name if peer else ""
        self.seen.append((device, scope["path"], dict(scope["headers"]).get(b"range", b"").decode()))
        fault = self._due(device, scope["path"])
        if fault is None:
            await self._app(scope, receive, send)
        elif fault.kind == "status":
            await send({"type": "http.response.start", "status": fault.at, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        elif fault.kind == "lost":
            await self._app(scope, receive, _swallow)
            await _break_off(send)
        else:
            await self._app(scope, receive, _spoiling(send, fault))

    def _due(self, device: str, path: str) -> Fault | None:
        for fault in self.ordered:
            due = fault.device == device and not fault.lifted.is_set() and fault.pattern.search(path)
            if due and fault.met < fault.times:
                fault.met += 1
                return fault
        return None


class BrokenOffError(Exception):
    """The connection is to be closed in the middle of an answer."""


async def _swallow(_message: Any) -> None:
    return


async def _break_off(send: Any) -> None:
    await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"9")]})
    raise BrokenOffError


def _spoiling(send: Any, fault: Fault) -> Callable[[Any], Awaitable[None]]:
    sent = 0

    async def spoiling(message: Any) -> None:
        nonlocal sent
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or (fault.kind != "wrong" and sent + len(body) <= fault.at):
            sent += len(body)
            await send(message)
            return
        if fault.kind == "wrong":
            last = not message.get("more_body", False) and body
            await send({**message, "body": body[:-1] + bytes([body[-1] ^ 1])} if last else message)
            return
        await send({**message, "body": body[: fault.at - sent], "more_body": True})
        if fault.kind == "stall":
            await asyncio.to_thread(fault.lifted.wait, STALL_SECONDS)
        raise BrokenOffError

    return spoiling


class Plane:
    """A control plane with bundles to assign."""

    def __init__(self, home: Home, url: str, faults: Faults) -> None:
        self.home = home
        self.url = url
        self.faults = faults
        self.versions: dict[int, ModelVersion] = {}
        self.data: dict[int, bytes] = {}

    def release(self, data: bytes, version: int) -> ModelVersion:
        """Sign and publish a bundle."""
        row = ModelVersion(
            model=bundles.NAME, version=version, run_id="run", state="released", digest=sha256_hex(data),
            length=len(data), metrics={}, created_at=0, released_at=0,
        )  # fmt: skip
        self.home.releases.publish(row.path, data)
        self.versions[version], self.data[version] = row, data
        return row

    def token(self, device: str) -> str:
        """A join token for one use."""
        with self.home.database.write() as session:
            return enrolment.create_token(
                session, self.home.ca, group="all", labels={}, device=device, uses=1, ttl_seconds=3_600,
                actor="crash-test",
            )  # fmt: skip

    def enrol(self, state: Path, device: str, url: str = "") -> Identity:
        """Give a state directory an identity, over HTTPS, with the agent's own code."""
        return enrol(state, server=url or self.url, token=self.token(device), device=device)

    def assign(self, device: str, version: int) -> int:
        """Have the director sign; the assignment's seq."""
        with self.home.database.write() as session:
            return director.assign(
                session, self.home.keys, device=device, version=self.versions[version], rollout="ro-1", actor="test"
            )

    def order(self, device: str, pattern: str, kind: Any, *, at: int = 0, times: int = 1_000_000) -> Fault:
        """Have a device's requests to matching paths fail."""
        fault = Fault(device, re.compile(pattern), kind, at, times)
        self.faults.ordered.append(fault)
        return fault

    def steps(self, device: str) -> list[tuple[str, str, str]]:
        """What the device reported, in its own order: digest, step, code."""
        with self.home.database.read() as session:
            query = session.query(UpdateStep, DeviceEpoch).outerjoin(
                DeviceEpoch, (DeviceEpoch.device == UpdateStep.device) & (DeviceEpoch.epoch == UpdateStep.epoch)
            )
            rows = query.filter(UpdateStep.device == device).order_by(UpdateStep.at, UpdateStep.s).all()
            return [(step.digest, step.state, step.code) for step, _ in rows]

    def asked(self, device: str, pattern: str) -> list[tuple[str, str]]:
        """The device's requests to matching paths, with their Range headers."""
        return [(path, span) for name, path, span in self.faults.seen if name == device and re.search(pattern, path)]


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def open_plane(folder: Path) -> Iterator[Plane]:
    """A new control plane under `folder`, which answers until the end of the block."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    home = Home.create(folder / "home")
    faults = Faults(DeviceApi(home, "default", None).app())
    try:
        with serving(faults, home) as url:
            yield Plane(home, url, faults)
    finally:
        home.close()


@contextmanager
def serving(app: Asgi, home: Home, port: int = 0) -> Iterator[str]:
    """HTTPS with mutual TLS over `app`, as `lightship up` does it; its address."""
    key, chain = home.ca.issue_server(server_names([]))
    folder = home.path / "ca"
    (folder / "server.key").write_bytes(key)
    (folder / "server.pem").write_bytes(chain)
    config = uvicorn.Config(
        app, port=port, http=PeerProtocol, lifespan="off", access_log=False, log_level="critical",
        ssl_keyfile=str(folder / "server.key"), ssl_certfile=str(folder / "server.pem"),
        ssl_ca_certs=str(home.ca.certificate_path), ssl_cert_reqs=ssl.CERT_OPTIONAL, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = _Uvicorn(config)
    thread = threading.Thread(target=server.run, name="control-plane")
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the control plane did not start"
            assert time.monotonic() < end, "the control plane did not start in time"
            time.sleep(0.02)
        yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
