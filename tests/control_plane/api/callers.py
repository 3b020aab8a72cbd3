"""Callers of the device API who are not bound by an agent's manners: any certificate, any path, any bytes."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import func, select
from starlette.routing import Route
from tests.control_plane.things import Served, enrolled, envelope, heartbeat

from lightship.api.device_api import DeviceApi
from lightship.home import Home
from lightship.storage.models import DeadLetter, Device, WindowRow
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.wire import pack
from lightship_agent.link.identity import certificate_request, new_key

PATIENCE = 20.0  # seconds
#: What an operating system, or a TLS library, says when the other side hangs up.
HUNG_UP = (ssl.SSLError, ConnectionError)
#: The routes that need no certificate.
OPEN = {Paths.CA, Paths.ENROL, Paths.RECOVERY_NONCE, Paths.RECOVER}


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The stable code of a refusal; fails where the answer is none."""
        said: dict[str, Any] = json.loads(self.body)
        assert set(said) == {"code", "error"}, said
        assert said["error"]
        return str(said["code"])


@dataclass
class Caller:
    """One TLS client. Paths and headers go out as they are given."""

    url: str
    ca: Path
    certificate: tuple[Path, Path] | None = None  # certificate chain and key, PEM

    def context(self) -> ssl.SSLContext:
        """Trusts the control plane's CA, and shows the certificate, if any."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if self.certificate is not None:
            context.load_cert_chain(*self.certificate)
        return context

    def ask(
        self, path: str, *, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own."""
        where = urlsplit(self.url)
        connection = http.client.HTTPSConnection(
            where.hostname or "", where.port, timeout=PATIENCE, context=self.context()
        )
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, found, reply.read())
        finally:
            connection.close()


def stranger(served: Served) -> Caller:
    """Somebody without a certificate."""
    return Caller(served.url, served.home.ca.certificate_path)


def member(served: Served, folder: Path, device: str = "pump-1") -> Caller:
    """A device that has enrolled as devices do."""
    identity = enrolled(served.home, served.url, folder, device)
    return Caller(
        served.url, served.home.ca.certificate_path, (identity.folder / "cert.pem", identity.folder / "key.pem")
    )


def shows(served: Served, folder: Path, key: bytes, chain: bytes) -> Caller:
    """Somebody with this key and chain, PEM."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shown.key").write_bytes(key)
    (folder / "shown.pem").write_bytes(chain)
    return Caller(served.url, served.home.ca.certificate_path, (folder / "shown.pem", folder / "shown.key"))


def guarded_routes(home: Home) -> list[tuple[str, str]]:
    """Method and path of every route that needs a certificate, with its parameters filled in; from the app itself."""
    found = []
    for route in DeviceApi(home, "default", None).app().routes:
        assert isinstance(route, Route)
        if route.path not in OPEN:
            path = route.path
            for name in route.param_convertors:
                path = path.replace(f"{{{name}}}", "timestamp.json" if name == "name" else "bundles")
            found += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


def body_for(path: str) -> bytes | None:
    """A body that would be accepted from a device."""
    if path == Paths.RENEW:
        return json.dumps({"csr": certificate_request(new_key(), "pump-1").decode()}).encode()
    return pack(envelope(heartbeat(1))) if path == Paths.TELEMETRY else None


def facts(home: Home) -> tuple[Any, ...]:
    """What no refused caller may change."""
    with home.database.read() as session:
        devices = [(d.id, d.state, d.spki, d.spki_next, d.last_seen) for d in session.scalars(select(Device))]
        counts = [session.scalar(select(func.count()).select_from(t)) for t in (WindowRow, DeadLetter)]
    return devices, counts
