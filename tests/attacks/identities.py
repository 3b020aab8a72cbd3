"""Devices with real identities before a real control plane: what an attacker may have of theirs, what must not move.

`Ground` is a home, its device API over TLS, and a mosquitto beside it that the guard keeps up to date.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy import text
from tests.control_plane.mqtt import Ear, ear
from tests.control_plane.things import Served, enrolled, settings_for

from lightship.fleet import enrolment
from lightship.fleet.broker import RunningBroker, control_plane_context, start_broker
from lightship.fleet.broker_guard import BrokerGuard
from lightship.home import Home
from lightship.integrations.mosquitto import CONTROL_PLANE_USER
from lightship_agent.link import identity as store
from lightship_agent.link.identity import Identity

TABLES = ("devices", "join_tokens", "certificates", "preauthorisations", "used_nonces", "assignments", "cuts")


def database_of(home: Home) -> dict[str, list[tuple[Any, ...]]]:
    """Everything an enrolment, a renewal or a recovery could change, and the audit log."""
    with home.database.read() as session:
        return {
            table: [tuple(row) for row in session.execute(text(f"select * from {table} order by 1"))]
            for table in (*TABLES, "audit_events")
        }


def expired_certificate(home: Home, identity: Identity) -> None:
    """Its certificate ended a second ago, for its own key, by our own authority."""
    key = identity.key()
    issued = home.ca._issue(
        key.public_key(), identity.device, [ExtendedKeyUsageOID.CLIENT_AUTH], timedelta(seconds=-1), []
    )
    (identity.folder / "cert.pem").write_bytes(issued.chain)


def context_with(home: Home, folder: Path, key: ec.EllipticCurvePrivateKey, chain: bytes) -> ssl.SSLContext:
    """A client's TLS with that key and chain."""
    folder.mkdir(exist_ok=True)
    (folder / "key.pem").write_bytes(store.key_pem(key))
    (folder / "chain.pem").write_bytes(chain)
    context = ssl.create_default_context(cafile=str(home.ca.certificate_path))
    context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    return context


def bare_context(home: Home) -> ssl.SSLContext:
    """TLS without a certificate of one's own."""
    return ssl.create_default_context(cafile=str(home.ca.certificate_path))


def post(url: str, path: str, body: Any, tls: ssl.SSLContext) -> httpx.Response:
    with httpx.Client(verify=tls, timeout=20) as http:
        return http.post(url + path, json=body)


@dataclass(frozen=True)
class Ground:
    """The place of the fight."""

    home: Home
    url: str
    folder: Path
    broker: RunningBroker
    guard: BrokerGuard

    def enrolled(self, device: str) -> Identity:
        return enrolled(self.home, self.url, self.folder, device)

    @contextmanager
    def control(self) -> Iterator[Ear]:
        """The control plane's own ear on the broker."""
        tls = control_plane_context(self.home.path / "broker", self.home.ca)
        with ear(self.broker.info.port, CONTROL_PLANE_USER, tls) as listening:
            yield listening

    def revoke(self, device: str) -> None:
        with self.home.database.write() as session:
            enrolment.revoke(session, device, actor="user:test", reason="stolen")


@contextmanager
def ground(served: Served, folder: Path) -> Iterator[Ground]:
    home = served.home
    running = start_broker(settings_for(home.path, broker="mosquitto"), home.path / "broker", home.ca)
    assert running is not None
    try:
        guard = BrokerGuard(home.database, home.ca, running, home.path / "broker")
        yield Ground(home, served.url, folder, running, guard)
    finally:
        running.stop()
