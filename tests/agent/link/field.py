"""A field of devices before a real control plane: a home on disk, its device API over real TLS, and faults to order."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import uvicorn
from tests.agent.conftest import build

from lightship.api.device_api import DeviceApi
from lightship.api.tls_protocol import PeerProtocol
from lightship.fleet import director, enrolment
from lightship.fleet.broker import BrokerInfo
from lightship.fleet.ca import server_names
from lightship.home import Home
from lightship.storage.models import AssignmentRow, ModelVersion
from lightship_agent import __version__
from lightship_agent.contract.assignment import Assignment, Beside
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import LightshipError, UpdateError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.link.client import ControlPlane
from lightship_agent.link.enrol import enrol
from lightship_agent.link.identity import Identity
from lightship_agent.runtime.compat import check_compatible
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.session import Allowed
from lightship_agent.update import machine as m
from lightship_agent.update.check import check
from lightship_agent.update.clock import DeviceClock
from lightship_agent.update.steps import Timing
from lightship_agent.update.updater import Bounds, Updater

Asgi = Callable[..., Awaitable[None]]
FAR_FUTURE = 4_000_000_000


class CutOffError(Exception):
    """The connection is to be closed in the middle of an answer."""


@dataclass
class Fault:
    """What happens instead of an answer to a path, and how often."""

    pattern: re.Pattern[str]
    times: int
    status: int | None = None
    body: bytes = b""
    cut_after: int | None = None


@dataclass
class Server:
    """The device API with faults before it. `seen` has each request's method, path and Range header."""

    app: Asgi
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        self.seen.append((scope["method"], scope["path"], headers.get(b"range", b"").decode()))
        fault = next((f for f in self.faults if f.times > 0 and f.pattern.search(scope["path"])), None)
        if fault is None:
            await self.app(scope, receive, send)
            return
        fault.times -= 1
        if fault.status is not None:
            await send({"type": "http.response.start", "status": fault.status, "headers": []})
            await send({"type": "http.response.body", "body": fault.body})
            return
        await self.app(scope, receive, _cut(send, fault.cut_after or 0))

    def asked(self, pattern: str) -> list[tuple[str, str, str]]:
        """The requests whose path matches."""
        return [r for r in self.seen if re.search(pattern, r[1])]


def _cut(send: Any, after: int) -> Any:
    sent = 0

    async def cutting(message: Any) -> None:
        nonlocal sent
        if message["type"] == "http.response.body" and sent + len(message.get("body", b"")) > after:
            await send({**message, "body": message["body"][: after - sent], "more_body": True})
            await asyncio.sleep(0.05)
            raise CutOffError
        sent += len(message.get("body", b""))
        await send(message)

    return cutting


class RecordingHost:
    """The rest of an agent: loads models really, and notes what it was told."""

    allowed = Allowed()

    def __init__(self) -> None:
        self.serving: str | None = None
        self.history: list[str | None] = []
        self.steps: list[tuple[str, str]] = []
        self.failing: set[str] = set()  # digests whose requests fail
        self.unloadable: set[str] = set()
        self.kept: tuple[str, ...] = ()
        self.beside: dict[str, Beside] = {}

    def check_compatible(self, bundle: Bundle) -> None:
        check_compatible(
            bundle.manifest,
            agent_version=__version__,
            onnxruntime_version=onnxruntime.__version__,
            device_class="generic",
        )

    def serve(self, bundle: Bundle) -> None:
        if bundle.digest in self.unloadable:
            raise UpdateError("update.swap", "The model can't be loaded.")
        load_model(bundle)
        self._now(bundle.digest)

    def settle(self, keep: Collection[str]) -> None:
        self.kept = tuple(keep)

    def serve_nothing(self) -> None:
        self._now(None)

    def stand_beside(self, beside: Beside, bundle: Callable[[], Bundle]) -> None:
        if beside.sha256 in self.unloadable:
            raise UpdateError("update.swap", "The model can't be loaded.")
        load_model(bundle())
        self.beside[beside.experiment] = beside

    def step_aside(self, experiment: str) -> None:
        self.beside.pop(experiment, None)

    def failures(self, digest: str) -> int:
        return int(digest in self.failing)

    def report(self, action: m.Report) -> None:
        self.steps.append((action.step, action.code))

    def _now(self, digest: str | None) -> None:
        self.serving = digest
        self.history.append(digest)


@dataclass
class Device:
    """One enrolled device: the real updater, looked at step by step."""

    identity: Identity
    updater: Updater
    host: RecordingHost
    control: ControlPlane

    @property
    def folder(self) -> Path:
        return self.identity.folder.parent

    def look(self) -> str:
        """Look for an assignment once, as the updater's thread does; why updates stand still, if they do."""
        try:
            self.updater._look()
        except LightshipError as e:
            self.updater._standstill(e)
        return self.updater.trust_code

    def on_disk(self, *but: str) -> dict[str, str]:
        """Digest of every file of the state directory, but those below the named ones."""
        files = (p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink())
        names = {p.relative_to(self.folder).as_posix(): p for p in files}
        return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in names.items() if not n.startswith(but)}


class Field:
    """A control plane and the devices before it."""

    def __init__(self, home: Home, url: str, server: Server, folder: Path) -> None:
        self.home = home
        self.url = url
        self.server = server
        self._folder = folder
        self._controls: list[ControlPlane] = []

    def fault(self, path: str, *, times: int = 1_000, **what: Any) -> None:
        """Answer matching paths wrongly: `status=…, body=…` or `cut_after=bytes`."""
        self.server.faults.append(Fault(re.compile(path), times, **what))

    def well_again(self) -> None:
        """No more faults."""
        self.server.faults.clear()

    def token(self, device: str | None = None, *, uses: int = 1, ttl_seconds: int = 600) -> str:
        with self.home.database.write() as session:
            return enrolment.create_token(
                session, self.home.ca, group="all", labels={}, device=device, uses=uses, ttl_seconds=ttl_seconds,
                actor="test",
            )  # fmt: skip

    def enrolled(self, name: str = "press-1") -> Identity:
        return enrol(self._folder / name, server=self.url, token=self.token(), device=name)

    def device(self, name: str = "press-1", **how: Any) -> Device:
        return self.boot(self.enrolled(name), **how)

    def boot(
        self, identity: Identity, *, soak: float = 0.2, reach: float = 0.0, bounds: Bounds | None = None, **how: Any
    ) -> Device:
        """An agent's updater over that identity, as after a restart. Assignments are checked in this process."""
        host, control = RecordingHost(), ControlPlane(identity)
        self._controls.append(control)
        folder = identity.folder.parent
        how = {"check": check, "clock": DeviceClock(folder, wall=_wall), **how}
        timing = Timing(poll=900, soak=soak, reach=reach)
        updater = Updater(folder, identity, control, host, timing, bounds, **how)
        updater.recover()
        return Device(identity, updater, host, control)

    def release(self, version: int, data: bytes | None = None, *, name: str = "pump", **shape: Any) -> ModelVersion:
        """Sign and publish a bundle: these bytes, or a real small model."""
        bundle = build(version, name=name, **shape) if data is None else data
        row = ModelVersion(
            model=name, version=version, run_id="run", state="released", digest=sha256_hex(bundle), length=len(bundle),
            metrics={}, created_at=0, released_at=0,
        )  # fmt: skip
        self.home.releases.publish(row.path, bundle)
        return row

    def assign(self, device: str, version: ModelVersion) -> int:
        """Have the director sign; the assignment's seq."""
        with self.home.database.write() as session:
            return director.assign(
                session, self.home.keys, device=device, version=version, rollout="ro-1", actor="test"
            )

    def assignment(self, device: str, version: ModelVersion, **changes: Any) -> Assignment:
        """An assignment's payload, to be signed by whom a test likes."""
        facts: dict[str, Any] = {
            "device": device, "seq": 99, "issued": 1, "expires": FAR_FUTURE, "model": version.model,
            "version": version.version, "path": version.path, "sha256": version.digest, "length": version.length,
        }  # fmt: skip
        return Assignment(**{**facts, **changes})

    def deliver(self, device: str, envelope: bytes) -> None:
        """Let the server hand out those bytes as the device's assignment."""
        with self.home.database.write() as session:
            row = session.get(AssignmentRow, device)
            if row is None:
                row = AssignmentRow(
                    device=device, seq=0, model="", version=0, digest="", rollout="", issued_at=0, expires_at=0
                )
                session.add(row)
            row.envelope = envelope

    def sign(self, assignment: Assignment) -> bytes:
        """The director's signature."""
        return director.sign(self.home.keys, assignment)

    def envelope(self, device: str) -> bytes:
        """What the server hands out now."""
        with self.home.database.read() as session:
            row = session.get(AssignmentRow, device)
            assert row is not None
            return row.envelope

    def published(self, version: ModelVersion, suffix: str = ".zst") -> Path:
        """The file that travels."""
        (path,) = self.home.releases.targets.glob(f"bundles/{version.model}/*.{version.version}.tar{suffix}")
        return path

    def close(self) -> None:
        for control in self._controls:
            control.close()


def _wall() -> float:
    """The system's clock, looked up at each call: a test may have moved it."""
    return time.time()


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def serving(app: Asgi, home: Home, port: int = 0) -> Iterator[str]:
    """HTTPS with mutual TLS over `app`, as the control plane does it; its address."""
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
        until(lambda: server.started or not thread.is_alive())
        yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def open_field(folder: Path, template: Path, broker: BrokerInfo | None = None) -> Iterator[Field]:
    """A field of its own for one test; `template` is an empty home to copy."""
    shutil.copytree(template, folder / "home")
    home = Home.open(folder / "home")
    server = Server(DeviceApi(home, "default", broker).app())
    try:
        with serving(server, home) as url:
            opened = Field(home, url, server, folder)
            try:
                yield opened
            finally:
                opened.close()
    finally:
        home.close()


def until(happened: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something to happen, or fail."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.02)
