"""A real file server over TLS or without it, and a faulty link in front of it."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from tests.agent.link.field import Field, open_field
from tests.network.proxy import Proxy

from lightship.home import Home
from lightship_agent.link.client import open_client

#: A name that the certificate holds, for tests that decide what it resolves to.
NAME = "plane.test"


@dataclass(frozen=True)
class Asked:
    """One request that reached the server, and its answer."""

    path: str
    range: str
    status: int


@dataclass
class FileServer:
    """uvicorn with a folder of files."""

    folder: Path
    tls: tuple[Path, Path] | None = None
    host: str = "127.0.0.1"
    asked: list[Asked] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next answers
    port: int = 0

    def start(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._socket = socket.create_server((self.host, 0), family=family)
        self.port = self._socket.getsockname()[1]
        certificate, key = self.tls or (None, None)
        app = Starlette(routes=[Route("/{path:path}", self._answer)])
        config = uvicorn.Config(
            app,
            log_level="critical",
            lifespan="off",
            ssl_certfile=certificate,
            ssl_keyfile=key,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)
        self._socket.close()

    async def _answer(self, request: Request) -> Response:
        path = self.folder / request.path_params["path"]
        found: Response = FileResponse(path) if path.is_file() else Response("no such file", 404)
        if self.statuses:
            found = Response("not now", self.statuses.pop(0))
        asked_range = request.headers.get("range", "")
        status = 206 if asked_range and found.status_code == 200 else found.status_code
        self.asked.append(Asked(f"/{request.path_params['path']}", asked_range, status))
        return found


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for this machine's loopback, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName("localhost"), x509.DNSName(NAME)]
    addresses = [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", "::1")]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return pem, key_pem


@dataclass
class Site:
    """A server, the links to it, and a client as the agent has it."""

    folder: Path
    tls: tuple[Path, Path]
    stack: ExitStack
    http: httpx.Client

    def serve(self, *, tls: bool = True, host: str = "127.0.0.1", own: tuple[Path, Path] | None = None) -> FileServer:
        """A file server; over TLS with the certificate that the client trusts, or with `own`."""
        files = self.folder / "files"
        files.mkdir(exist_ok=True)
        server = FileServer(files, tls=(own or self.tls) if tls else None, host=host)
        server.start()
        self.stack.callback(server.stop)
        return server

    def link(self, server: FileServer, *, host: str = "127.0.0.1") -> Proxy:
        """A faulty link to it."""
        proxy = Proxy((server.host, server.port), host=host)
        self.stack.callback(proxy.close)
        return proxy

    def put(self, name: str, data: bytes) -> None:
        """A file on every server."""
        (self.folder / "files" / name).write_bytes(data)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    trusted = certificate(tmp_path, "trusted")
    context = ssl.create_default_context(cafile=str(trusted[0]))
    with ExitStack() as stack, open_client(context) as http:
        yield Site(tmp_path, trusted, stack, http)


@pytest.fixture
def waits() -> list[float]:
    """What the downloads waited between their attempts."""
    return []


@pytest.fixture
def pause(waits: list[float]) -> Callable[[float], None]:
    """Notes how long it was told to wait, and does not."""
    return waits.append


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home without anything in it, to be copied."""
    path = tmp_path_factory.mktemp("template") / "home"
    Home.create(path).close()
    return path


@pytest.fixture
def field(tmp_path: Path, empty_home: Path) -> Iterator[Field]:
    """A control plane behind a faulty link, and devices that know it by the address of the link."""
    with open_field(tmp_path, empty_home) as opened:
        yield opened


@pytest.fixture
def link(field: Field) -> Iterator[Proxy]:
    """The only way from the devices to their control plane."""
    proxy = Proxy(("127.0.0.1", int(field.url.rpartition(":")[2])))
    field.url = f"https://127.0.0.1:{proxy.port}"
    yield proxy
    proxy.close()
