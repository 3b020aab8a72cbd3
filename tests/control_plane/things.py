"""What many tests need of a fleet: versions, devices by row or by enrolment, reports, a device API that answers."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.agent.conftest import Kind, build

from lightship.api.device_api import DeviceApi
from lightship.app import ControlPlane, _Server
from lightship.fleet import enrolment
from lightship.fleet.broker import BrokerInfo
from lightship.home import Home
from lightship.registry import release, versions
from lightship.settings import Settings, load_settings
from lightship.storage.audit import now_ms
from lightship.storage.models import Device, ModelVersion, Run
from lightship_agent.contract.messages import AnyRecord, Envelope, Heartbeat, Running
from lightship_agent.link import enrol
from lightship_agent.link.identity import Identity

MODEL = "pump"
EPOCH = "0123456789abcdef"
ACTOR = "user:test"


def register(
    home: Home, version: int = 1, *, model: str = MODEL, released: bool = True, kind: Kind = "classifier"
) -> ModelVersion:
    """A version around a real bundle, registered past the gates, and released unless told otherwise."""
    bundle = build(version, name=model, kind=kind, flip=version % 2 == 0)
    run = Run(
        id=secrets.token_hex(6), kind="train", model=model, status="finished", dataset_digest="0" * 64, recipe={},
        recipe_digest="", environment={}, environment_digest="", code_revision="", seeds=[], metrics={}, gate={},
        parity={}, started_at=now_ms(), ended_at=now_ms(),
    )  # fmt: skip
    with home.database.write() as session:
        session.add(run)
        session.flush()
        row = ModelVersion(
            model=model, version=version, run_id=run.id, state="registered", digest=home.artifacts.put(bundle),
            length=len(bundle), metrics={"accuracy": 0.9}, created_at=now_ms(), released_at=None,
        )  # fmt: skip
        session.add(row)
    return release.release(home, f"{model}@{version}", actor=ACTOR) if released else row


def make_champion(home: Home, version: int, model: str = MODEL) -> None:
    """Point the alias, as a completed rollout does."""
    with home.database.write() as session:
        versions.set_alias(session, model, "champion", version, actor=ACTOR)


def add_device(home: Home, device: str, *, group: str = "pumps", seen_ago: float = 0.0, **changes: Any) -> None:
    """A device row as enrolment makes it, last seen `seen_ago` seconds ago."""
    row = Device(
        id=device, tenant="default", group=group, labels={}, state="active", spki="0" * 64, cert_serial="1",
        cert_not_after=now_ms() + 86_400_000, enrolled_at=now_ms(), last_seen=now_ms() - int(seen_ago * 1_000),
        running=[], health={}, degraded=[], phase="idle",
    )  # fmt: skip
    for name, value in changes.items():
        setattr(row, name, value)
    with home.database.write() as session:
        session.add(row)


def reports_running(home: Home, device: str, version: ModelVersion, *, phase: str = "idle") -> None:
    """What ingest writes when a heartbeat says that the device runs `version`."""
    with home.database.write() as session:
        row = session.get(Device, device)
        assert row is not None
        row.last_seen, row.phase = now_ms(), phase
        row.running = [{"model": version.model, "version": version.version, "digest": version.digest}]
        row.running_model, row.running_version, row.running_digest = version.model, version.version, version.digest


def token_for(home: Home, device: str | None = None, *, uses: int = 1, ttl: int = 600, group: str = "pumps") -> str:
    """A join token from the operator."""
    with home.database.write() as session:
        return enrolment.create_token(
            session, home.ca, group=group, labels={"hall": "2"}, device=device, uses=uses, ttl_seconds=ttl, actor=ACTOR
        )


def enrolled(home: Home, server: str, folder: Path, device: str) -> Identity:
    """An identity, got over HTTPS by the agent's own code."""
    return enrol.enrol(folder / device, server=server, token=token_for(home, device), device=device)


def heartbeat(s: int, digest: str = "a" * 64, *, t: int | None = None, version: int = 1, **changes: Any) -> Heartbeat:
    """A heartbeat of a device that serves one model."""
    at = t if t is not None else now_ms()
    running = Running(model=MODEL, version=version, digest=digest, since=changes.pop("since", 1_000), **changes)
    return Heartbeat(s=s, t=at, running=(running,))


def envelope(*records: AnyRecord, epoch: str = EPOCH, lo: int = 1) -> Envelope:
    """One publish."""
    return Envelope(e=epoch, b=1, us=1, lo=lo, r=records)


def settings_for(home: Path, **flags: Any) -> Settings:
    """Every port free, no broker, unless told otherwise."""
    chosen = {"home": str(home), "api_port": 0, "device_port": 0, "mqtt_port": 0, "broker": "none", **flags}
    return load_settings({}, chosen)


@dataclass(frozen=True)
class Served:
    """A device API that answers."""

    home: Home
    url: str


@contextmanager
def serve_devices(home: Home, broker: BrokerInfo | None = None) -> Iterator[Served]:
    """Serve the device API of `home` exactly as `lightship up` does."""
    plane = ControlPlane(home, settings_for(home.path))
    listening = plane._bind("127.0.0.1", 0, "device_port")
    server = _Server(plane._device_config(DeviceApi(home, "default", broker)))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        until(lambda: server.started, 180)
        yield Served(home, f"https://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        plane.stop()
    assert not thread.is_alive()


def until(ready: Any, seconds: float = 60.0) -> None:
    """Wait for `ready()`."""
    end = time.monotonic() + seconds
    for pause in itertools.chain([0.005, 0.01, 0.02], itertools.repeat(0.05)):
        if ready():
            return
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(pause)
